"""Checkpoints are whole or not there, and those that are needed stay."""

from pathlib import Path

import pytest

from stackpkg.runs import digest, read_json, write_json
from stackpkg.training import snapshots


def checkpoint(home: Path, step: int, marked: bool = True) -> Path:
    folder = home / f"checkpoint-{step}"
    (folder / "dcp").mkdir(parents=True)
    (folder / "dcp/__0_0.distcp").write_bytes(bytes(range(256)) * 40 + bytes([step]))
    (folder / "state.pt").write_bytes(b"scalars of step %d" % step)
    if marked:
        snapshots.complete(folder, step)
    return folder


def truncate(folder: Path) -> None:
    data = folder / "dcp/__0_0.distcp"
    data.write_bytes(data.read_bytes()[:5_000])


def flip(folder: Path) -> None:
    data = bytearray((folder / "dcp/__0_0.distcp").read_bytes())
    data[4_321] ^= 1
    (folder / "dcp/__0_0.distcp").write_bytes(bytes(data))


def lose(folder: Path) -> None:
    (folder / "state.pt").unlink()


def unmark(folder: Path) -> None:
    (folder / snapshots.MARKER).unlink()


DAMAGE = {
    truncate: "checkpoint-30/dcp/__0_0.distcp: changed since it was saved",
    flip: "checkpoint-30/dcp/__0_0.distcp: changed since it was saved",
    lose: "checkpoint-30/state.pt: missing",
    unmark: "checkpoint-30: no complete.json; saving was interrupted",
}


def test_the_newest_whole_checkpoint_is_chosen_by_number(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert snapshots.problems(tmp_path / "checkpoint-9") == []
    assert snapshots.latest(tmp_path) == (tmp_path / "checkpoint-100", [])
    assert snapshots.latest(tmp_path / "nothing") == (None, [])


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_set_aside_and_an_older_one_chosen(tmp_path: Path, damage) -> None:
    for step in (10, 20, 30):
        checkpoint(tmp_path, step)
    damage(tmp_path / "checkpoint-30")
    left = digest(tmp_path / "checkpoint-30")
    assert snapshots.problems(tmp_path / "checkpoint-30") == [DAMAGE[damage]]
    assert snapshots.latest(tmp_path) == (tmp_path / "checkpoint-20", [DAMAGE[damage]])
    assert not (tmp_path / "checkpoint-30").exists()
    (aside,) = tmp_path.glob("checkpoint-30.damaged-*")
    assert digest(aside) == left  # evidence of what happened: nothing of it is deleted
    assert snapshots.latest(tmp_path) == (tmp_path / "checkpoint-20", [])  # and it is not looked at again


def test_nothing_whole_is_nothing(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10, marked=False)
    flip(checkpoint(tmp_path, 20))
    found, complaints = snapshots.latest(tmp_path)
    assert found is None and [line[:13] for line in complaints] == ["checkpoint-20", "checkpoint-10"]
    assert len(list(tmp_path.glob("*.damaged-*"))) == 2


def test_a_marker_counts_all_files_and_not_itself(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 7)
    marker = read_json(folder / snapshots.MARKER)
    assert marker["step"] == 7 and set(marker["files"]) == {"dcp/__0_0.distcp", "state.pt"}
    write_json(folder / "extra.json", {})  # a file that came later harms nobody
    assert snapshots.problems(folder) == []
