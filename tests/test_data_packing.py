"""Packing keeps every document whole, fills rows as best fit does, and depends on the set of documents alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackpkg.data.packing import pack

SIZES = st.integers(1, 60).flatmap(
    lambda context: st.tuples(st.just(context), st.lists(st.integers(1, context), max_size=60))
)


def brute_force(lengths: list[int], context: int) -> int:
    """Rows of best-fit decreasing, by looking at every open row."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        room = [left for left in free if left >= length]
        if room:
            free.remove(min(room))
        free.append((min(room) if room else context) - length)
    return len(free)


@given(SIZES)
def test_rows_are_those_of_best_fit_decreasing(case: tuple[int, list[int]]) -> None:
    context, lengths = case
    made = pack(np.arange(len(lengths)), np.array(lengths, np.int64), context)
    assert len(made) == brute_force(lengths, context)
    assert sorted(made.order.tolist()) == list(range(len(lengths)))
    filled = [sum(lengths[d] for d in made.row(r)) for r in range(len(made))]
    assert all(0 < tokens <= context for tokens in filled)
    assert len(made) <= 1.7 * max(1, -(-sum(lengths) // context)) + 1  # best fit is within 1.7 of the optimum


@given(SIZES, st.randoms())
def test_the_order_of_the_documents_does_not_matter(case: tuple[int, list[int]], random: object) -> None:
    context, lengths = case
    order = list(range(len(lengths)))
    random.shuffle(order)  # type: ignore[attr-defined]
    a = pack(np.arange(len(lengths)), np.array(lengths, np.int64), context)
    b = pack(np.array(order, np.int64), np.array([lengths[d] for d in order], np.int64), context)
    assert np.array_equal(a.order, b.order) and np.array_equal(a.ends, b.ends)


@given(SIZES)
def test_a_document_is_found_in_its_row(case: tuple[int, list[int]]) -> None:
    context, lengths = case
    made = pack(np.arange(len(lengths)) + 5, np.array(lengths, np.int64), context)
    for r in range(len(made)):
        assert all(made.rows_of(int(d)).tolist() == [r] for d in made.row(r))
    assert made.rows_of(4).tolist() == []
    some = np.arange(0, len(made), 2)
    assert sorted(made.documents(some)) == sorted(int(d) for r in some for d in made.row(int(r)))


def test_little_is_wasted_on_documents_of_ordinary_lengths() -> None:
    lengths = np.minimum(2048, np.random.default_rng(0).lognormal(6.5, 1.2, 20_000).astype(int) + 1)
    made = pack(np.arange(len(lengths)), lengths, 2048)
    assert 1 - lengths.sum() / (len(made) * 2048) < 0.001


def test_a_document_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a document of 9 tokens does not fit a row of 8"):
        pack(np.arange(2), np.array([3, 9]), 8)
