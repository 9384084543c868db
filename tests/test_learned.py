"""No version that learned from what may not be used any more comes back into use."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from data_corpus import corpus, profile
from typer.testing import CliRunner

from stackpkg import runs
from stackpkg.cli import app
from stackpkg.data import curriculum, provenance
from stackpkg.data.ledger import Ledger
from stackpkg.training import promotion

STEPS = (5, 10, 15)  # of the checkpoints that v1, v2 and v3 were promoted from


@pytest.fixture
def run(repository: Path, tmp_path: Path) -> Path:
    """A run with a job of 20 steps, and three versions of it: what v1 learned from, the others did too."""
    folder = runs.RunFolder("back").path
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(corpus(), folder / "data")
    data = {"manifest.json": runs.digest(folder / "data/manifest.json")}
    job = {"steps": 20, "params": profile().model_dump(mode="json"), "data": data}
    runs.write_json(folder / "checkpoints/train/job.json", job)
    for number, step in enumerate(STEPS, 1):
        promote(folder, tmp_path, f"v{number}", step)
    return folder


def promote(run: Path, place: Path, version: str, step: int) -> None:
    runs.write_json(place / "model/config.json", {"hidden_size": 32, "_name_or_path": version})
    snapshot = run / f"checkpoints/train/checkpoint-{step}"
    runs.write_json(snapshot / "manifest.json", {"step": step, "data": "d"})
    assert promotion.promote(run / "artifacts", place / "model", version, {}, [], snapshot=snapshot)


def read_in(run: Path, least: int, most: int) -> tuple[str, int]:
    """A record that was first read in one of these steps, and the step."""
    ledger = Ledger(run, "train")
    for name in sorted({*map(str, ledger.stream.corpus.records)}):
        if (told := ledger.document(name)) and least <= told[0]["step"] < most:
            return name, told[0]["step"]
    raise AssertionError(f"no record was first read in steps {least} to {most}")


def withdraw(run: Path, record: str) -> None:
    provenance.withdraw(run / "data/withdrawn.jsonl", record, int(time.time()) - 1, "asked to")


def last(run: Path) -> dict[str, Any]:
    return promotion.registry(run / "artifacts")["history"][-1]


def typed(*words: object) -> str:
    return CliRunner().invoke(app, [str(word) for word in words]).output


def test_a_demotion_passes_over_versions_that_learned_from_what_was_withdrawn(run: Path) -> None:
    record, step = read_in(run, 5, 10)
    withdraw(run, record)
    said = typed("demote", run, "--reason", "DataWithdrawal")
    assert f"passed over: v2, record {record} is withdrawn, and v2 learned from it in step {step} of the job" in said
    assert "v3 is demoted; in use: v1" in said and promotion.registry(run / "artifacts")["current"] == "v1"
    assert list(last(run)["passed_over"]) == ["v2"]


def test_where_every_version_learned_from_it_none_is_in_use(run: Path) -> None:
    record, _ = read_in(run, 0, 5)
    withdraw(run, record)
    assert promotion.demote(run / "artifacts", "DataWithdrawal") is None
    assert list(last(run)["passed_over"]) == ["v1", "v2"]


def test_a_version_that_learned_from_it_is_not_reinstated(run: Path) -> None:
    record, step = read_in(run, 5, 10)
    assert promotion.demote(run / "artifacts", "slow") == "v2" and "passed_over" not in last(run)
    withdraw(run, record)
    said = typed("reinstate", run, "--version", "v3", "--reason", "it was the network")
    assert f"v3 can't be current: record {record} is withdrawn, and v3 learned from it in step {step}" in said
    assert "allowed: ['v1']" in said and promotion.registry(run / "artifacts")["current"] == "v2"
    assert "in use: v1" in typed("reinstate", run, "--version", "v1", "--reason", "the last without it")


def test_a_version_whose_data_is_past_its_time_is_not_reinstated(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    promotion.demote(run / "artifacts", "slow")
    late = time.time() + profile().data.ttl_seconds
    monkeypatch.setattr(promotion.time, "time", lambda: late)
    with pytest.raises(ValueError, match=r"record \w{16} is expired, and v3 learned from it in step"):
        promotion.roll_back(run / "artifacts", "v3", "it was the network")


def test_what_a_job_reads_after_it_was_rolled_back_hides_nothing_of_its_earlier_versions(
    run: Path, tmp_path: Path
) -> None:
    """It goes on without the record from step 2: v4 never saw it, v1 to v3 did."""
    record, _ = read_in(run, 3, 5)
    withdraw(run, record)
    decided = {"kind": "withdraw", "step": 2, "record_id": record}
    curriculum.record(run / "checkpoints/train/decisions.jsonl", [decided])
    assert Ledger(run, "train").document(record) == []
    promote(run, tmp_path, "v4", 15)
    promote(run, tmp_path, "v5", 20)
    assert promotion.demote(run / "artifacts", "slow") == "v4"
    assert promotion.demote(run / "artifacts", "slow as well") is None
    assert list(last(run)["passed_over"]) == ["v1", "v2", "v3"]


def test_a_version_of_a_job_that_made_way_may_hold_anything(run: Path) -> None:
    (run / "checkpoints/train/promoted.json").unlink()
    assert promotion.demote(run / "artifacts", "slow") == "v2", "nothing of the corpus is due"
    record, _ = read_in(run, 0, 20)
    withdraw(run, record)
    assert promotion.demote(run / "artifacts", "DataWithdrawal") is None
    assert last(run)["passed_over"]["v1"] == (
        f"record {record} is withdrawn, and whether v1 learned from it is not known: the job that it is of has made "
        "way for another"
    )
