import random
import shutil

import numpy as np
import pytest
from data_corpus import corpus, profile

from stackpkg.data import provenance, shards
from stackpkg.data.stream import IGNORE, Stream


@pytest.fixture(scope="module")
def stream():
    return Stream(corpus(), profile())


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_rows_have_the_promised_shapes_and_types(stream):
    p = profile()
    assert len(stream) == p.max_steps * p.training.batch_rows
    for i in (0, len(stream) - 1):
        row, length = stream[i], p.curriculum[0 if i == 0 else 1].context
        shapes = {name: value.shape for name, value in row.items()}
        assert shapes == {
            "input_ids": (length,), "labels": (length,), "answer_mask": (length,), "domain": (), "query_ids": (8,),
            "positive_ids": (16,), "negative_ids": (2, 16), "pair_key": (),
        }  # fmt: skip
        assert {value.dtype for name, value in row.items() if name != "answer_mask"} == {np.dtype(np.int64)}
        assert row["answer_mask"].dtype == bool and row["input_ids"].max() < stream.vocab_size


def test_a_row_is_the_same_from_any_object_in_any_order(stream):
    rows = [stream[i] for i in range(len(stream))]
    order = list(range(len(stream)))
    random.Random(1).shuffle(order)
    fresh = Stream(corpus(), profile())
    assert all(equal(fresh[i], rows[i]) for i in order)
    assert equal(Stream(corpus(), profile())[len(stream) - 1], rows[-1])


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_slices_of_the_ranks_make_the_same_batch(stream, ranks):
    width, share = 8, 8 // ranks
    for step in (0, 10, 19):
        whole = [stream[step * width + k]["input_ids"] for k in range(width)]
        parts = [
            [Stream(corpus(), profile())[step * width + rank * share + k]["input_ids"] for k in range(share)]
            for rank in range(ranks)
        ]
        assert np.array_equal(np.stack(whole), np.concatenate([np.stack(part) for part in parts]))


def test_within_an_epoch_every_token_of_a_domain_is_read_once(stream):
    for domain, name in enumerate(stream.domains):
        members = stream.corpus.members["train", name]
        total = int(stream.corpus.tokens[members].sum())
        for epoch in (0, 1, 5):
            pieces = list(stream._pieces(domain, epoch * total, total))
            assert sorted(d for d, *_ in pieces) == sorted(members.tolist())
            assert all(begin == 0 and count == stream.corpus.tokens[d] for d, begin, count in pieces)
        orders = [[d for d, *_ in stream._pieces(domain, epoch * total, total)] for epoch in (0, 1)]
        assert orders[0] != orders[1]


def test_the_rows_of_a_domain_join_up_to_its_epochs(stream):
    """The rows of a lane, joined, are the concatenated epochs, over the change of context and of epoch."""
    longer = profile(curriculum=[{"steps": 40, "context": 64, "long_range": 0.2}, {"steps": 40, "context": 128}])
    long = Stream(corpus(), longer)
    for domain, name in enumerate(long.domains):
        rows = [long[i]["input_ids"] for i in range(len(long)) if long.plan[i].lane == domain]
        joined = np.concatenate(rows)
        assert np.array_equal(joined, long.corpus.read(long._pieces(domain, 0, len(joined))))
        assert len(joined) > long.corpus.manifest["tokens"]["train"][name], "the test should pass an epoch's end"


def test_text_rows_hold_training_documents_only(stream):
    held = {r for r, s in zip(stream.corpus.records, stream.corpus.shard, strict=True)
            if stream.corpus.names[s].startswith("validation")}  # fmt: skip
    seen = {piece["record_id"] for step in range(20) for piece in stream.documents(step)}
    assert held and not held & seen


def test_documents_say_what_was_in_a_step(stream):
    for step in (0, 11):
        pieces = stream.documents(step)
        for i in range(step * 8, step * 8 + 8):
            mine = [piece for piece in pieces if piece["row"] == i]
            row = stream[i]
            assert sum(piece["tokens"] for piece in mine) == len(row["input_ids"])
            if int(row["domain"]) == len(stream.domains):
                assert mine[0]["domain"] == "long_range" and mine[0]["record_id"].startswith("recall-")
                continue
            files = dict(zip(stream.corpus.names, stream.corpus.maps, strict=True))
            parts = [files[piece["shard"]][piece["offset"] :][: piece["tokens"]] for piece in mine]
            assert np.array_equal(np.concatenate(parts), row["input_ids"])


def test_labels_and_answers(stream):
    rows = [stream[i] for i in range(len(stream))]
    long = [row for row in rows if int(row["domain"]) == len(stream.domains)]
    assert len(long) == 27
    for row in rows:
        marked = row["answer_mask"]
        if int(row["domain"]) == len(stream.domains):
            assert marked.any() and np.array_equal(row["labels"] != IGNORE, marked)
            assert np.array_equal(row["labels"][marked], row["input_ids"][marked])
        else:
            assert not marked.any() and np.array_equal(row["labels"], row["input_ids"])


def test_pairs_are_read_in_epochs_and_never_held_out(stream):
    keys = [int(stream[i]["pair_key"]) for i in range(len(stream))]
    train, held = (stream.pairs[split]["pair_key"].tolist() for split in ("train", "held_out"))
    assert set(keys[: len(train)]) == set(train) and not set(train) & set(held)
    assert stream.validation_pairs(5)["query_ids"].shape == (5, 8)
    assert len(stream.validation_pairs(10**6)["pair_key"]) == len(held)


def test_a_stage_without_retrieval_marks_its_pairs_as_none():
    quiet = Stream(
        corpus(), profile(curriculum=[{"steps": 1, "context": 64, "retrieval": False}, {"steps": 1, "context": 64}])
    )
    keys = [int(quiet[i]["pair_key"]) for i in range(16)]
    assert set(keys[:8]) == {-1} and -1 not in keys[8:]


def test_validation_rows_are_held_out_text(stream):
    for domain in stream.domains:
        rows = stream.validation(domain, 3)
        assert 1 <= len(rows) <= 3
        joined = np.concatenate([row["input_ids"][row["labels"] != IGNORE] for row in rows])
        order = stream.corpus.members["validation", domain]
        text = np.concatenate([stream.corpus.read(iter([(d, 0, int(stream.corpus.tokens[d]))])) for d in order])
        assert np.array_equal(joined, text[: len(joined)])
    everything = stream.validation(stream.domains[0], 10**6)
    tokens = sum(int((row["labels"] != IGNORE).sum()) for row in everything)
    assert tokens == stream.corpus.manifest["tokens"]["validation"][stream.domains[0]]
    assert stream.validation("unknown", 4) == []


def test_long_range_rows_are_held_out(stream):
    rows = stream.long_range_rows(100)
    assert len(rows) == 3 and all(len(row["input_ids"]) == 64 and row["answer_mask"].any() for row in rows)


def test_ids_of_another_tokenizer_are_refused(tmp_path):
    shutil.copytree(corpus(), tmp_path / "data")
    rows = shards.read_ids(corpus() / "pairs.parquet", Stream(corpus(), profile()).corpus.manifest[shards.STAMP])
    provenance.write(tmp_path / "data/pairs.parquet", rows, **{shards.STAMP: "0" * 64})
    with pytest.raises(ValueError, match=r"pairs\.parquet has tokenizer"):
        Stream(tmp_path / "data", profile())
