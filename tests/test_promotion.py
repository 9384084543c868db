"""What is promoted has passed its gate, and the registry tells the story."""

import math
import shutil
from pathlib import Path

import pytest

from stackpkg.runs import digest, read_json
from stackpkg.training import promotion


@pytest.mark.parametrize(
    ("comparison", "good", "bad"),
    [(">", 1.1, 1.0), (">=", 1.0, 0.9), ("<", 0.9, 1.0), ("<=", 1.0, 1.1), ("==", 1.0, 1.1)],
)
def test_the_gate_lets_only_measured_numbers_pass(comparison: str, good: float, bad: float) -> None:
    limits = {"loss": (comparison, 1.0)}
    assert promotion.gate({"loss": good}, limits) == []
    assert promotion.gate({"loss": bad}, limits) == [f"loss is {bad:g}, must be {comparison} 1"]
    # "NaN" is how a NaN stands in strict JSON, None what was not measured
    for value in (math.nan, "NaN", None):
        assert promotion.gate({"loss": value}, limits) == [f"loss is nan, must be {comparison} 1"]
    assert promotion.gate({"other": good}, limits) == [f"loss is nan, must be {comparison} 1"]


def test_the_gate_names_every_limit_that_was_missed() -> None:
    limits = {"loss": ("<", 2.0), "precision": (">=", 0.5), "entropy": (">=", 0.2)}
    assert promotion.gate({"loss": math.inf, "precision": 0.7}, limits) == [
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
    assert not promotion.promote(artifacts, candidate, "v0", {}, ["loss is 9, must be < 2"])
    assert not (artifacts / "v0").exists() and read_json(artifacts / "registry.json")["current"] is None

    sha = {}
    for version in ("v1", "v2", "v3"):
        (candidate / "config.json").write_text(version)
        assert promotion.promote(artifacts, candidate, version, {"loss": 1.0}, [])
        sha[version] = digest(candidate)
        assert digest(artifacts / version) == sha[version]
    assert not promotion.promote(artifacts, candidate, "v4", {}, ["no"])
    assert read_json(artifacts / "registry.json")["current"] == "v3"  # a refusal leaves the current one alone

    assert promotion.demote(artifacts, "loss rose in service") == "v2"
    assert promotion.demote(artifacts, "so does this one") == "v1"
    assert promotion.demote(artifacts, "and this one") is None
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
        promotion.promote(artifacts, candidate, version, {}, [])
    assert promotion.demote(artifacts, "looked bad") == "v1"
    for version in ("v2", "v3"):  # the alarm was false
        promotion.promote(artifacts, candidate, version, {}, [])
    assert promotion.demote(artifacts, "is bad") == "v2"
    assert promotion.demote(artifacts, "is bad too") == "v1"


def test_an_interrupted_copy_leaves_the_version_that_was_there(tmp_path: Path, candidate: Path, monkeypatch) -> None:
    artifacts = tmp_path / "artifacts"
    promotion.promote(artifacts, candidate, "v1", {}, [])
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
            promotion.promote(artifacts, candidate, version, {}, [])
    assert digest(artifacts / "v1") == first and not (artifacts / "v2").exists()
    assert len(read_json(artifacts / "registry.json")["history"]) == 1
    monkeypatch.undo()
    for version in ("v1", "v2"):  # what was left of the copy is in nobody's way
        assert promotion.promote(artifacts, candidate, version, {}, [])
        assert digest(artifacts / version) == digest(candidate)
    assert sorted(path.name for path in artifacts.iterdir()) == ["registry.json", "v1", "v2"]
