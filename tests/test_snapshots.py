"""Checkpoints are whole or not there; what is promoted has passed its gate, and the registry tells the story."""

import math
import shutil
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


@pytest.mark.parametrize(
    ("comparison", "good", "bad"),
    [(">", 1.1, 1.0), (">=", 1.0, 0.9), ("<", 0.9, 1.0), ("<=", 1.0, 1.1), ("==", 1.0, 1.1)],
)
def test_the_gate_lets_only_measured_numbers_pass(comparison: str, good: float, bad: float) -> None:
    limits = {"loss": (comparison, 1.0)}
    assert snapshots.gate({"loss": good}, limits) == []
    assert snapshots.gate({"loss": bad}, limits) == [f"loss is {bad:g}, must be {comparison} 1"]
    # "NaN" is how a NaN stands in strict JSON, None what was not measured
    for value in (math.nan, "NaN", None):
        assert snapshots.gate({"loss": value}, limits) == [f"loss is nan, must be {comparison} 1"]
    assert snapshots.gate({"other": good}, limits) == [f"loss is nan, must be {comparison} 1"]


def test_the_gate_names_every_limit_that_was_missed() -> None:
    limits = {"loss": ("<", 2.0), "precision": (">=", 0.5), "entropy": (">=", 0.2)}
    assert snapshots.gate({"loss": math.inf, "precision": 0.7}, limits) == [
        "loss is inf, must be < 2",
        "entropy is nan, must be >= 0.2",
    ]


@pytest.fixture
def candidate(tmp_path: Path) -> Path:
    folder = tmp_path / "final"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    (folder / "config.json").write_text("{}")
    return folder


def test_promotions_refusals_and_demotions_are_entered(tmp_path: Path, candidate: Path) -> None:
    artifacts = tmp_path / "artifacts"
    assert not snapshots.promote(artifacts, candidate, "v0", {}, ["loss is 9, must be < 2"])
    assert not (artifacts / "v0").exists() and read_json(artifacts / "registry.json")["current"] is None

    sha = {}
    for version in ("v1", "v2", "v3"):
        (candidate / "config.json").write_text(version)
        assert snapshots.promote(artifacts, candidate, version, {"loss": 1.0}, [])
        sha[version] = digest(candidate)
        assert digest(artifacts / version) == sha[version]
    assert not snapshots.promote(artifacts, candidate, "v4", {}, ["no"])
    assert read_json(artifacts / "registry.json")["current"] == "v3"  # a refusal leaves the current one alone

    assert snapshots.demote(artifacts, "loss rose in service") == "v2"
    assert snapshots.demote(artifacts, "so does this one") == "v1"
    assert snapshots.demote(artifacts, "and this one") is None
    registry = read_json(artifacts / "registry.json")
    assert registry["current"] is None and (artifacts / "v3").exists()
    told = [(entry["event"], entry["version"]) for entry in registry["history"]]
    assert told == [
        ("refused", "v0"), ("promoted", "v1"), ("promoted", "v2"), ("promoted", "v3"), ("refused", "v4"),
        ("demoted", "v3"), ("demoted", "v2"), ("demoted", "v1"),
    ]  # fmt: skip
    assert registry["history"][0]["missed"] == ["loss is 9, must be < 2"]
    assert [entry.get("sha256") for entry in registry["history"][1:4]] == list(sha.values())
    assert registry["history"][5]["reason"] == "loss rose in service"


def test_a_version_that_comes_back_can_be_returned_to(tmp_path: Path, candidate: Path) -> None:
    artifacts = tmp_path / "artifacts"
    for version in ("v1", "v2"):
        snapshots.promote(artifacts, candidate, version, {}, [])
    assert snapshots.demote(artifacts, "looked bad") == "v1"
    for version in ("v2", "v3"):  # the alarm was false
        snapshots.promote(artifacts, candidate, version, {}, [])
    assert snapshots.demote(artifacts, "is bad") == "v2"
    assert snapshots.demote(artifacts, "is bad too") == "v1"


def test_an_interrupted_copy_leaves_the_version_that_was_there(tmp_path: Path, candidate: Path, monkeypatch) -> None:
    artifacts = tmp_path / "artifacts"
    snapshots.promote(artifacts, candidate, "v1", {}, [])
    first = digest(artifacts / "v1")
    (candidate / "config.json").write_text("newer")

    def full(source: str, target: str, **_: object) -> None:
        if target.endswith(".safetensors"):
            raise OSError(28, "No space left on device")
        shutil.copyfile(source, target)

    copytree = shutil.copytree
    monkeypatch.setattr(shutil, "copytree", lambda *given: copytree(*given, copy_function=full))
    for version in ("v1", "v2"):
        with pytest.raises((OSError, shutil.Error)):
            snapshots.promote(artifacts, candidate, version, {}, [])
    assert digest(artifacts / "v1") == first and not (artifacts / "v2").exists()
    assert len(read_json(artifacts / "registry.json")["history"]) == 1
    monkeypatch.undo()
    for version in ("v1", "v2"):  # what was left of the copy is in nobody's way
        assert snapshots.promote(artifacts, candidate, version, {}, [])
        assert digest(artifacts / version) == digest(candidate)
    assert sorted(path.name for path in artifacts.iterdir()) == ["registry.json", "v1", "v2"]


def test_a_marker_counts_all_files_and_not_itself(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 7)
    marker = read_json(folder / snapshots.MARKER)
    assert marker["step"] == 7 and set(marker["files"]) == {"dcp/__0_0.distcp", "state.pt"}
    write_json(folder / "extra.json", {})  # a file that came later harms nobody
    assert snapshots.problems(folder) == []
