"""Rows as the trainer gets them: pure, packed, labelled where something is to be learnt, without what is withdrawn."""

import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_corpus import corpus, profile

from stackpkg.data import provenance, tokenizer
from stackpkg.data.stream import IGNORE, Stream

Row = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def stream() -> Stream:
    return Stream(corpus(), profile())


def equal(a: Row, b: Row) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def rows_of(stream: Stream) -> list[Row]:
    return [row(stream, i) for i in range(len(stream.plan))]


def row(stream: Stream, i: int) -> Row:
    return {name: value[0] for name, value in stream.batch([i]).items()}


def test_rows_have_the_promised_shapes_and_types(stream: Stream) -> None:
    for step, rows, length in ((0, 16, 64), (19, 8, 128)):
        batch = stream[step]
        shapes = {name: value.shape for name, value in batch.items()}
        assert shapes == {
            "input_ids": (rows, length), "labels": (rows, length), "position_ids": (rows, length),
            "answer_mask": (rows, length), "domain": (rows,), "query_ids": (rows, 8), "positive_ids": (rows, 16),
            "negative_ids": (rows, 2, 16), "pair_key": (rows,),
        }  # fmt: skip
        assert {value.dtype for name, value in batch.items() if name != "answer_mask"} == {np.dtype(np.int64)}
        assert batch["answer_mask"].dtype == bool and batch["input_ids"].max() < stream.vocab_size
    assert len(stream) == 20
    with pytest.raises(IndexError):
        stream[20]


def test_a_row_is_the_same_from_any_object_in_any_order(stream: Stream) -> None:
    rows, order = rows_of(stream), list(range(len(stream.plan)))
    random.Random(1).shuffle(order)
    fresh = Stream(corpus(), profile())
    assert all(equal(row(fresh, i), rows[i]) for i in order)
    assert equal(row(pickle.loads(pickle.dumps(stream)), 7), rows[7])


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_slices_of_the_ranks_make_the_same_batch(stream: Stream, ranks: int) -> None:
    for step in (0, 10, 19):
        numbers = stream.plan.rows_at(step)
        share = len(numbers) // ranks
        each = [numbers[rank * share : (rank + 1) * share] for rank in range(ranks)]
        parts = [Stream(corpus(), profile()).batch(part)["input_ids"] for part in each]
        assert np.array_equal(stream[step]["input_ids"], np.concatenate(parts))


def test_a_packed_row_is_its_documents_and_nothing_is_learnt_across_their_boundary(stream: Stream) -> None:
    for i, row in enumerate(rows_of(stream)):
        if int(row["domain"]) == len(stream.domains):
            continue
        at = 0
        for d, _, count in stream.schedule.pieces(i):
            part = slice(at, at + count)
            assert np.array_equal(row["input_ids"][part], stream.corpus.read(d, 0, count))
            assert np.array_equal(row["position_ids"][part], np.arange(count))
            assert row["labels"][at] == IGNORE, "what comes first in a document can't be told from another one"
            assert np.array_equal(row["labels"][part][1:], row["input_ids"][part][1:])
            at += count
        assert (row["labels"][at:] == IGNORE).all() and (row["input_ids"][at:] == stream.pad_id).all()
        assert np.array_equal(row["position_ids"][at:], np.arange(len(row["labels"]) - at))


def test_only_the_answers_of_long_range_rows_are_labelled(stream: Stream) -> None:
    rows = [row for row in rows_of(stream) if int(row["domain"]) == len(stream.domains)]
    assert len(rows) == int(stream.plan.counts[:, -1].sum()) > 0
    for row in rows:
        marked = row["answer_mask"]
        assert marked.any() and np.array_equal(row["labels"] != IGNORE, marked)
        assert np.array_equal(row["labels"][marked], row["input_ids"][marked])
        assert np.array_equal(row["position_ids"], np.arange(len(marked))), "the evidence must be in reach"


def test_pairs_are_read_in_epochs_and_never_held_out(stream: Stream) -> None:
    keys = [int(row["pair_key"]) for row in rows_of(stream)]
    train, held = (stream.pairs[split]["pair_key"].tolist() for split in ("train", "held_out"))
    assert set(keys[: len(train)]) == set(train) and not set(train) & set(held)
    assert stream.validation_pairs(5)["query_ids"].shape == (5, 8)
    assert len(stream.validation_pairs(10**6)["pair_key"]) == len(held)
    asked = stream.validation_pairs(10**6)["record_id"].tolist()
    modules = len({*asked})
    assert len(held) > modules > 1 and len({*asked[:modules]}) == modules, "one of each before a second of any"


def test_a_step_carries_all_its_pairs_or_none() -> None:
    stages = [{"steps": 8, "context": 64, "retrieval": 0.25}, {"steps": 2, "context": 64}]
    made = Stream(corpus(), profile(curriculum=stages))
    carried = [set((made[step]["pair_key"] >= 0).tolist()) for step in range(10)]
    assert all(len(kinds) == 1 for kinds in carried)
    assert [kinds == {True} for kinds in carried] == [False, False, False, True] * 2 + [True, True]


def test_preferences_ride_along_at_their_rate() -> None:
    stages = [{"steps": 4, "context": 64, "preferences": 0.5}, {"steps": 2, "context": 64}]
    made = Stream(corpus(), profile(curriculum=stages))
    for step in range(6):
        batch = made[step]
        assert batch["chosen_ids"].shape == batch["rejected_ids"].shape == (16, 24)
        assert ((batch["preference_key"] >= 0) == (step in (1, 3))).all()
        for chosen, rejected, start in zip(
            batch["chosen_ids"], batch["rejected_ids"], batch["answer_start"], strict=True
        ):
            assert np.array_equal(chosen[:start], rejected[:start]) and not np.array_equal(chosen, rejected)


def test_validation_rows_are_held_out_documents_each_once(stream: Stream) -> None:
    for domain in stream.domains:
        labels = stream.validation(domain, 10**6)["labels"]
        members = stream.corpus.members["validation", domain]
        fits = members[stream.corpus.tokens[members] <= 128]
        learnt = int((labels != IGNORE).sum())
        assert learnt == int(stream.corpus.tokens[fits].sum()) - len(fits)
        assert stream.validation(domain, 1)["labels"].shape == (1, 128) == (1, labels.shape[1])
    assert stream.validation("unknown", 4)["labels"].shape == (0, 128)


def test_long_range_rows_are_held_out(stream: Stream) -> None:
    rows = stream.long_range(100)
    assert rows["input_ids"].shape == (3, 64) and rows["answer_mask"].any(1).all()
    held = [d for d, *_ in stream.schedule.filler("validation", 0, 64)]
    assert {stream.corpus.split[d] for d in held} == {"validation"}


def test_a_withdrawn_record_is_gone_from_its_step_on_and_nothing_else_moves(stream: Stream) -> None:
    victim = str(stream.corpus.records[stream.schedule.pieces(stream.plan.rows_at(12).start)[0][0]])
    made = Stream(corpus(), profile(), [{"kind": "withdraw", "step": 12, "record_id": victim}])
    first, hit = made.plan.rows_at(12).start, 0
    for i in range(len(made.plan)):
        before, after = row(stream, i), row(made, i)
        if i < first:
            assert equal(before, after)
            continue
        at = 0
        for d, _, count in made.schedule.pieces(i):
            part = slice(at, at + count)
            if str(made.corpus.records[d]) == victim and int(after["domain"]) < len(made.domains):
                hit += 1
                assert (after["input_ids"][part] == made.pad_id).all() and (after["labels"][part] == IGNORE).all()
            elif int(after["domain"]) < len(made.domains):
                assert np.array_equal(after["input_ids"][part], before["input_ids"][part])
            at += count
        assert np.array_equal(after["position_ids"], before["position_ids"])
        assert victim not in made.origins["pairs"][made.ridden("pairs", i)], "neither as the answer nor as a negative"
    assert hit, "the record would have been read again"


def test_ids_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    shutil.copytree(corpus(), tmp_path / "data")
    rows = tokenizer.read_ids(corpus() / "pairs.parquet", Stream(corpus(), profile()).corpus.manifest[tokenizer.STAMP])
    provenance.write(tmp_path / "data/pairs.parquet", rows, **{tokenizer.STAMP: "0" * 64})
    with pytest.raises(ValueError, match=r"pairs\.parquet has tokenizer"):
        Stream(tmp_path / "data", profile())
