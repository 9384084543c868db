"""A recorded job, as its exporter serves it, makes Prometheus and the guard call the same alerts."""

import math
import os
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from stackpkg import params
from stackpkg.runs import write_json
from stackpkg.telemetry import exporter, rules
from stackpkg.telemetry.guard import Guard, load
from stackpkg.telemetry.rows import RowWriter

pytestmark = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (prometheus)")
ALERTS = load(params.validate({}))
STEPS, EVALUATION, LONG = 300, 20, 1400  # a step a second; steps between two evaluations; of a job with a long hold
BURST = {"nonfinite": 1, "update_skipped": 1, "loss": math.nan, "grad_norm": math.inf}
EPISODES: dict[str, tuple[dict[int, dict[str, Any]], set[str]]] = {  # by step what is otherwise, and what must fire
    "calm": ({}, set()),
    "one bad gradient": ({100: BURST}, {"TrainNonFinite"}),
    "a burst": (dict.fromkeys(range(100, 104), BURST), {"TrainNonFinite", "TrainSkippedUpdates"}),
    # once it has settled: Prometheus' window is a minute longer, and a fast fall in it counts as noise
    "the loss jumps": ({step: {"loss": 9.0} for step in range(270, 280)}, {"TrainLossSpike"}),
    "one gradient jumps": (
        {step: {"grad_norm": 40.0, "update_skipped": int(step == 150)} for step in (150,)},
        {"TrainGradSpike"},
    ),
    "rolled back": ({step: {"recovery_rung": 2} for step in range(50, STEPS)}, {"TrainRolledBack"}),
    "attention collapses": (
        {step: {"attention_entropy_median": 0.05} for step in range(100, 130)},
        {"TrainAttentionEntropyCollapse"},
    ),
    "it waits for data": (
        {step: {"data_wait_seconds": 3.0, "tokens_per_second": 700.0} for step in range(100, 180)},
        {"TrainDataWait"},
    ),
    "it waits, but not for long": ({step: {"data_wait_seconds": 3.0} for step in range(100, 140)}, set()),
    "it slows down": ({step: {"tokens_per_second": 300.0} for step in range(200, 225)}, {"TrainThroughputDrop"}),
    "retrieval falls": ({step: {"precision_at_k": 0.3} for step in range(160, STEPS)}, {"TrainLowPrecisionAtK"}),
    "retrieval falls twice": ({step: {"precision_at_k": 0.3} for step in range(160, 200)}, set()),
    "a violation after none": ({240: {"violations": 0.02}}, {"TrainSafetyViolation"}),
    "violations that go": ({step: {"violations": 0.1 - step / 1000} for step in range(100)}, set()),
    "violations that stay": ({step: {"violations": 0.1} for step in range(STEPS)}, {"TrainSafetyViolation"}),
    "the router collapses": ({step: {"router_entropy": 0.1} for step in range(200, LONG)}, {"TrainRouterEntropyLow"}),
    "the router does not choose": (
        {step: {"router_entropy": 0.95} for step in range(200, LONG)},
        {"TrainRouterEntropyHigh"},
    ),
}


def recorded(changes: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a small run as jobs of the dry run look: a loss that falls from 8.3 with noise, a norm that settles."""
    chance, found = random.Random(17), []
    steps = LONG if max(changes, default=0) > STEPS else STEPS
    for step in range(1, steps + 1):
        row = {
            "loss": 3.2 + 5.1 * math.exp(-step / 60) + chance.gauss(0, 0.04),
            "grad_norm": 0.9 + 1.5 * math.exp(-step / 30) + chance.gauss(0, 0.08),
            "weight_norm": 40 + step / 50, "router_entropy": 0.6 + chance.gauss(0, 0.02),
            "attention_entropy_median": 0.45 + chance.gauss(0, 0.01), "data_wait_seconds": abs(chance.gauss(0, 0.01)),
            "tokens_per_second": 900 + chance.gauss(0, 40), "nonfinite": 0, "update_skipped": 0, "recovery_rung": 0,
        }  # fmt: skip
        evaluated = {"precision_at_k": 0.9 + chance.gauss(0, 0.02), "violations": 0.0} if step % EVALUATION == 0 else {}
        change = changes.get(step, {})
        found.append(row | evaluated | {name: value for name, value in change.items() if name in row | evaluated})
    return found


def served(run: Path, rows: list[dict[str, Any]], patch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What the exporter tells in each second, a row a second, as promtool writes series."""
    write_json(run / "checkpoints/train/job.json", {})
    write_json(run / "checkpoints/train/checkpoint-1/complete.json", {})
    for path in run.rglob("*.json"):
        os.utime(path, (0, 0))  # the job began when promtool's clock does
    writer, job = RowWriter(run / "telemetry/train", "run", 1, 0, 1), exporter.Job(run, "train")
    told: dict[str, list[str]] = {}
    for second, row in enumerate(rows):
        patch.setattr(time, "time", lambda second=second: float(second))
        writer.write(second + 1, **row)
        writer.flush()
        for family in job.collect():
            values = told.setdefault(family.name, ["_"] * second)
            values.append(str(family.samples[0].value).replace("nan", "NaN").replace("inf", "Inf"))
    return told


def complaint(place: Path, told: dict[str, list[str]], fired: set[str]) -> str:
    """Of promtool, where other alerts than `fired` did so at any time."""
    seconds = len(told["train_step"])
    (place / "rules.yml").write_text(rules.render(ALERTS, 1.0, float(EVALUATION)))
    series = [{"series": f'{name}{{run="run",job="train"}}', "values": " ".join(each)} for name, each in told.items()]
    seen = 'alertstate="firing",alertname!="Watchdog",seen="job"'
    query = f"group by (alertname) (last_over_time(ALERTS{{{seen}}}[{seconds + 60}s]))"
    wanted = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(fired)]
    test = {"interval": "1s", "input_series": series}
    test["promql_expr_test"] = [{"expr": query, "eval_time": f"{seconds - 1}s", "exp_samples": wanted}]
    case = {"rule_files": ["rules.yml"], "evaluation_interval": "1s", "tests": [test]}
    (place / "test.yml").write_text(yaml.safe_dump(case, width=10**9))
    done = subprocess.run(["promtool", "test", "rules", "test.yml"], cwd=place, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("name", EPISODES)
def test_both_call_the_same_alerts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, wanted = EPISODES[name]
    rows = recorded(changes)
    watch = Guard(ALERTS)
    fired = {alert["alert"] for row in rows for alert in watch.observe(row)}
    assert fired == wanted, "the guard"
    told = served(tmp_path / "run", rows, monkeypatch)
    assert not (said := complaint(tmp_path, told, fired)), f"Prometheus: {said[-1500:]}"


def test_every_alert_that_a_job_sees_has_an_episode_and_another_set_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {name for _, wanted in EPISODES.values() for name in wanted} == {
        watch.name for watch in Guard(ALERTS).alerts
    }
    told = served(tmp_path / "run", recorded(EPISODES["one bad gradient"][0]), monkeypatch)
    assert complaint(tmp_path, told, set()) and complaint(tmp_path, told, {"TrainNonFinite", "TrainLossSpike"})
