"""The sweep: what a trial is, who wins, what is pruned; workers share a study and go on where one was cut off."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from stackpkg import params, runs, sweep
from stackpkg.params import Params
from stackpkg.runs import RunFolder, read_json, write_json, write_text
from stackpkg.sweep import findings, study
from stackpkg.sweep.space import excess
from stackpkg.telemetry import guard
from stackpkg.telemetry.rows import RowWriter
from stackpkg.training.stop import Stopped

ROOT = Path(__file__).parents[1]
VALUES: dict[str, Any] = {
    "layout": {"processes": 4, "fsdp": 2, "nodes": 2},
    "optimization": {"learning_rate": 1e-3, "floor": 8e-4, "warmup_steps": 100},
    "sweep": {"trials": 4, "steps": 8, "finalists": 1, "seeds": 2, "hot": [100.0]},
    "evaluation": {"entropy_band": [0.4, 0.8], "min_precision_at_k": 0.2},
}
P = params.validate(VALUES)
LAYERS = [{"entropy": 0.7, "usage": [0.5, 0.5]}, {"entropy": 0.6, "usage": [0.5, 0.5]}]
FACTOR = st.floats(0.25, 4.0)


def make(root: Path) -> RunFolder:
    runs.root = lambda: root  # in a worker's own process; `folder` below puts it back
    made = RunFolder("demo")
    for name in ("manifest.json", "pairs.parquet", "long_range.parquet"):
        (made / f"data/{name}").write_text(name)
    return made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(runs, "root", runs.root)
    return make(tmp_path)


class Jobs:
    """Stands in for `launch`: describes the job as it does, evaluates at every quarter, honours the stop file. The loss
    is smallest where the learning rate is the profile's."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.reports: dict[str, dict[str, Any] | BaseException] = {}
        self.pause = 0.0

    def __call__(
        self, name: str, p: Params, folder: RunFolder, *, steps: int, faults: list[dict[str, Any]], quiet: bool
    ) -> None:
        assert faults == (study.heat(steps, 100.0) if "-hot-" in name else [])
        assert steps == P.sweep.steps and p.layout.processes == 1
        home = folder.path / "checkpoints" / name
        write_json(home / "job.json", study.describe(name, p, folder, steps, faults))
        (home / "checkpoint-2").mkdir(exist_ok=True)
        self.names.append(name)
        made = self.reports.get(name, {})
        if isinstance(made, BaseException):
            raise made
        loss = 2 + abs(math.log(p.optimization.learning_rate / P.optimization.learning_rate)) + 1e-3 * p.seed
        for epoch in range(1, 5):
            report = {"validation_loss": loss - epoch, "precision_at_k": 0.5, "router": LAYERS, "step": 2 * epoch}
            write_json(folder / f"eval/{name}/epoch_{epoch:03d}.json", report | made)
            time.sleep(self.pause)
            if (home / "stop").exists() and epoch < 4:
                raise Stopped(name, 2 * epoch, (home / "stop").read_text())


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    made = Jobs()
    monkeypatch.setattr(study, "launch", made)
    return made


def states(part: study.Part) -> list[str]:
    return [trial.state.name for trial in part.study.trials]


# --- what a trial is


def test_a_variant_multiplies_and_runs_in_one_process() -> None:
    made = sweep.variant(P, {"optimization.learning_rate": 3.0, "objectives.contrastive": 0.25})
    assert made.optimization.learning_rate == pytest.approx(3e-3)
    assert made.objectives.contrastive == pytest.approx(0.25 * P.objectives.contrastive)
    assert made.objectives.load_balance == P.objectives.load_balance
    assert (made.layout.processes, made.layout.nodes, made.layout.fsdp) == (1, 1, 1)
    assert made.training.epoch_steps == made.snapshots.every_steps == 2 and made.optimization.warmup_steps == 4
    assert made.optimization.floor == P.optimization.floor and made.seed == P.seed
    slow = sweep.variant(P, {"optimization.learning_rate": 0.3}, seed=99)
    assert slow.optimization.floor == slow.optimization.learning_rate == pytest.approx(3e-4)  # never above the peak
    assert P.layout.processes == 4 and slow.seed == 99  # the profile stays what it was


def test_the_warm_up_of_a_trial_is_the_profiles_share_of_its_length() -> None:
    p = params.validate(VALUES | {"optimization": {"warmup_steps": 3}, "curriculum": [{"steps": 32}]})
    assert sweep.variant(p, {}).optimization.warmup_steps == 1  # 3 of 32 steps, in 8
    assert sweep.variant(p, {"optimization.warmup_steps": 2.0}).optimization.warmup_steps == 2


def test_a_variant_is_validated() -> None:
    with pytest.raises(ValueError, match=r"sweep\.steps 99 is above the 12 steps"):
        sweep.variant(params.validate(VALUES | {"sweep": {"steps": 99}}), {})
    with pytest.raises(ValueError, match=r"objectives\.contrastive.*<= 10"):
        sweep.variant(P, {"objectives.contrastive": 1_000.0})


@pytest.mark.parametrize("sizes", [{"pp": 2}, {"tp": 2}, {"fsdp": 4, "ep": 2}, {"pp": 2, "tp": 2}])
def test_a_trial_runs_on_one_process_whatever_the_layout(sizes: dict[str, int]) -> None:
    layout = {"processes": 4, "fsdp": 1, **sizes}
    p = params.validate(VALUES | {"layout": layout, "training": {"batch_tokens": 16384, "accumulation": 2}})
    made = sweep.variant(p, {}).layout
    assert (made.processes, made.fsdp, made.tp, made.ep, made.pp) == (1, 1, 1, 1, 1)


def test_a_space_that_leaves_a_range_is_refused_before_anything_runs(folder: RunFolder, jobs: Jobs) -> None:
    for values in ({"objectives": {"contrastive": 5.0}},):
        with pytest.raises(ValueError, match=r"contrastive|learning_rate"):
            study.run(params.validate(VALUES | values), folder)
    assert jobs.names == []


def test_the_space_is_what_the_profile_uses() -> None:
    assert set(sweep.space(P)) <= set(sweep.SPACE) and "optimization.clip" in sweep.space(P)
    weights = set(get_args(params.Term)) - {"language_modelling"}  # which is the measure of the others
    for p in (P, *(params.load(ROOT / f"params/{name}.yaml") for name in ("smoke", "dry_run", "cluster"))):
        assert {name for name in sweep.space(p) if name.startswith("objectives.")} == {
            f"objectives.{name}" for name in weights if getattr(p.objectives, name)
        }
    off = params.validate(VALUES | {"objectives": {"contrastive": 0.0}})
    assert "objectives.contrastive" not in sweep.space(off)  # a factor would not switch it on


@given(st.fixed_dictionaries(dict.fromkeys(sweep.space(P), FACTOR)))
def test_any_point_of_the_space_is_an_overlay_the_profile_accepts(factors: dict[str, float]) -> None:
    changes = yaml.safe_load(yaml.safe_dump(sweep.overlay(P, factors)))
    made = sweep.apply(P, changes)
    for name in factors:
        section, key = name.split(".")
        old, new = (getattr(getattr(q, section), key) for q in (P, made))
        assert new == pytest.approx(old * factors[name], rel=6e-3, abs=0.5 if isinstance(old, int) else 0)
    assert made.model_dump(exclude=set(changes)) == P.model_dump(exclude=set(changes))
    assert sweep.overlay(P, dict.fromkeys(factors, 1.0)) == {} and sweep.apply(P, {}) == P


def test_limits_are_broken_by_the_worst_layer_by_violations_and_by_what_is_no_number() -> None:
    report = {"precision_at_k": 0.3, "router": LAYERS}
    assert excess(P, report) == pytest.approx({"precision_at_k": -0.1, "router_entropy": -0.1})
    low = report | {"router": [{"entropy": 0.6}, {"entropy": 0.39}], "violations": 0.02}
    assert excess(P, low) == pytest.approx({"precision_at_k": -0.1, "router_entropy": 0.01, "violations": 0.02})
    own = {"max_violations": 0.05, "min_precision_at_k": 0.1, "entropy_band": [0.2, 1.0]}
    lenient = excess(params.validate(VALUES | {"sweep": VALUES.get("sweep", {}) | own}), low)
    assert lenient == pytest.approx({"violations": -0.03, "precision_at_k": -0.2, "router_entropy": -0.19})
    assert excess(P, report | {"router": [{"entropy": "NaN"}]})["router_entropy"] > 0
    assert excess(P, report | {"precision_at_k": "NaN"})["precision_at_k"] == math.inf
    assert "router_entropy" not in excess(P, report | {"router": []})  # a model without router


# --- asking and telling


def test_a_sweep_runs_search_hot_and_final_once(folder: RunFolder, jobs: Jobs) -> None:
    parts = sweep.run(P, folder)
    assert sorted(jobs.names)[:3] == ["sweep-final-000", "sweep-final-001", "sweep-final-002"]
    assert len(jobs.names) == len(set(jobs.names)) == 4 + 1 + 4
    search = parts["search"].study.trials
    assert search[0].params == dict.fromkeys(sweep.space(P), 1.0)  # the profile itself is the first trial
    assert len({trial.params["optimization.clip"] for trial in search}) == 4
    arms = parts["final"].arms or []
    assert [(arm["of"] == 0, arm["seed"]) for arm in arms] == [(True, 18), (True, 19), (False, 18), (False, 19)]
    assert P.seed not in {arm["seed"] for arm in arms}
    again = sweep.run(P, folder)
    assert len(jobs.names) == 9 and again["final"].arms == arms
    assert not list(folder.path.glob("checkpoints/sweep-*/checkpoint-*")), "weights of trials that have ended"


def test_more_trials_go_on_from_those_there_are(folder: RunFolder, jobs: Jobs) -> None:
    sweep.run(P, folder)
    more = params.validate(VALUES | {"sweep": VALUES["sweep"] | {"trials": 6}})
    assert len(sweep.run(more, folder)["search"].trials()) == 6
    assert len([name for name in jobs.names if "search" in name]) == 6


def test_results_of_another_profile_or_corpus_count_for_nothing(folder: RunFolder, jobs: Jobs) -> None:
    sweep.run(P, folder)
    other = params.validate(VALUES | {"seed": 18})
    assert len(sweep.run(other, folder)["search"].study.trials) == 4 and len(jobs.names) == 18
    write_text(folder / "data/manifest.json", "another corpus")
    assert len(sweep.run(other, folder)["search"].study.trials) == 4 and len(jobs.names) == 27


def test_a_trial_that_fails_or_hangs_is_a_result(folder: RunFolder, jobs: Jobs) -> None:
    jobs.reports["sweep-search-000"] = RuntimeError("x" * 600 + "the gradient norm was not finite")
    jobs.reports["sweep-search-001"] = {"validation_loss": "NaN", "router": [{"entropy": "NaN"}]}
    jobs.reports["sweep-search-002"] = TimeoutError("the launch ran longer than layout.timeout_minutes")
    jobs.reports["sweep-hot-000"] = RuntimeError("hot")
    parts = sweep.run(P, folder)
    trials = parts["search"].study.trials
    assert [trial.state.name for trial in trials[:3]] == ["FAIL"] * 3 and len(parts["search"].trials()) == 4
    assert trials[0].user_attrs["error"].endswith("the gradient norm was not finite")
    assert len(trials[0].user_attrs["error"]) == 500 and trials[1].user_attrs["error"]
    found = sweep.table(parts, folder)
    assert found.error[found.state == "FAIL"].str.len().min() > 0 and len(found) == 4 + 1 + len(parts["final"].arms)
    assert jobs.names.count("sweep-search-002") == 1  # it counts: the sweep does not ask until all go well


def test_an_infeasible_trial_is_no_finalist_and_pruned_ones_neither(folder: RunFolder, jobs: Jobs) -> None:
    for number in (1, 2, 3):
        jobs.reports[f"sweep-search-{number:03d}"] = {"router": [{"entropy": 0.39}], "validation_loss": -9.0}
    parts = sweep.run(P, folder)
    assert {arm["of"] for arm in parts["final"].arms} == {0}
    found = sweep.table(parts, folder)
    assert found.query("part == 'search' and loss == -9").feasible.any() == False  # noqa: E712
    assert sweep.winner(found, parts)["trial"] == 0  # the profile wins, and the proposal is to change nothing
    assert sweep.write_winner(P, folder, sweep.winner(found, parts)).count("\n") == 1


def test_a_worse_trial_is_pruned_through_the_stop_file_while_it_runs(folder: RunFolder, jobs: Jobs) -> None:
    jobs.pause = 0.4
    jobs.reports["sweep-search-001"] = {"validation_loss": 50.0}
    part = study.Part(P, folder, "search")
    study._work([part])
    bad = part.study.trials[1]
    assert bad.state == TrialState.PRUNED and bad.value == 50.0 and max(bad.intermediate_values) < P.sweep.steps
    assert (folder.path / "checkpoints/sweep-search-001/stop").read_text().startswith("pruned")
    found = sweep.table({"search": part}, folder)
    assert found.state[1] == "PRUNED" and not found.feasible[1] and math.isnan(found.loss[1])
    assert part.study.trials[0].state == TrialState.COMPLETE  # the best at every rung is never pruned


def test_reports_an_older_job_left_are_not_taken_for_the_trials(folder: RunFolder, jobs: Jobs) -> None:
    report = {"validation_loss": 7.0, "precision_at_k": 0.5, "router": LAYERS, "step": 2}
    write_json(folder / "eval/sweep-search-000/epoch_001.json", report)
    write_json(folder / "checkpoints/sweep-search-000/job.json", {"digest": "older"})
    part = study.Part(P, folder, "search")
    job = part.ask()
    assert job
    part.watch(job, alive=True)
    assert part.study.trials[0].intermediate_values == {}
    write_json(folder / "checkpoints/sweep-search-000/job.json", {"digest": job.spec})
    part.watch(job, alive=True)
    assert part.study.trials[0].intermediate_values == {2: 7.0}


# --- several workers, and workers that die


def test_a_trial_of_a_living_worker_is_left_alone_and_one_of_a_dead_worker_goes_on(folder: RunFolder) -> None:
    part, other = study.Part(P, folder, "search"), study.Part(P, folder, "search")
    job = part.ask()
    assert job and (mine := other.ask())
    assert states(part) == ["RUNNING", "RUNNING"] and job.name != mine.name
    write_text(folder / f"checkpoints/{job.name}/stop", "left by the dead")
    job.held.close()  # what the kernel does when a process dies
    heir = other.ask()
    assert heir and states(part) == ["FAIL", "RUNNING", "RUNNING"] and "error" not in part.study.trials[0].user_attrs
    assert heir.name == job.name and heir.spec == job.spec and heir.trial.params == job.trial.params
    assert not (folder.path / f"checkpoints/{job.name}/stop").exists()
    assert part.trials() == []


def test_no_worker_asks_for_more_than_is_wanted(folder: RunFolder) -> None:
    workers = [study.Part(P, folder, "search") for _ in range(3)]
    asked = [part.ask() for _ in range(3) for part in workers]
    assert [job is not None for job in asked] == [True] * 4 + [False] * 5
    points = [tuple(job.trial.params.values()) for job in asked if job]
    assert len(set(points)) == 4, "two workers drew the same point"


def test_an_interrupt_leaves_a_sweep_that_goes_on_in_the_same_process(folder: RunFolder, jobs: Jobs) -> None:
    jobs.reports["sweep-search-001"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        sweep.run(P, folder)
    jobs.reports.clear()
    parts = sweep.run(P, folder)
    assert len(parts["search"].trials()) == 4 and jobs.names.count("sweep-search-001") == 2
    assert len({trial.user_attrs["job"] for trial in parts["search"].trials()}) == 4


def test_a_trial_that_ends_with_all_that_runs_here_is_asked_again(folder: RunFolder, jobs: Jobs) -> None:
    """SIGTERM: the trial has its checkpoint, and is no result."""
    name = "sweep-search-001"
    jobs.reports[name] = Stopped(name, 3, "SIGTERM")
    write_json(folder / f"checkpoints/{name}/attempts.json", [{"stopped": {"step": 3, "reason": "SIGTERM"}}])
    with pytest.raises(Stopped):
        sweep.run(P, folder)
    assert (folder.path / f"checkpoints/{name}/checkpoint-2").exists()
    jobs.reports.clear()
    parts = sweep.run(P, folder)
    assert len(parts["search"].trials()) == 4 and jobs.names.count(name) == 2
    assert all("error" not in trial.user_attrs for trial in parts["search"].trials())


WORKER = """
import sys
from pathlib import Path
import test_sweep
folder = test_sweep.make(Path(sys.argv[1]))
jobs = test_sweep.Jobs()
jobs.pause = float(sys.argv[2])
test_sweep.study.launch = jobs
test_sweep.sweep.run(test_sweep.P, folder)
print(*jobs.names)
"""


def worker(root: Path, pause: float) -> subprocess.Popen[str]:
    places = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-c", WORKER, str(root), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_two_processes_share_a_study_and_run_every_trial_once(folder: RunFolder, tmp_path: Path) -> None:
    both = [worker(tmp_path, 0.15) for _ in range(2)]
    names = [process.communicate(timeout=100)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(names), "one of them did nothing"
    together = sorted(names[0] + names[1])
    assert len(together) == len(set(together)) == 4 + 1 + len(study.Part(P, folder, "final", []).study.trials)
    assert len(study.Part(P, folder, "search").trials()) == 4


def test_a_killed_worker_is_inherited_while_the_other_works(folder: RunFolder, tmp_path: Path, jobs: Jobs) -> None:
    killed = worker(tmp_path, 60.0)  # its trials never end
    part = study.Part(P, folder, "search")
    until = time.monotonic() + 60
    while len(part.study.get_trials(states=[TrialState.RUNNING])) < min(4, os.cpu_count() or 1):
        assert time.monotonic() < until and killed.poll() is None
        time.sleep(0.05)
    assert part.trials() == []
    heir = part.ask()  # a living worker's trials are not reaped
    assert heir and TrialState.FAIL not in {trial.state for trial in part.study.trials}
    heir.held.close()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    parts = sweep.run(P, folder)
    assert len(parts["search"].trials()) == 4
    names = {trial.user_attrs["job"] for trial in parts["search"].trials()}
    assert len(names) == 4 and names >= {"sweep-search-000", "sweep-search-001", heir.name}  # their jobs went on


# --- findings


def finals(losses: dict[int, list[float]], bad: tuple[int, ...] = ()) -> pd.DataFrame:
    return pd.DataFrame(
        {"part": "final", "of": of, "seed": seed, "loss": loss, "feasible": of not in bad, "room_router_entropy": 0.1}
        for of, row in losses.items()
        for seed, loss in enumerate(row)
    )


def test_the_winner_has_the_smallest_mean_of_those_that_kept_their_limits() -> None:
    found = finals({0: [2.0, 2.1, 2.2], 3: [1.0, 1.1, 1.2], 5: [1.9, 2.0, 2.1], 7: [1.0, math.nan, 0.1]}, bad=(3, 7))
    ranked = sweep.ranking(found)
    assert list(ranked.index)[:2] == [5, 0] and not ranked["in"][3] and not ranked["in"][7]
    assert ranked.gain[5] == pytest.approx(0.1) and ranked.gain_low[5] == pytest.approx(0.1)  # paired by seed
    assert ranked.low[5] < 1.9 and ranked.gain[0] == 0.0
    part = type("Part", (), {"arms": [{"of": of, "factors": {"objectives.contrastive": 1.0 + of}} for of in (0, 5)]})()
    won = sweep.winner(found, {"final": part})
    assert (
        won["trial"] == 5 and won["separable"] and won["seeds"] == 3 and won["factors"]["objectives.contrastive"] == 6
    )
    with pytest.raises(ValueError, match=r"no finalist kept every limit; least room seen.*router_entropy"):
        sweep.winner(finals({0: [1.0], 3: [2.0]}, bad=(0, 3)), {})
    noisy = sweep.ranking(finals({0: [2.0, 2.1, 2.2], 3: [2.3, 1.8, 2.0]}))
    assert noisy.gain_low[3] < 0 < noisy.gain[3]  # smaller, yet not separable
    assert not sweep.winner(finals({0: [2.0], 5: [1.0]}), {"final": part})["separable"]  # one seed shows nothing


def test_the_interval_holds_its_confidence_and_one_value_has_none() -> None:
    draws = np.random.default_rng(0).normal(5.0, 2.0, (4_000, 3))
    ends = np.array([findings.interval(row)[1:] for row in draws])
    inside = ((ends[:, 0] < 5) & (ends[:, 1] > 5)).mean()
    assert inside == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 4_000))
    mean, *none = findings.interval([3.0])
    assert mean == 3.0 and all(math.isnan(end) for end in none)


def test_the_winner_is_written_as_an_overlay_and_a_diff(folder: RunFolder) -> None:
    won = {
        "trial": 5,
        "factors": {"optimization.learning_rate": 0.5, "objectives.contrastive": 2.0},
        "separable": False,
    }
    won |= {"loss": 2.0, "low": 1.9, "high": 2.1, "seeds": 3.0, "gain": 0.01, "gain_low": -0.1, "gain_high": 0.1}
    diff = sweep.write_winner(P, folder, won)
    changes = yaml.safe_load((folder.path / "sweep/winner.yaml").read_text())
    assert changes == {"optimization": {"learning_rate": 5e-4, "floor": 5e-4}, "objectives": {"contrastive": 0.4}}
    assert sweep.apply(P, changes).optimization.learning_rate == 5e-4
    lines = diff.splitlines()
    assert "NOT separable" in lines[0] and "3 seed(s)" in lines[0]
    assert "-  contrastive: 0.2" in lines and "+  contrastive: 0.4" in lines
    assert sum(line.startswith("+ ") for line in lines) == 3  # nothing else changes


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=12))
def test_the_pareto_front_is_what_nothing_beats_and_beats_all_else(points: list[tuple[int, int, int]]) -> None:
    found = pd.DataFrame(points, columns=["loss", "room_a", "room_b"], dtype=float)
    front = sweep.pareto(found)

    def beats(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
        return a != b and a[0] <= b[0] and a[1] >= b[1] and a[2] >= b[2]

    for point, kept in zip(points, front, strict=True):
        assert kept == (not any(beats(other, point) for other in points))
    found.loc[0, "loss"] = math.nan
    assert not sweep.pareto(found)[0]  # a trial without a loss is on no front


SCORES = st.lists(st.floats(-50, 50), min_size=1, max_size=9)


def test_the_rate_rises_when_the_windows_are_warm_or_in_the_middle() -> None:
    assert study.heat(20, 30.0) == [{"kind": "hot_rate", "step": [*range(guard.WARM + 2, 21)], "factor": 30.0}]
    assert study.heat(4, 30.0)[0]["step"] == [3, 4]


@given(SCORES, SCORES, st.integers(1, 9))
def test_a_threshold_separates_or_says_that_none_does(healthy: list[float], bad: list[float], among: int) -> None:
    for below in (False, True):
        made = findings.separate(healthy, bad, below=below, among=among)
        possible = max(bad) < min(healthy) if below else min(bad) > max(healthy)
        enough = math.comb(len(healthy) + len(bad), len(bad)) >= 20 * among  # orders, of which one separates by chance
        assert (made["verdict"] == "separable") == (possible and enough)
        assert made["verdict"].startswith("too few runs") == (possible and not enough)
        assert (made["healthy"], made["diverged"]) == (len(healthy), len(bad))
        assert made["auc"] == pytest.approx(
            np.mean([(b == h) / 2 + ((b < h) if below else (b > h)) for b in bad for h in healthy])
        )
        if possible:
            assert made["low"] <= made["threshold"] <= made["high"]
            assert {made["low"], made["high"]} == ({max(bad), min(healthy)} if below else {max(healthy), min(bad)})
            assert made["misses"] == pytest.approx(1 - 0.05 ** (1 / len(bad)))
        else:
            assert math.isnan(made["threshold"])


def rows_of(losses: list[float], norms: list[float], nonfinite: int = 0) -> pd.DataFrame:
    series = {"loss": losses, "loss_language_modelling": losses, "grad_norm": norms, "router_entropy": 0.7}
    return pd.DataFrame(series | {"nonfinite": [0] * (len(losses) - 1) + [nonfinite]})


def test_thresholds_of_runs_of_which_some_diverged() -> None:
    calm = {f"calm-{n}": rows_of([7.0 - 0.1 * i for i in range(16)], [2.0 + 0.1 * n] * 16) for n in range(9)}
    hot = [7.0] * 9 + [9.0, 11.0, 12.0] + [13.0] * 4
    wild = {f"wild-{n}": rows_of(hot, [2.0] * 9 + [40.0 + n, 90.0, 80.0] + [1e6] * 4) for n in range(3)}
    made = sweep.thresholds(P, calm | wild)
    norm = made.loc["gradient norm"]
    assert norm.verdict == "separable" and (norm.low, norm.high) == (pytest.approx(2.8), 90.0), "not the last quarter"
    assert norm.threshold == pytest.approx(math.sqrt(2.8 * 90)) and (norm.healthy, norm.diverged) == (9, 3)
    spike = made.loc["TrainGradSpike"]
    assert spike.shipped == 10 and spike.holds and spike.low == pytest.approx(1.0) and spike.high == pytest.approx(45.0)
    assert made.loc["TrainLossSpike"].verdict == "separable"
    for name in ("TrainRouterEntropyLow", "TrainRouterEntropyHigh"):
        assert made.loc[name].verdict == "not separable: no diverged run has this score", "it holds 1,000 steps"
    assert not made.index.str.contains("NonFinite").any()  # what defines a divergence cannot foretell it
    few = sweep.thresholds(P, {name: rows for name, rows in (calm | wild).items() if name[-1] in "01"})
    assert few.loc["gradient norm"].verdict.startswith("too few runs: scores that say nothing part like this with")


@given(st.lists(st.floats(0, 1, width=16), min_size=1, max_size=12), st.integers(1, 4), st.booleans())
def test_a_run_comes_as_near_to_an_alert_as_the_threshold_at_which_it_just_fires(
    values: list[float], hold: int, below: bool
) -> None:
    alert = guard.load(P)[0].model_copy(
        update={"series": "router_entropy", "comparison": "below" if below else "above", "hold": hold}
    )
    near = findings.extreme(pd.DataFrame({"router_entropy": values}), alert)

    def fires(threshold: float) -> bool:
        watch = guard.Guard([alert.model_copy(update={"threshold": threshold})])
        return any(watch.observe({"router_entropy": value}) for value in values)

    assert math.isnan(near) == (len(values) < hold)
    if not math.isnan(near):
        assert not fires(near) and fires(np.nextafter(near, 2 if below else -1))


def test_without_a_diverged_run_there_is_no_threshold() -> None:
    made = sweep.thresholds(P, {f"calm-{n}": rows_of([7.0, 6.5, 6.0, 5.0], [2.0] * 4) for n in range(3)})
    assert made.threshold.isna().all() and not made.holds.any()
    assert made.verdict.str.startswith("not separable: no diverged run").all()
    assert made.healthy["TrainLossSpike"] == 0, "four steps are too few for a window: no score, not a score of 0"


def test_what_the_ladder_mended_is_no_proof_of_health(folder: RunFolder) -> None:
    told = folder.path / "telemetry/trial"
    for attempt, steps, nonfinite in ((1, [1, 2], 1), (2, [2, 3], 0)):
        writer = RowWriter(told, "demo", attempt, 0, 1)
        for step in steps:
            writer.write(step, loss_language_modelling=7.0 - step, nonfinite=nonfinite * int(step == 2))
        writer.flush()
    table = findings.history(folder, "trial")
    assert table.attempt.tolist() == [1, 2, 2] and table.nonfinite.tolist() == [0, 1, 0]
    assert findings.diverged(table)


def test_a_run_diverged_when_it_is_not_finite_or_ends_above_its_beginning() -> None:
    assert findings.diverged(rows_of([7.0, 6.0, 5.0], [1.0] * 3, nonfinite=1))
    assert findings.diverged(rows_of([7.0, 6.0, 8.0, 9.0], [1.0] * 4))
    assert not findings.diverged(rows_of([7.0, 9.0, 6.0, 5.0], [1.0] * 4)) and not findings.diverged(pd.DataFrame())
    falls = rows_of([7.0, 6.9, 6.8, 6.7], [1.0] * 4)
    assert findings.diverged(falls.assign(validation_loss=[math.nan, 6.9, math.nan, 9.1]))  # the last update did it
    assert not findings.diverged(falls.assign(validation_loss=[math.nan, 9.1, math.nan, 6.8]))


def test_an_extreme_is_the_score_the_guard_itself_would_give() -> None:
    norms = [1.0, 2.0, 1.5, 1.2, 1.1, 1.3, 1.4, 1.6, 1.7, 14.0, 1.5, math.nan]
    spike = next(alert for alert in guard.load(P) if alert.name == "TrainGradSpike")
    score = findings.extreme(rows_of([1.0] * 12, norms), spike)
    for threshold, fires in ((score - 1e-9, True), (score + 1e-9, False)):
        watch = guard.Guard([spike.model_copy(update={"threshold": threshold})])
        assert any(watch.observe({"grad_norm": norm}) for norm in norms) == fires
    assert json.loads(json.dumps(score)) == pytest.approx(14.0 / 1.4)


def test_a_further_worker_takes_the_parameters_the_sweep_began_with(folder: RunFolder, jobs: Jobs) -> None:
    sweep.run(P, folder)
    assert params.validate(read_json(folder.path / "sweep/params.json")) == P
