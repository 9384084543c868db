import hashlib
from pathlib import Path

import pytest
import yaml

from stackpkg import params, runs
from stackpkg.governance import checklist

ROOT = Path(__file__).parents[1]
P = params.validate({"run": "demo", "evaluation": {"min_precision_at_k": 0.5}})
ITEM = {
    "id": "V3",
    "workstream": "Validation",
    "text": "Evaluate.",
    "notebooks": ["40_evaluate"],
    "checks": [
        {
            "evidence": "40_evaluate",
            "value": "precision_at_k",
            "op": ">=",
            "limit": "params.evaluation.min_precision_at_k",
        }
    ],
    "files": ["eval/epoch_*.json"],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> runs.RunFolder:
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    define(tmp_path, ITEM)
    run = runs.RunFolder("demo")
    runs.write_json(run / "evidence/40_evaluate.json", {"precision_at_k": 0.6})
    runs.write_text(run / "eval/epoch_001.json", "{}")
    return run


def define(root: Path, *items: dict) -> None:
    runs.write_text(root / "params/checklist.yaml", yaml.safe_dump(list(items)))


def test_green_only_with_passing_checks_over_hashed_evidence(folder: runs.RunFolder) -> None:
    (item,) = checklist.evaluate(folder, P)
    assert item["status"] == "green" and item["reasons"] == []
    assert item["checks"][0]["seen"] == 0.6 and item["checks"][0]["limit"] == 0.5
    assert item["files"] == {
        "evidence/40_evaluate.json": runs.digest(folder / "evidence/40_evaluate.json"),
        "eval/epoch_001.json": runs.digest(folder / "eval/epoch_001.json"),
    }


@pytest.mark.parametrize("seen", [0.49, float("nan"), float("inf") * -1, None, "0.9", [0.9]])
def test_red_names_the_check_and_the_number_seen(folder: runs.RunFolder, seen: object) -> None:
    runs.write_json(folder / "evidence/40_evaluate.json", {"precision_at_k": seen})
    (item,) = checklist.evaluate(folder, P)
    assert item["status"] == "red"
    assert item["reasons"][0].startswith("40_evaluate: precision_at_k is ") and "must be >= 0.5" in item["reasons"][0]


def test_red_when_evidence_is_missing(folder: runs.RunFolder) -> None:
    (folder / "eval/epoch_001.json").unlink()
    (item,) = checklist.evaluate(folder, P)
    assert (item["status"], item["reasons"]) == ("red", ["eval/epoch_*.json: missing"])
    (folder / "evidence/40_evaluate.json").unlink()
    assert len(checklist.evaluate(folder, P)[0]["reasons"]) == 3


def test_pending_holds_at_amber_and_never_lifts_red(folder: runs.RunFolder, tmp_path: Path) -> None:
    define(tmp_path, ITEM | {"pending": "only on the smoke corpus"})
    assert checklist.evaluate(folder, P)[0]["status"] == "amber"
    runs.write_json(folder / "evidence/40_evaluate.json", {"precision_at_k": 0.1})
    (item,) = checklist.evaluate(folder, P)
    assert item["status"] == "red" and item["reasons"][-1] == "only on the smoke corpus"


@pytest.mark.parametrize(
    ("op", "limit", "status"),
    [(">", 0.6, "red"), (">", 0.59, "green"), ("<=", 0.6, "green"), ("<", 0.6, "red"), ("==", 0.6, "green")],
)
def test_each_comparison(folder: runs.RunFolder, tmp_path: Path, op: str, limit: float, status: str) -> None:
    define(tmp_path, ITEM | {"checks": [ITEM["checks"][0] | {"op": op, "limit": limit}]})
    assert checklist.evaluate(folder, P)[0]["status"] == status


def test_a_limit_can_be_another_number_of_the_same_evidence(folder: runs.RunFolder, tmp_path: Path) -> None:
    define(tmp_path, ITEM | {"checks": [ITEM["checks"][0] | {"limit": "before"}]})
    assert "must be >= None" in checklist.evaluate(folder, P)[0]["reasons"][0]
    for before, status in ((0.5, "green"), (0.7, "red")):
        runs.write_json(folder / "evidence/40_evaluate.json", {"precision_at_k": 0.6, "before": before})
        assert checklist.evaluate(folder, P)[0]["status"] == status


def test_written_and_read_back(folder: runs.RunFolder) -> None:
    assert checklist.read(folder.path) == []
    items = checklist.evaluate(folder, P)
    checklist.write(folder, items)
    assert checklist.read(folder.path) == items
    assert checklist.board(items).to_numpy().tolist() == [["V3", "green", "Evaluate.", ""]]


@pytest.mark.parametrize(
    "change", [{"checks": []}, {"check": []}, {"checks": [ITEM["checks"][0] | {"op": "!="}]}, {"text": None}]
)
def test_a_bad_definition_is_refused(folder: runs.RunFolder, tmp_path: Path, change: dict) -> None:
    define(tmp_path, ITEM | change)
    with pytest.raises(ValueError, match=next(iter(change))):
        checklist.definitions()


def test_the_wording_agreed_with_the_reviewers_is_kept() -> None:
    items = checklist.definitions()
    assert len(items) == len({item.id for item in items}) == 24
    wording = "\n".join(f"{item.workstream}: {item.text}" for item in items)
    assert hashlib.sha256(wording.encode()).hexdigest()[:16] == "d4d3c590c0e39df9"


def test_every_check_is_recorded_by_the_notebook_it_names() -> None:
    """A renamed number would make an item red for ever, or worse be forgotten."""
    for item in checklist.definitions():
        for check in item.checks:
            source = (ROOT / f"notebooks/{check.evidence}.ipynb").read_text(encoding="utf-8")
            names = [check.value, *([check.limit] if str(check.limit).isidentifier() else [])]
            unknown = [name for name in names if f"{name}=" not in source]
            assert not unknown, f"{item.id}: {check.evidence} records no {unknown}"


GOVERNED = {
    "cards": 6, "cards_invalid": 0, "sources": 9, "licences_unknown": 0, "crate_problems": 0, "requirements": 58,
    "requirements_outside": 15, "requirements_unanswered": 0, "records_scanned": 9, "records_compared": 8,
    "personal_per_million": 3.5, "personal_limit": 10.0, "privacy_decided": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, "green"),
        ({"licences_unknown": 1}, "red"),
        ({"cards_invalid": 1}, "red"),
        ({"crate_problems": 1}, "red"),
        ({"requirements_unanswered": 1}, "red"),
        ({"requirements_outside": 58}, "red"),
        ({"personal_per_million": 10.5}, "red"),
        ({"records_compared": 0}, "red"),
        ({"privacy_decided": 0}, "red"),
    ],
)
def test_governance_is_green_by_every_check_and_no_less(tmp_path: Path, change: dict, status: str) -> None:
    folder = runs.RunFolder.__new__(runs.RunFolder)
    folder.name, folder.path = "demo", tmp_path
    for name in ("governance/page.md", "data/corpus.jsonld", "ro-crate-metadata.json"):
        runs.write_text(folder / name, "{}")
    folder.record("60_archive_governance", **GOVERNED | change)
    (item,) = (item for item in checklist.evaluate(folder, P) if item["id"] == "E3")
    assert item["status"] == status, item["reasons"]


def test_every_limit_that_names_a_parameter_exists() -> None:
    folder = runs.RunFolder.__new__(runs.RunFolder)
    folder.name, folder.path = "none", ROOT / "tests/none"
    items = checklist.evaluate(folder, params.validate({}))
    assert {item["status"] for item in items} == {"red"}
