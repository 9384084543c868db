"""Every fault of the table in the book, done to real jobs: how each goes on, that nothing is lost, how it ends."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from stackpkg.runs import read_json, write_json
from stackpkg.training import attempts, drills, hang, recovery
from stackpkg.training.drills import DRILLS, STEPS, TABLE


@pytest.fixture(scope="module")
def seen(repository: Path) -> dict[str, dict[str, Any]]:
    """All of them, two jobs at a time: minutes."""
    return {row["drill"]: row for row in drills.every()}


def test_there_are_enough_faults_and_the_book_has_each_as_expected() -> None:
    table = {row["drill"]: row for row in read_json(TABLE)["rows"]}
    assert len(DRILLS) >= 25 and list(table) == list(DRILLS)
    for name, drill in DRILLS.items():
        assert (tuple(table[name]["went"]), table[name]["same"]) == (drill.went, drill.same)


@pytest.mark.slow
@pytest.mark.parametrize("name", DRILLS)
def test_the_job_goes_on_as_it_should(seen: dict[str, dict[str, Any]], name: str) -> None:
    row, drill = seen[name], DRILLS[name]
    assert tuple(row["went"]) == drill.went, row["said"]
    assert row["rows_missing"] == 0, "a step has no row"
    assert row["same"] == drill.same, "other weights than those of an undisturbed job"
    if drill.went[-1:] == ("stop",):
        assert "the fault is in the weights, the code or the machine" in row["said"]
        return
    rungs = len({*drill.went} & {*recovery.RUNGS[1:]})  # each after so many bad steps, which are trained again too
    again = drills.EVERY * (row["attempts"] - 1) + (recovery.MAX_CONSECUTIVE_SKIPS - 1) * rungs
    again += name == "disk_full"  # that a save failed is agreed on after the row of the step behind it
    assert row["steps"] == STEPS and row["again"] <= again
    assert math.isfinite(row["loss_difference"]) and abs(row["loss_difference"]) < 0.1
    assert not drill.same or row["loss_difference"] == 0.0
    if name.endswith("ranks"):
        assert abs(row["loss_difference"]) < 1e-5


@pytest.mark.slow
def test_the_table_of_the_book_is_what_was_seen(seen: dict[str, dict[str, Any]]) -> None:
    table = {row["drill"]: row for row in read_json(TABLE)["rows"]}
    told = ("fault", "went", "processes", "attempts", "steps", "same")
    assert list(table) == list(DRILLS)
    assert {name: [row[key] for key in told] for name, row in table.items()} == {
        name: [row[key] for key in told] for name, row in seen.items()
    }


# --- a rank that hangs

STUCK = """Thread 0x1 [hang watch] (most recent call first):
  File "stackpkg/training/hang.py", line 71 in _look

Thread 0x2 [python] (most recent call first):
  File "{}", line 1 in something
  File "stackpkg/training/worker.py", line 1 in run
"""


def left(home: Path, rank: int, step: int, file: str) -> None:
    folder = home / hang.FOLDER
    folder.mkdir(exist_ok=True)
    (folder / f"rank{rank}.txt").write_text(STUCK.format(file))
    write_json(folder / f"rank{rank}.json", {"step": step, "silent": 7.0})


def test_the_rank_that_does_not_wait_is_the_one_that_hung(tmp_path: Path) -> None:
    assert hang.found(tmp_path, 3, 1) is None
    wait = "site-packages/torch/distributed/distributed_c10d.py"
    left(tmp_path, 0, 5, wait)
    left(tmp_path, 1, 5, "site-packages/torch/nn/functional.py")
    left(tmp_path, 2, 5, wait)
    assert hang.found(tmp_path, 3, 1) == {"ranks": [1], "step": 5, "stacks": "hang-1"}
    assert (tmp_path / "hang-1/rank1.txt").exists() and not (tmp_path / hang.FOLDER).exists()
    left(tmp_path, 0, 8, wait)
    left(tmp_path, 1, 8, wait)
    assert hang.found(tmp_path, 3, 2) == {"ranks": [2], "step": 8, "stacks": "hang-2"}, "it could not even tell"
    left(tmp_path, 0, 9, wait)
    assert hang.found(tmp_path, 1, 3) == {"ranks": [0], "step": 9, "stacks": "hang-3"}, "none stands out"


def test_a_forward_pass_is_a_beat_and_rest_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[int] = []

    def end(status: int) -> None:
        ends.append(status)
        raise SystemExit  # of the thread alone: it must not go on when `os._exit` is the real one again

    monkeypatch.setattr(hang.os, "_exit", end)
    monkeypatch.setattr(hang, "GRACE", 0.0)
    watch, model = hang.Watch(tmp_path, 3, 0.3 / 60), torch.nn.Linear(1, 1)
    watch.listen(model)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    begun = type("State", (), {"global_step": 4})()
    assert not hang.threading.Event().wait(0.6) and not ends, "it rests until training begins"
    watch.on_train_begin(arguments, begun, None)  # type: ignore[arg-type]
    for _ in range(12):
        hang.time.sleep(0.05)
        model(torch.ones(1))
    assert not ends, "a long evaluation is no hang"
    late = hang.time.monotonic() + 60
    while not ends and hang.time.monotonic() < late:
        hang.time.sleep(0.05)
    assert ends == [hang.STATUS]
    assert read_json(tmp_path / "hang/rank3.json")["step"] == 5
    stacks = (tmp_path / "hang/rank3.txt").read_text()
    assert "test_a_forward_pass_is_a_beat" in stacks and not hang.waits(stacks)


def test_attempts_tell_the_code_they_ran(tmp_path: Path) -> None:
    assert attempts.read(tmp_path) == []
    assert attempts.code() == attempts.code() and len(attempts.code()) == 16
