"""A byte of a shard flips under a real job of two processes: what finds it, what it touched, and both ways back."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from stackpkg import sharddrill
from stackpkg.data import manifest
from stackpkg.runs import RunFolder
from stackpkg.sharddrill import EVERY, FLIPS, READ
from stackpkg.training import drills, snapshots

pytestmark = pytest.mark.slow
P = sharddrill.profile()


@pytest.fixture(scope="module")
def hurt(repository: Path) -> tuple[RunFolder, dict[str, Any]]:
    """The run as the damage left it: one attempt, ended."""
    folder = RunFolder("hurt")
    return folder, sharddrill.damage(folder, P)


@pytest.fixture(scope="module")
def rebuilt(hurt: tuple[RunFolder, dict[str, Any]]) -> tuple[RunFolder, dict[str, Any]]:
    copy = RunFolder("rebuilt")
    shutil.copytree(hurt[0].path, copy.path, dirs_exist_ok=True)
    return copy, sharddrill.recover(copy, P, hurt[1])


def test_the_job_ends_before_it_saves_what_the_damage_taught_it(hurt: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, found = hurt
    assert found["shard"] in found["said"] and "corrupt" in found["said"], found["said"]
    assert max(snapshots.listed(folder.path / "checkpoints/job")) == FLIPS - 1, "a snapshot of a damaged corpus"
    assert found["exported"] == 1, "the series of the alert does not tell"
    assert manifest.damaged(folder.path / "data", found["shard"]) == [found["block"]]
    assert found["detect_seconds"] > 0


def test_made_again_the_query_is_exact_and_the_sound_steps_come_out_the_same(
    rebuilt: tuple[RunFolder, dict[str, Any]],
) -> None:
    folder, found = rebuilt
    assert found["again"] == "" and found["mended"] == "made again" and found["rows_missing"] == 0
    assert [path.name for path in (folder.path / "data/quarantine").iterdir()] == [found["quarantined"]]
    assert manifest.verify(folder.path / "data") == []
    # one byte, one token, in the text that step READ is the first to read
    assert (found["blocks"], found["tokens"], found["first_step"]) == ([found["block"]], 1, READ - 1)
    assert found["good"] == f"checkpoint-{FLIPS - 1}" and found["resumed_from"] == [None, found["good"]]
    loss = {each["step"]: each["loss"] for each in found["overlap"]}
    assert min(loss) == FLIPS and all(old == new for step, (old, new) in loss.items() if step < READ)
    assert READ not in loss or loss[READ][0] != loss[READ][1], "what was damaged was learned from, and is no more"
    assert found["recover_seconds"] > found["detect_seconds"]


def test_the_seal_covers_both_attempts(rebuilt: tuple[RunFolder, dict[str, Any]]) -> None:
    found = sharddrill.sealed(rebuilt[0], P)
    rows = "telemetry/job/rank-00000.jsonl"
    assert found["problems"] == [] and found["named"] == {"1": [rows], "2": [rows]}


def test_passed_over_instead_the_job_goes_back_further_and_reads_nothing_of_it(
    hurt: tuple[RunFolder, dict[str, Any]],
) -> None:
    """Without the right bytes only the block is known, which earlier steps read other documents of."""
    copy = RunFolder("skipped")
    shutil.copytree(hurt[0].path, copy.path, dirs_exist_ok=True)
    found = sharddrill.recover(copy, P, hurt[1], skip=True)
    assert found["again"] == "" and found["mended"] == "passed over" and found["rows_missing"] == 0
    assert not (copy.path / f"data/shards/{found['shard']}.bin").exists(), "it is read by nobody"
    assert found["tokens"] == 0 and found["first_step"] < READ - 1
    back = found["first_step"] // EVERY * EVERY
    assert found["good"] == (f"checkpoint-{back}" if back else None)
    assert len(found["aside"]) == (FLIPS - 1 - back) // EVERY
    assert {each["step"] for each in found["overlap"]} >= {*range(back + 1, FLIPS + 1)}
    assert found["resumed_from"] == [None, found["good"]] and max(snapshots.listed(copy.path / "checkpoints/job")) == (
        drills.STEPS
    )
