"""Who holds a document, told from disk: checked against the steps that the stream itself gives out."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_corpus import conversing, profile
from typer.testing import CliRunner

from stackpkg import runs
from stackpkg.cli import app
from stackpkg.data import provenance
from stackpkg.data.corpus import Corpus
from stackpkg.data.ledger import Ledger
from stackpkg.governance import takedown


@pytest.fixture(scope="module")
def run(repository: Path) -> Path:
    folder = runs.RunFolder("held").path
    conversing(folder)
    data = {name: runs.digest(folder / "data" / name) for name in ("manifest.json",)}
    job = {"steps": 20, "params": profile().model_dump(mode="json"), "data": data}
    runs.write_json(folder / "checkpoints/train/job.json", job)
    for step in (5, 10):
        runs.write_json(folder / f"checkpoints/train/checkpoint-{step}/complete.json", {})
    runs.write_json(folder / "checkpoints/old/job.json", job | {"data": {"manifest.json": "0" * 64}})
    pq.write_table(pa.table({"removed": ["ab" * 8], "kept": ["cd" * 8]}), folder / "data/duplicates.parquet")
    return folder


def names(run: Path) -> list[str]:
    return [*provenance.named(run / "data", "folder:t")]


def test_a_whole_source_is_the_sum_of_its_documents(run: Path) -> None:
    told, ledger = takedown.holders(run, "folder:t"), Ledger(run, "train")
    assert len(told["records"]) == len({*ledger.stream.corpus.records.tolist()}) > 10
    each = {row["step"] for name in told["records"] for row in ledger.document(name)}
    assert told["jobs"]["train"]["steps"] == sorted(each)
    assert sum(told["shards"].values()) == len(ledger.stream.corpus.tokens)
    assert "old" in told["jobs"] and "roll back" in told["jobs"]["old"]["unknown"]


def test_the_snapshots_a_document_is_in_and_the_newest_that_is_without_it(run: Path) -> None:
    """Steps count from 0: checkpoint-5 has learned of 0 to 4, and version v2 is what checkpoint-10 was."""
    home, ledger = run / "checkpoints/train", Ledger(run, "train")
    first = {name: min((row["step"] for row in ledger.document(name)), default=99) for name in names(run)}
    runs.write_json(home / "promoted.json", {"10": "v2"})
    for least, most, held, without in (
        (0, 4, ["checkpoint-5", "checkpoint-10", "version v2"], ""),
        (5, 9, ["checkpoint-10", "version v2"], "checkpoint-5"),
        (10, 19, [], "checkpoint-10"),
    ):
        name = next(name for name, step in first.items() if least <= step <= most)
        job = takedown.holders(run, name)["jobs"]["train"]
        assert (job["snapshots"], job["newest_without"]) == (held, without), (name, first[name])
        told = "\n".join(takedown.lines(takedown.holders(run, name)))
        assert f"snapshots {', '.join(held) or 'none'}" in told and f"without it: {without or 'none'}" in told
    whole = takedown.holders(run, "folder:t")["jobs"]["train"]
    assert whole["snapshots"] == ["checkpoint-5", "checkpoint-10", "version v2"] and whole["newest_without"] == ""
    (home / "promoted.json").unlink()


def test_a_document_by_id_and_by_source_is_the_same(run: Path) -> None:
    name, where = next(iter(provenance.named(run / "data", "folder:t").items()))
    assert takedown.holders(run, name) == takedown.holders(run, where)
    told = takedown.holders(run, name)
    corpus = Corpus(run / "data")
    mine = np.flatnonzero(corpus.find([name]) == 0)
    assert told["shards"] == {corpus.names[k]: int((corpus.shard[mine] == k).sum()) for k in {*corpus.shard[mine]}}
    for column in takedown.SETS["pairs"][:1]:
        rows = pq.read_table(run / "data/pairs.parquet", columns=[column])[column].to_pylist().count(name)
        assert told["sets"]["pairs"] >= rows


def test_a_source_ends_where_a_name_ends(run: Path) -> None:
    with pytest.raises(ValueError, match="no record 'fold' in the corpus"):
        provenance.named(run / "data", "fold")
    one, whole = (provenance.named(run / "data", name) for name in ("folder:t/code1.py", "folder:t"))
    assert len(one) == 1 and one.items() < whole.items() and provenance.named(run / "data", "folder:t/") == whole
    assert provenance.named(run / "data", "folder:*") == whole


def test_a_removed_duplicate_names_the_one_that_stayed(run: Path) -> None:
    with pytest.raises(ValueError, match="dropped as a duplicate of cdcdcdcdcdcdcdcd"):
        takedown.holders(run, "ab" * 8)


def test_the_command_for_a_reader_and_for_a_script(run: Path) -> None:
    name = next(iter(provenance.named(run / "data", "folder:t")))
    shown = CliRunner().invoke(app, ["takedown", str(run), "--document", name])
    assert shown.exit_code == 0 and "shard " in shown.output and "job train: steps " in shown.output
    told = json.loads(CliRunner().invoke(app, ["takedown", str(run), "--document", "folder:t", "--json"]).output)
    assert name in told["records"] and told["withdrawn"] == []
    assert "no record" in CliRunner().invoke(app, ["takedown", str(run), "--document", "pypi:none"]).output


def test_a_version_of_a_job_that_moved_away_is_not_passed_over(run: Path) -> None:
    name = next(iter(provenance.named(run / "data", "folder:t")))
    for version in ("v1", "v2"):
        runs.write_text(run / f"artifacts/{version}/config.json", "{}")
    told = [{"event": "promoted", "version": version} for version in ("v1", "v2")]
    runs.write_json(run / "artifacts/registry.json", {"current": "v2", "history": told})
    runs.write_json(run / "checkpoints/train/promoted.json", {"10": "v2"})
    assert takedown.holders(run, name)["versions_unknown"] == ["v1"]
    assert "version v1: not known" in takedown.lines(takedown.holders(run, name))[-1]


def test_what_is_withdrawn_is_said(run: Path) -> None:
    name = next(iter(provenance.named(run / "data", "folder:t")))
    provenance.withdraw(run / "data/withdrawn.jsonl", name, 1, "asked")
    assert takedown.holders(run, name)["withdrawn"] == [name]


@pytest.mark.parametrize(("steps", "said"), [([], "none"), ([3], "3"), ([0, 1, 2, 7, 9, 10], "0-2, 7, 9-10")])
def test_numbers_as_spans(steps: list[int], said: str) -> None:
    assert takedown.spans(steps) == said
