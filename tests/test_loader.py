"""Which rows a rank reads: any number of ranks and micro-batches reads every row once, in the same order."""

import time

import pytest
import torch
from data_corpus import corpus, profile
from torch.utils.data import DataLoader

from stackpkg.data.stream import Stream
from stackpkg.training.loader import RankBatches, StreamDataset, Timed, collate


@pytest.fixture(scope="module")
def stream() -> Stream:
    return Stream(corpus(), profile())


def reader(stream: Stream, accumulation: int, rank: int, ranks: int, start: int = 0) -> RankBatches:
    return RankBatches(stream, 20, accumulation, rank, ranks, lambda: start)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_is_its_rows_in_order_on_any_layout(stream: Stream, ranks: int, accumulation: int) -> None:
    if ranks * accumulation > 8:
        pytest.skip("the second stage has eight rows a step")
    readers = [reader(stream, accumulation, rank, ranks) for rank in range(ranks)]
    lists = [list(each) for each in readers]
    assert all(len(rows) == len(each) == 20 * accumulation for rows, each in zip(lists, readers, strict=True))
    for step in range(20):
        micros = range(step * accumulation, (step + 1) * accumulation)
        # over micro-batches, then over ranks: the rows of the step, none twice, none left out
        assert [row for micro in micros for each in lists for row in each[micro]] == list(stream.plan.rows_at(step))


def test_micro_batches_see_the_same_rows_on_any_number_of_ranks(stream: Stream) -> None:
    """In-batch negatives depend on what is in one micro-batch over all ranks, so that may not depend on the ranks."""
    alone = list(reader(stream, 2, 0, 1))
    spread = [list(reader(stream, 2, rank, 4)) for rank in range(4)]
    assert alone == [[row for each in spread for row in each[micro]] for micro in range(40)]


def test_a_resume_begins_at_its_step_without_looking_back(stream: Stream) -> None:
    assert list(reader(stream, 2, 1, 2, start=13)) == list(reader(stream, 2, 1, 2))[26:]


def test_a_decision_holds_from_the_first_step_that_was_not_asked_for() -> None:
    stream = Stream(corpus(), profile())
    batches = reader(stream, 1, 0, 1)
    asked = iter(batches)
    read = [next(asked) for _ in range(4)]
    assert batches.next_step == 4
    stream.schedule.use([{"kind": "skip", "step": batches.next_step, "steps": 3}])
    assert read == [list(stream.plan.rows_at(step)) for step in range(4)]
    assert next(asked) == list(stream.plan.rows_at(7))


def test_a_row_of_telemetry_tells_where_its_text_lies() -> None:
    stream = Stream(corpus(), profile())
    found = stream.corpus
    victim = str(found.records[stream.schedule.pieces(stream.plan.rows_at(15)[0])[0][0]])
    stream.schedule.use([{"kind": "withdraw", "step": 5, "record_id": victim}])
    for step in (3, 15):
        told = [stream.schedule.places(reader(stream, 2, rank, 2).of(step)) for rank in (0, 1)]
        assert all(len({len(values) for values in each.values()}) == 1 and each["batch_shards"] for each in told)
        read = sum(sum(each["batch_tokens"]) for each in told)
        places = {(s, o) for each in told for s, o in zip(each["batch_shards"], each["batch_offsets"], strict=True)}
        rows = stream.plan.rows_at(stream.plan.position(step))
        pieces = [piece for i in rows for piece in stream.schedule.pieces(i) if found.records[piece[0]] != victim]
        assert places == {(found.names[found.shard[d]], found.offset[d] + begin) for d, begin, _ in pieces}
        whole = sum(count for i in rows for _, _, count in stream.schedule.pieces(i))
        assert (read == whole) == (step == 3), "what is withdrawn is not read"
        batch = stream.batch([*rows])
        assert read <= batch["input_ids"].size
        shard, offset = min(places)
        tokens = found.tokens_of(found.names.index(shard))
        assert any((row[:3] == tokens[offset : offset + 3]).all() for row in batch["input_ids"]) or step == 15


def test_a_loader_gives_them_as_stacked_tensors(stream: Stream) -> None:
    loader = DataLoader(StreamDataset(stream), batch_sampler=reader(stream, 2, 1, 2), collate_fn=collate)
    batches = list(loader)
    assert (
        len(batches) == 40 and batches[0]["input_ids"].shape == (4, 64) and batches[-1]["input_ids"].shape == (2, 128)
    )
    assert torch.equal(batches[1]["labels"], torch.as_tensor(stream[0]["labels"][12:16]))


def test_the_time_waited_is_that_of_the_iterator_alone() -> None:
    def slow():
        for number in range(3):
            time.sleep(0.02)
            yield number

    timed = Timed(slow())
    assert list(timed) == [0, 1, 2] and 0.06 <= timed.seconds < 0.5
    time.sleep(0.1)
    assert timed.seconds < 0.5 and list(timed) == []
