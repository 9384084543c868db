"""Asking a run in SQL: the one definition of what counts, and nothing that could be written or reached besides."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_corpus import corpus, documents
from hypothesis import given
from hypothesis import strategies as st

from stackpkg import runs
from stackpkg.telemetry import page, privacy, rows, store
from stackpkg.telemetry.rows import RowWriter


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two ranks; steps 4 and 5 were done twice, the second time by one rank alone."""
    run, home = tmp_path / "demo", tmp_path / "demo/checkpoints/train"
    for attempt, ranks, steps in ((1, 2, range(1, 6)), (2, 1, range(4, 8))):
        for rank in range(ranks):
            writer = RowWriter(run / "telemetry/train", "demo", attempt, rank, ranks)
            for step in steps:
                loss = math.nan if (attempt, step) == (1, 5) else 10.0 * attempt + step
                batch = {"batch_shards": ["aa", "bb"], "batch_offsets": [10 * step, 0], "batch_tokens": [8, step]}
                writer.write(step, loss=loss, **(batch if step != 3 else {name: [] for name in batch}))
            writer.flush()
    runs.write_json(home / "job.json", {"params": {}})
    first = {"at": "2026-11-29T08:00:00+00:00", "resumed_from": None, "record": {"seed": 17}}
    runs.write_json(home / "attempts.json", [first, {"at": "later", "resumed_from": "checkpoint-3"}])
    runs.write_text(home / "ladder.jsonl", '{"rung": "roll_back", "first": 4, "last": 5, "at": "now"}\n{"torn')
    runs.write_json(home / "checkpoint-3/complete.json", {})
    privacy.append(run / "telemetry/train.alerts.jsonl", [{"step": 5, "attempt": 1, "alert": "TrainNonFinite"}])
    runs.write_json(
        run / "eval/train/epoch_001.json", {"epoch": 1, "validation_loss": "NaN", "router": [{"usage": [1]}]}
    )
    return run


@pytest.mark.parametrize("compacted", [False, True])
def test_the_tables_of_a_job(run: Path, compacted: bool) -> None:
    if compacted:
        rows.compact(run / "telemetry/train")
    columns, found = store.ask(run, "train", "SELECT step, attempt, rank, loss FROM effective ORDER BY step, rank")
    assert columns == ["step", "attempt", "rank", "loss"]
    expected = [(s, 1, r, 10.0 + s) for s in range(1, 4) for r in (0, 1)] + [(s, 2, 0, 20.0 + s) for s in range(4, 8)]
    assert found == expected
    assert store.ask(run, "train", "SELECT count(*) FROM rows WHERE isnan(loss)")[1] == [(2,)]
    first = "SELECT min(step) FROM batches WHERE shard = 'aa' AND first_token + tokens > 40"
    assert store.ask(run, "train", first)[1] == [(4,)]
    kinds = store.ask(run, "train", "SELECT kind, step FROM events")[1]
    assert kinds == [("attempt", 0), ("attempt", 3), ("checkpoint", 3), ("rung", 5), ("alert", 5)]
    good = f"SELECT max(step) FROM events WHERE kind = 'checkpoint' AND step < ({first})"
    assert store.ask(run, "train", good)[1] == [(3,)]
    begun = "SELECT happened, attempt FROM events WHERE kind = 'attempt' ORDER BY attempt"
    assert store.ask(run, "train", begun)[1] == [("2026-11-29T08:00:00+00:00", 1), ("later", 2)]
    said = store.ask(run, "train", "SELECT said FROM events WHERE kind = 'alert'")[1]
    assert json.loads(said[0][0]) == {"alert": "TrainNonFinite"}
    assert store.ask(run, "train", "SELECT validation_loss, router[1].usage FROM evaluations")[1] == [("NaN", [1])]


def test_a_compacted_file_that_the_job_went_past_is_not_read(run: Path) -> None:
    path = rows.compact(run / "telemetry/train")
    os.utime(path, (1, 1))
    shutil.rmtree(run / "eval")
    writer = RowWriter(run / "telemetry/train", "demo", 3, 0, 1)
    writer.write(8)
    writer.flush()
    assert store.ask(run, "train", "SELECT max(step) FROM rows")[1] == [(8,)]


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("DROP VIEW rows", "give one SELECT"),
        ("COPY (SELECT 1) TO 'x.csv'", "give one SELECT"),
        ("SELECT 1; SELECT 2", "give one SELECT"),
        ("", "give one SELECT"),
        ("SET enable_external_access = true", "give one SELECT"),
        ("SELECT * FROM read_text('/etc/hostname')", "Permission Error"),
        ("SELECT * FROM read_csv('*.csv')", "Permission Error"),
        ("SELECT * FROM 'https://example.org/x.parquet'", "rror"),
        ("SELECT lss FROM rows", 'Candidate bindings: "loss"'),
        ("SELECT * FROM row", "events       what befell the job"),
        ("SELEC 1", "syntax error"),
    ],
)
def test_what_is_no_question_is_refused_and_told_why(run: Path, sql: str, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        store.ask(run, "train", sql)
    assert expected in str(caught.value), str(caught.value)


def test_a_job_without_rows_says_so(run: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no telemetry rows in other/"):
        store.ask(run, "other", "SELECT 1")


@pytest.mark.parametrize("hashed", [False, True])
def test_documents_tell_their_sources_or_their_hashes(run: Path, hashed: bool) -> None:
    shutil.copytree(corpus(), run / "data")
    runs.write_json(run / "checkpoints/train/job.json", {"params": {"telemetry": {"hash_sources": hashed}}})
    _, found = store.ask(run, "train", "SELECT source, record_id, sum(tokens) FROM documents GROUP BY ALL")
    told = {source for source, *_ in found}
    known = {document["source"]: document["record_id"] for document in documents()}
    if not hashed:
        assert told <= set(known) and all(known[source] == record for source, record, _ in found)
        return
    assert told <= {privacy.hashed(source, run) for source in known} and len(told) == len(found) > 20
    assert not told & set(known) and not {record for _, record, _ in found} & set(known.values())
    other = run.rename(run.with_name("another"))
    assert privacy.hashed("x", other) != privacy.hashed("x", run), "a salt of its own"
    assert (run.parent / ".salts/demo").stat().st_mode & 0o077 == 0


written = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 1), st.integers(1, 5)), min_size=1, max_size=25)


@given(written)
def test_one_history_counts_wherever_it_is_asked_for(keys: list[tuple[int, int, int]]) -> None:
    """The SQL view, the table of pandas and the live page, against a definition in words."""
    with runs.tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "telemetry/train"
        writers: dict[tuple[int, int], RowWriter] = {}
        for number, (attempt, rank, step) in enumerate(sorted(keys, key=lambda key: key[0])):
            key = attempt, rank
            writers[key] = writers.get(key) or RowWriter(folder, "demo", attempt, rank, 2)
            writers[key].write(step, number=number)
            writers[key].flush()
        table = rows.read(folder)
        latest = {step: max(a for a, _, s in keys if s == step) for _, _, step in keys}
        expected = {}
        for row in table.sort_values("number").itertuples():
            if row.attempt == latest[row.step]:
                expected[row.step, row.rank] = row.number
        kept = rows.effective(table)
        assert {(r.step, r.rank): r.number for r in kept.itertuples()} == expected and len(kept) == len(expected)
        asked = store.ask(Path(place), "train", "SELECT step, rank, number FROM effective")[1]
        assert {(step, rank): number for step, rank, number in asked} == expected and len(asked) == len(expected)
        live = page.Followed(Path(place), "train")
        live.read()
        mine = {step: number for (step, rank), number in expected.items() if rank == 0}
        own = {s: max(a for a, r, s2 in keys if s2 == s and r == 0) for _, r, s in keys if r == 0}
        for step, row in live.history.items():
            assert row["attempt"] == own[step]
            assert step not in mine or row["number"] == mine[step]
        assert np.isfinite(list(mine.values())).all()
