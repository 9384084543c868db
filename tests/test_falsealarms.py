"""The rate of false alarms counts every job that went well, each by a guard of its own, and no other."""

import math
from pathlib import Path

import pytest
from scipy.stats import poisson

from stackpkg import params
from stackpkg.runs import write_json
from stackpkg.telemetry import falsealarms
from stackpkg.telemetry.rows import RowWriter, compact

CALM = {"grad_norm": 1.0, "router_entropy": 0.6, "attention_entropy_median": 0.5, "nonfinite": 0, "update_skipped": 0}


def job(
    run: Path, name: str, changes: dict[int, dict], faults: tuple = (), attempts: int = 1, done: bool = True
) -> None:
    """A job of forty steps and two ranks, in files; `changes` of rank 0 by step."""
    home = run / "checkpoints" / name
    p = params.validate({"evaluation": {"min_precision_at_k": 0.5}}).model_dump(mode="json")
    write_json(home / "job.json", {"name": name, "params": p, "faults": list(faults)})
    write_json(home / "attempts.json", [{}] * attempts)
    if done:
        write_json(home / "done.json", {})
    for rank in (0, 1):
        writer = RowWriter(run / "telemetry" / name, "run", 1, rank, 2)
        for step in range(1, 41):
            loss = 4 - step / 40 + 0.05 * math.sin(step)
            change = changes.get(step, {}) if rank == 0 else {"grad_norm": 99.0 if step == 20 else 1.0}
            writer.write(step, **CALM | {"loss": loss} | change)
        writer.flush()
    compact(run / "telemetry" / name)


def test_jobs_that_went_well_are_replayed_and_their_alarms_counted_by_name(tmp_path: Path) -> None:
    job(tmp_path, "train", {})
    low = {step: {"precision_at_k": 0.1} for step in (10, 20, 30)}
    job(tmp_path, "sweep-search-000", {15: {"loss": 50.0}, 25: {"loss": 50.0}, 35: {"grad_norm": 40.0}} | low)
    job(tmp_path, "sweep-hot-000", {15: {"loss": 50.0}}, faults=({"kind": "hot_rate"},))
    job(tmp_path, "pruned", {15: {"loss": 50.0}}, done=False)
    job(tmp_path, "killed", {15: {"loss": 50.0}}, attempts=2)
    assert falsealarms.jobs(tmp_path) == ["sweep-search-000", "train"]
    trial, train = (falsealarms.replay(tmp_path, name) for name in falsealarms.jobs(tmp_path))
    assert train == {"job": "train", "steps": 40, "alarms": {}, "earned": {}}
    assert trial["alarms"] == {"TrainLossSpike": 2, "TrainGradSpike": 1}
    assert trial["earned"] == {"TrainLowPrecisionAtK": 1}
    rate = falsealarms.rate([trial, train])
    assert (rate["steps"], rate["alarms"], rate["per_1000_steps"]) == (80, 3, 37.5)


@pytest.mark.parametrize("alarms", [0, 1, 7])
def test_the_limit_is_the_rate_under_which_so_few_are_seen_once_in_twenty(alarms: int) -> None:
    found = falsealarms.rate([{"steps": 400, "alarms": {"A": alarms}}, {"steps": 100, "alarms": {}}])
    assert found["per_1000_steps"] == 2 * alarms
    assert poisson.cdf(alarms, found["at_most"] / 1000 * 500) == pytest.approx(0.05)
