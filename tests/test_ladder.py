"""The ladder in real jobs: what each rung mends, that nothing else changes, and what is said when nothing helps."""

import json
from typing import Any

import pandas as pd
import pytest
import test_training
from test_training import Job, compared, history, profile, run

from stackpkg.data import curriculum
from stackpkg.params import Params
from stackpkg.runs import RunFolder, read_json
from stackpkg.training import launch, recovery

lab = test_training.lab  # the same tiny run
BURST = [4, 5, 6, 7]  # steps, from 1: as many as make a rung


def patient(precision: str = "fp32", processes: int = 1) -> Params:
    p = profile(processes)
    stages = [stage.model_copy(update={"steps": steps}) for stage, steps in zip(p.curriculum, (8, 4), strict=True)]
    size = p.training.model_copy(update={"precision": precision})
    return p.model_copy(update={"curriculum": stages, "training": size})


@pytest.fixture(scope="module")
def clean(lab: RunFolder) -> dict[str, Any]:
    return run(lab, calm=Job(patient(processes=2), steps=12))["calm"]


@pytest.fixture(scope="module")
def mended(lab: RunFolder, clean: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Weights that one rank damaged once; data that always poisons; a number that bf16 can't hold."""
    hurt = {"kind": "nan_parameter", "step": 3, "rank": 1, "attempt": 1}
    data = {"kind": "nan_gradient", "cursor": [step - 1 for step in BURST]}
    overflow = {"kind": "inf_gradient", "precision": "bf16", "step": list(range(4, 13))}
    return run(lab, hurt=Job(patient(processes=2), [hurt], steps=12)) | run(
        lab, poisoned=Job(patient(), [data], steps=12), overflowing=Job(patient("bf16"), [overflow], steps=12)
    )


def climbed(lab: RunFolder, name: str) -> list[tuple[str, int, int]]:
    return [(e["rung"], e["first"], e["last"]) for e in recovery.history(lab.path / "checkpoints" / name)]


def test_damaged_weights_are_rolled_back_and_end_as_if_nothing_had_happened(lab: RunFolder, clean, mended) -> None:
    assert climbed(lab, "hurt") == [("roll_back", 3, 3)] and mended["hurt"]["attempts"] == 2
    attempts = read_json(lab.path / "checkpoints/hurt/attempts.json")
    assert [attempt["resumed_from"] for attempt in attempts] == [None, "checkpoint-2"]
    assert mended["hurt"]["weights_sha256"] == clean["weights_sha256"]
    pd.testing.assert_frame_equal(compared(history(lab, "hurt")), compared(history(lab, "calm")), check_exact=True)
    assert history(lab, "hurt").recovery_rung.tolist() == [0, 0] + [2] * 10
    alerts = [json.loads(line) for line in (lab.path / "telemetry/hurt.alerts.jsonl").read_text().splitlines()]
    assert [a["step"] for a in alerts if a["alert"] == "TrainRolledBack"] == [3]


def test_poisonous_data_is_passed_over(lab: RunFolder, mended) -> None:
    assert climbed(lab, "poisoned") == [("roll_back", 4, 7), ("skip_data", 4, 7)]
    made = curriculum.decisions(lab.path / "checkpoints/poisoned/decisions.jsonl")
    assert {"kind": "skip", "step": 3, "steps": 4} in made
    table = history(lab, "poisoned")
    assert table.cursor.tolist() == [1, 2, *range(7, 17)], "where the next step reads"
    assert table.update_skipped.sum() == 0
    assert mended["poisoned"]["steps"] == 12 and mended["poisoned"]["skipped_updates"] == 0


def test_what_bf16_cannot_hold_is_trained_in_fp32(lab: RunFolder, mended) -> None:
    assert climbed(lab, "overflowing") == [("roll_back", 4, 7), ("skip_data", 4, 7), ("fp32", 4, 7)]
    assert mended["overflowing"]["steps"] == 12 and history(lab, "overflowing").loss.notna().all()
    assert history(lab, "overflowing").recovery_rung.tolist()[-1] == 4


def test_what_nothing_mends_ends_with_a_diagnosis(lab: RunFolder) -> None:
    p, home = patient(), lab.path / "checkpoints/hopeless"
    with pytest.raises(RuntimeError, match="again after roll_back, skip_data: the fault is in the weights"):
        launch.launch("hopeless", p, lab, steps=12, faults=[{"kind": "nan_gradient", "step": BURST}], quiet=True)
    assert read_json(home / "diagnosis.json")["tried"] == ["roll_back", "skip_data"]
    assert (home / "checkpoint-2").exists() and not (home / "done.json").exists()
