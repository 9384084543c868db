"""What an alert does to a real job: a snapshot, retrieval off until a calibration reaches its target. What stops one is
in `test_stop`."""

import json
from typing import Any

import test_training
from test_training import Job, history, profile, run

from stackpkg import params
from stackpkg.params import Params
from stackpkg.runs import RunFolder, read_json

lab = test_training.lab  # the same tiny run


def longer(p: Params, steps: int, **sections: dict[str, Any]) -> Params:
    """Its first stage alone, with other values in sections."""
    values = p.model_dump(mode="json")
    for section, changed in sections.items():
        values[section] |= changed
    return params.validate(values | {"curriculum": [values["curriculum"][0] | {"steps": steps}]})


def acted(lab: RunFolder, job: str, action: str) -> list[tuple[int, str]]:
    lines = (lab.path / f"telemetry/{job}.alerts.jsonl").read_text().splitlines()
    return [(each["step"], each["alert"]) for each in map(json.loads, lines) if each["action"] == action]


def test_a_spike_of_the_loss_is_kept_as_a_snapshot(lab: RunFolder) -> None:
    p = longer(profile(1), 14, snapshots={"every_steps": 14})
    hot = {"kind": "hot_rate", "step": 10, "factor": 1000.0}
    assert run(lab, spiked=Job(p, [hot], steps=14))["spiked"]["steps"] == 14
    told, alert = acted(lab, "spiked", "snapshot")[0]
    assert told > 10 and alert == "TrainLossSpike"
    home = lab.path / "checkpoints/spiked"
    saved = sorted(int(path.parent.name[11:]) for path in home.glob("checkpoint-*/complete.json"))
    assert saved == [told, 14] and not (home / "save").exists()


def test_retrieval_comes_back_when_a_calibration_reaches_the_target(lab: RunFolder) -> None:
    """Of eight documents found one is right: below the target, which those above some cosine reach."""
    below = {"k": 8, "pairs": 8, "min_precision_at_k": 0.13}
    p = longer(profile(1), 7, training={"epoch_steps": 1}, evaluation=below, retrieval={"sigma_range": [-1.0, 1.0]})
    run(lab, returning=Job(p, steps=7))
    reports = [read_json(lab.path / f"eval/returning/epoch_{epoch:03d}.json") for epoch in range(1, 8)]
    assert all(report["precision_at_k"] < 0.13 for report in reports)
    tried = [report["guard"].get("calibration", {}) for report in reports]
    assert [bool(each) for each in tried] == [False] * 3 + [True] + [False] * 2 + [True]
    assert tried[3]["precision"] >= 0.13 and reports[3]["guard"]["sigma_min"] == tried[3]["sigma_min"]
    assert acted(lab, "returning", "retrieval_off") == [(3, "TrainLowPrecisionAtK"), (6, "TrainLowPrecisionAtK")]
    read = history(lab, "returning").loss_reading.notna()
    assert read.tolist() == [True] * 3 + [False] + [True] * 2 + [False]
    home = lab.path / "checkpoints/returning"
    kept = [read_json(home / f"checkpoint-{step}/retriever.json") for step in (4, 6)]
    assert [each["on"] for each in kept] == [True, False]
    assert kept[0]["sigma_min"] == tried[3]["sigma_min"]
