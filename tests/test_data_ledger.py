"""From a step to its documents and back: the two agree with each other and with the rows themselves."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from data_corpus import corpus, profile

from stackpkg import runs
from stackpkg.data import curriculum, provenance
from stackpkg.data.ledger import Ledger
from stackpkg.data.stream import Stream

STAGES = [
    {"steps": 9, "context": 64, "long_range": 0.25, "retrieval": 0.5},
    {"steps": 11, "context": 128, "long_range": 0.1, "preferences": 0.25},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a job that was told to skip data and to withdraw a record."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(corpus(), folder / "data")
    p = profile(curriculum=STAGES)
    victim = str(Stream(folder / "data", p).corpus.records[5])
    decisions = [{"kind": "skip", "step": 4, "steps": 2}, {"kind": "withdraw", "step": 10, "record_id": victim}]
    curriculum.record(folder / "checkpoints/main/decisions.jsonl", decisions)
    job = {"params": p.model_dump(mode="json"), "steps": 20}
    runs.write_json(
        folder / "checkpoints/main/job.json",
        job | {"data": {"manifest.json": runs.digest(folder / "data/manifest.json")}},
    )
    return folder


def test_a_step_tells_every_token_of_its_batch(run: Path) -> None:
    ledger = Ledger(run, "main")
    for step in range(20):
        batch, told = ledger.stream[step], ledger.step(step)
        numbers = ledger.stream.plan.rows_at(ledger.stream.plan.position(step))
        for k, i in enumerate(numbers):
            mine = [item for item in told if item["row"] == i and item["use"] in ("text", "filler", "withdrawn")]
            at = 0
            for item in mine:
                part = batch["input_ids"][k, at : at + item["tokens"]]
                if item["use"] == "text":
                    d = np.flatnonzero(ledger.stream.corpus.records == item["record_id"])
                    texts = [ledger.stream.corpus.read(int(n), 0, int(ledger.stream.corpus.tokens[n])) for n in d]
                    assert any(np.array_equal(part, text) for text in texts)
                if item["use"] == "withdrawn" and int(batch["domain"][k]) < len(ledger.stream.domains):
                    assert (part == ledger.stream.pad_id).all()
                at += item["tokens"]
            assert (batch["labels"][k, at:] < 0).all()
            pairs = [item for item in told if item["row"] == i and item["use"] == "pairs"]
            assert len([item for item in told if item["row"] == i and item["use"] == "negative"]) == 2 * len(pairs)
            assert len(pairs) == int(batch["pair_key"][k] >= 0)


def test_a_document_is_in_exactly_the_steps_that_tell_it(run: Path) -> None:
    ledger = Ledger(run, "main")
    expected: dict[str, set[tuple[int, str]]] = {}
    for step in range(20):
        for item in ledger.step(step):
            if item["use"] not in ("task", "withdrawn"):
                expected.setdefault(item["record_id"], set()).add((step, item["use"]))
    records = {str(record) for record in ledger.stream.corpus.records}
    assert {use for uses in expected.values() for _, use in uses} == {
        "text",
        "filler",
        "pairs",
        "preferences",
        "negative",
    }
    for record in records:
        found = {(item["step"], item["use"]) for item in ledger.document(record)}
        assert found == expected.get(record, set()), record


def test_skipped_data_was_in_no_step(run: Path) -> None:
    ledger = Ledger(run, "main")
    plan = ledger.stream.plan
    read = {i for step in range(20) for i in plan.rows_at(plan.position(step))}
    assert not read & {i for position in (4, 5) for i in plan.rows_at(position)}
    assert plan.position(19) == 21


def test_a_withdrawn_record_is_in_no_later_step(run: Path) -> None:
    ledger = Ledger(run, "main")
    (victim,) = ledger.stream.schedule.withdrawn
    assert all(item["step"] < 10 for item in ledger.document(victim))


def test_what_was_read_and_may_not_be_used_any_more_is_told(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    ledger = Ledger(copy, "main")
    records = [str(record) for record in ledger.stream.corpus.records]
    read = next(record for record in records if ledger.document(record))
    never = next(record for record in records if not ledger.document(record))
    assert not {read, never} & ledger.overdue(1_000).keys()
    for record in (read, never):
        provenance.withdraw(copy / "data/withdrawn.jsonl", record, 2_000, "asked to")
    assert read not in ledger.overdue(1_999)
    assert ledger.overdue(2_000).get(read) == "withdrawn" and never not in ledger.overdue(2_000)


@pytest.mark.parametrize(("step", "said"), [(-1, r"0\.\.19"), (20, r"0\.\.19")])
def test_a_step_outside_the_job_is_refused(run: Path, step: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Ledger(run, "main").step(step)


def test_another_job_or_another_corpus_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no training job 'other'; it has \['main'\]"):
        Ledger(run, "other")
    copy = shutil.copytree(run, tmp_path / "run")
    job = runs.read_json(copy / "checkpoints/main/job.json")
    runs.write_json(copy / "checkpoints/main/job.json", job | {"data": {"manifest.json": "0" * 64}})
    with pytest.raises(
        ValueError, match=r"main was trained on manifest\.json 0000000000000000, this is another: roll back"
    ):
        Ledger(copy, "main")
