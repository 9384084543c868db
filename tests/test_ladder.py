"""The ladder in real jobs: what each rung mends, that nothing else changes, and what is said when nothing helps."""

import json
import math
import shutil
from typing import Any

import numpy as np
import pandas as pd
import pytest
import test_training
from safetensors.torch import load_file, save_file
from test_training import Job, compared, history, profile, run

from stackpkg.data import curriculum
from stackpkg.params import Params
from stackpkg.runs import RunFolder, read_json, write_json
from stackpkg.telemetry import rows
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
    """Weights, or a second moment, that one rank damaged once; data that always poisons; a number that bf16 can't
    hold."""
    hurt = {"kind": "nan_parameter", "step": 3, "rank": 1, "attempt": 1}
    frozen = {"kind": "inf_second_moment", "step": 3, "rank": 1, "attempt": 1}
    data = {"kind": "nan_gradient", "cursor": [step - 1 for step in BURST]}
    overflow = {"kind": "overflow", "step": list(range(4, 13))}
    pairs = {"hurt": Job(patient(processes=2), [hurt], 12), "frozen": Job(patient(processes=2), [frozen], 12)}
    return run(lab, **pairs) | run(
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


def test_no_snapshot_holds_a_moment_that_is_infinite(lab: RunFolder, clean, mended) -> None:
    """It froze a weight in step 3, and nothing that a row measures tells of it: the snapshot of step 4 is not taken."""
    assert climbed(lab, "frozen") == [("roll_back", 3, 4)]
    attempts = read_json(lab.path / "checkpoints/frozen/attempts.json")
    assert [attempt["resumed_from"] for attempt in attempts] == [None, "checkpoint-2"]
    assert mended["frozen"]["weights_sha256"] == clean["weights_sha256"]
    pd.testing.assert_frame_equal(compared(history(lab, "frozen")), compared(history(lab, "calm")), check_exact=True)
    table = rows.read(lab.path / "telemetry/frozen")
    broken = rows.effective(table[table.attempt == 1]).query("step == 4")
    assert broken.recovery_rung.tolist() == [2, 2] and broken.nonfinite.tolist() == [1, 1]
    assert broken.loss.notna().all() and broken.weight_norm.notna().all()


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


def alerts(lab: RunFolder, name: str) -> list[tuple[int, str, float]]:
    lines = (lab.path / f"telemetry/{name}.alerts.jsonl").read_text().splitlines()
    return [(each["step"], each["alert"], each["value"]) for each in map(json.loads, lines)]


def test_what_nothing_mends_ends_with_a_diagnosis(lab: RunFolder) -> None:
    p, home = patient(), lab.path / "checkpoints/hopeless"
    with pytest.raises(RuntimeError, match="again after roll_back, skip_data: the fault is in the weights"):
        launch.launch("hopeless", p, lab, steps=12, faults=[{"kind": "nan_gradient", "step": BURST}], quiet=True)
    assert read_json(home / "diagnosis.json")["tried"] == ["roll_back", "skip_data"]
    assert (home / "checkpoint-2").exists() and not (home / "done.json").exists()
    assert alerts(lab, "hopeless")[-1] == (7, "TrainRolledBack", 5)
    last = rows.read(lab.path / "telemetry/hopeless").iloc[-1]
    assert (last.attempt, last.step, last.recovery_rung, last.nonfinite, last.update_skipped) == (3, 7, 5, 1, 1)
    assert math.isnan(last.grad_norm) and 0 < last.loss < 10 and last.loss_language_modelling > 0
    assert sum(last.batch_tokens) > 0, "which documents were in it"


def test_weights_that_nothing_mends_are_told_of_with_what_was_measured_beside_them(lab: RunFolder) -> None:
    with pytest.raises(RuntimeError, match="again after roll_back, skip_data"):
        launch.launch("rotten", patient(), lab, steps=12, faults=[{"kind": "inf_parameter", "step": 3}], quiet=True)
    table = rows.read(lab.path / "telemetry/rotten")
    broken = table[table.step == 3]
    assert broken.recovery_rung.tolist() == [2, 3, 5] and broken.nonfinite.tolist() == [1, 1, 1]
    assert np.isinf(broken.weight_norm).all() and (broken[["loss", "grad_norm"]] < 100).all(axis=None)
    assert alerts(lab, "rotten")[-2:] == [(3, "TrainNonFinite", 1), (3, "TrainRolledBack", 5)]


def test_the_end_of_the_ladder_is_in_the_logbook(lab: RunFolder, clean: dict[str, Any]) -> None:
    """Weights that came broken: no attempt has a row before the one that breaks it off."""
    home = lab.path / "checkpoints/stillborn"
    shutil.copytree(lab.path / "checkpoints/calm/initial", home / "initial")
    weights = load_file(home / "initial/model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, home / "initial/model.safetensors", {"format": "pt"})
    write_json(home / "job.json", launch.describe("stillborn", patient(), lab, 12, ()))
    with pytest.raises(RuntimeError, match="from step 1 to 1, and again after roll_back, skip_data"):
        launch.launch("stillborn", patient(), lab, steps=12, quiet=True)
    assert [name for _, name, _ in alerts(lab, "stillborn")] == ["TrainNonFinite", "TrainRolledBack"]
    told = (lab.path / "logbook.md").read_text()
    assert "TrainRolledBack (critical)" in told and "in step 1 of stillborn, attempt 3" in told
