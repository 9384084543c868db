"""The sweep: what a trial is, who wins, and that a sweep that was cut off goes on where it stopped."""

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from stackpkg import params, runs, sweep
from stackpkg.params import Params
from stackpkg.runs import RunFolder, write_json, write_text

P = params.validate(
    {
        "layout": {"processes": 4, "fsdp": 2, "nodes": 2},
        "optimization": {"learning_rate": 1e-3, "floor": 8e-4, "warmup_steps": 100},
        "sweep": {"trials": 4, "steps": 6},
        "evaluation": {"entropy_band": [0.4, 0.8]},
    }
)
ONE = dict.fromkeys(sweep.SPACE, 1.0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    made = RunFolder("demo")
    for name in ("manifest.json", "pairs.parquet", "long_range.parquet"):
        (made / f"data/{name}").write_text(name)
    return made


class Jobs:
    """Stands in for `launch`: the loss is smallest where the factors are 1; notes what was asked for."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.reports: dict[str, dict[str, Any] | BaseException] = {}

    def __call__(self, name: str, p: Params, folder: RunFolder, *, steps: int, quiet: bool) -> None:
        assert steps == P.sweep.steps and p.layout.processes == 1
        self.names.append(name)
        loss = 2 + abs(math.log(p.optimization.learning_rate / P.optimization.learning_rate))
        made = self.reports.get(name, {})
        if isinstance(made, BaseException):
            raise made
        layers = [{"entropy": 0.7, "usage": [0.5, 0.5]}, {"entropy": 0.6, "usage": [0.5, 0.5]}]
        report = {"validation_loss": loss, "precision_at_k": 0.5, "router": layers} | made
        write_json(folder / f"eval/{name}/epoch_001.json", report)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    made = Jobs()
    monkeypatch.setattr(sweep, "launch", made)
    return made


def test_a_variant_multiplies_and_runs_in_one_process() -> None:
    made = sweep.variant(P, {"optimization.learning_rate": 3.0, "objectives.contrastive": 0.25})
    assert made.optimization.learning_rate == pytest.approx(3e-3)
    assert made.objectives.contrastive == pytest.approx(0.25 * P.objectives.contrastive)
    assert made.objectives.load_balance == P.objectives.load_balance
    assert (made.layout.processes, made.layout.nodes, made.layout.fsdp) == (1, 1, 1)
    assert made.training.epoch_steps == made.training.checkpoint_steps == 6 and made.optimization.warmup_steps == 3
    assert made.optimization.floor == P.optimization.floor
    slow = sweep.variant(P, {"optimization.learning_rate": 0.3})
    assert slow.optimization.floor == slow.optimization.learning_rate == pytest.approx(3e-4)  # never above the peak
    assert P.layout.processes == 4  # the profile stays what it was


def test_a_variant_is_validated() -> None:
    with pytest.raises(ValueError, match=r"sweep\.steps 99 is above the 12 steps"):
        sweep.variant(params.validate(P.model_dump() | {"sweep": {"steps": 99}}), {})
    with pytest.raises(ValueError, match=r"objectives\.contrastive.*<= 10"):
        sweep.variant(P, {"objectives.contrastive": 1_000.0})


def finished(value: float, feasible: bool, entropy: float = 0.6) -> optuna.trial.FrozenTrial:
    return create_trial(
        value=value,
        params=ONE,
        distributions={name: optuna.distributions.FloatDistribution(*span) for name, span in sweep.SPACE.items()},
        user_attrs={"feasible": feasible, "router_entropy": entropy},
    )


def test_the_winner_has_the_smallest_loss_of_those_in_the_band(folder: RunFolder) -> None:
    study = sweep.open_study(P, folder)
    for trial in (finished(3.0, True), finished(1.0, False, 0.1), finished(2.0, True), finished(2.5, True)):
        study.add_trial(trial)
    study.add_trial(create_trial(state=TrialState.FAIL))
    assert sweep.winner(study) == {"trial": 2, "validation_loss": 2.0, "factors": ONE}
    study.add_trial(finished(0.0, True))
    assert sweep.winner(study)["trial"] == 5  # a loss of 0 is a small loss, not a missing one


def test_no_winner_is_an_error_that_says_what_was_seen(folder: RunFolder) -> None:
    study = sweep.open_study(P, folder)
    study.add_trial(finished(1.0, False, 0.05))
    study.add_trial(finished(2.0, False, 0.97))
    with pytest.raises(ValueError, match=r"seen \[0\.05, 0\.97\]"):
        sweep.winner(study)


def test_open_study_tells_a_trial_that_was_cut_off_as_failed(folder: RunFolder) -> None:
    study = sweep.open_study(P, folder)
    for _ in range(2):
        study.ask()
    study.add_trial(finished(1.0, True))
    assert len(study.get_trials(states=[TrialState.RUNNING])) == 2
    again = sweep.open_study(P, folder)
    assert [trial.state for trial in again.trials] == [TrialState.FAIL, TrialState.FAIL, TrialState.COMPLETE]


def test_a_sweep_asks_for_its_trials_once(folder: RunFolder, jobs: Jobs) -> None:
    study = sweep.run(P, folder)
    assert sorted(jobs.names) == ["sweep-000", "sweep-001", "sweep-002", "sweep-003"]
    assert all(trial.state == TrialState.COMPLETE and trial.user_attrs["feasible"] for trial in study.trials)
    assert [trial.user_attrs["router_entropy"] for trial in study.trials] == [0.6] * 4  # of the worst layer
    assert sweep.winner(study)["validation_loss"] == min(trial.value for trial in study.trials)
    again = sweep.run(P, folder)
    assert len(jobs.names) == 4 and sweep.winner(again) == sweep.winner(study)


def test_results_of_another_profile_or_corpus_count_for_nothing(folder: RunFolder, jobs: Jobs) -> None:
    sweep.run(P, folder)
    other = params.validate(P.model_dump() | {"seed": 18})
    assert len(sweep.run(other, folder).trials) == 4 and len(jobs.names) == 8
    write_text(folder / "data/manifest.json", "another corpus")
    assert len(sweep.run(other, folder).trials) == 4 and len(jobs.names) == 12
    assert len(sweep.run(other, folder).trials) == 4 and len(jobs.names) == 12


def test_a_sweep_goes_on_after_it_was_cut_off(folder: RunFolder, jobs: Jobs) -> None:
    jobs.reports["sweep-001"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        sweep.run(P, folder)
    before = sweep.open_study(P, folder).trials
    assert before[1].state == TrialState.FAIL
    study = sweep.run(P, folder)
    assert len(jobs.names) == len(set(jobs.names)) and study.trials[1].state == TrialState.FAIL
    assert [trial.state for trial in study.trials].count(TrialState.COMPLETE) == 4  # the one cut off is asked again
    assert len(sweep.answered(study)) == 4


def test_results_of_another_profile_or_corpus_do_not_count(folder: RunFolder, jobs: Jobs) -> None:
    sweep.run(P, folder)
    sweep.run(params.validate(P.model_dump() | {"seed": 18}), folder)
    assert len(jobs.names) == 8
    (folder / "data/manifest.json").write_text("another corpus")
    sweep.run(P, folder)
    assert len(jobs.names) == 12


def test_a_trial_that_diverges_is_a_result(folder: RunFolder, jobs: Jobs) -> None:
    layers = [{"entropy": math.nan, "usage": [math.nan, math.nan]}]
    jobs.reports["sweep-000"] = RuntimeError("x" * 600 + "the gradient norm was not finite")
    jobs.reports["sweep-001"] = {"validation_loss": math.nan, "router": layers}
    jobs.reports["sweep-002"] = {"router": [{"entropy": 0.39}, {"entropy": 0.6}]}
    study = sweep.run(P, folder)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[0].user_attrs["error"].endswith("the gradient norm was not finite")
    assert len(study.trials[0].user_attrs["error"]) == 500
    assert study.trials[1].user_attrs["error"] == "the validation loss is not a number"
    assert len(jobs.names) == len(sweep.answered(study)) == 4  # they count: the sweep does not ask until all go well
    assert not study.trials[2].user_attrs["feasible"]  # one layer of two left the band
    assert sweep.winner(study)["trial"] == 3


def test_a_model_without_router_is_feasible(folder: RunFolder, jobs: Jobs) -> None:
    jobs.reports = {f"sweep-{number:03d}": {"router": []} for number in range(4)}
    assert sweep.winner(sweep.run(P, folder))["validation_loss"] >= 2
