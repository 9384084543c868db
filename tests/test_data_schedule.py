"""Whole documents, in epochs without replacement, packed with little waste; decisions move nothing before them."""

from collections import Counter

import numpy as np
import pytest
from data_corpus import corpus, profile
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stackpkg.data.corpus import Corpus
from stackpkg.data.curriculum import Decision
from stackpkg.data.schedule import Schedule
from stackpkg.params import Params, Stage

BASE = Corpus(corpus())


def schedule(p: Params | None = None, decisions: tuple[Decision, ...] = ()) -> Schedule:
    return Schedule(BASE, p or profile(), decisions)


def long(**changes: object) -> Params:
    """Enough steps for several epochs of every domain, over a change of context."""
    stages = [{"steps": 60, "context": 64, "long_range": 0.2}, {"steps": 40, "context": 128, "long_range": 0.1}]
    return profile(curriculum=stages, **changes)


def documents(made: Schedule, stage: int | None = None) -> list[tuple[int, list[int]]]:
    """(lane, documents) of every text row, in order."""
    rows = [(i, made.plan[i]) for i in range(len(made.plan))]
    wanted = [(i, row) for i, row in rows if row.lane < len(made.domains) and stage in (None, row.stage)]
    return [(row.lane, [d for d, *_ in made.pieces(i)]) for i, row in wanted]


def test_no_document_is_cut_and_no_row_overflows() -> None:
    made = schedule(long())
    for i in range(len(made.plan)):
        row, pieces = made.plan[i], made.pieces(i)
        assert sum(count for *_, count in pieces) <= row.context
        if row.lane < len(made.domains):
            assert all(begin == 0 and count == BASE.tokens[d] for d, begin, count in pieces)
            assert {BASE.split[d] for d, *_ in pieces} == {"train"}
            assert {BASE.domain[d] for d, *_ in pieces} == {made.domains[row.lane]}
        else:
            assert sum(count for *_, count in pieces) == row.context


def test_a_stage_admits_what_fits_its_context_and_nothing_else() -> None:
    made = schedule(long())
    for stage, context in enumerate((64, 128)):
        read = {d for _, row in documents(made, stage) for d in row}
        fits = set(np.flatnonzero((BASE.split == "train") & (BASE.tokens <= context)).tolist())
        assert read == fits, "several epochs of every domain are read in this stage"
    assert (BASE.tokens[BASE.split == "train"] > 64).any(), "nothing would wait for the second stage"


def test_no_document_comes_again_before_all_admitted_ones_have_come() -> None:
    """At any moment the counts of the admitted documents of a domain differ by one at most, over stages and epochs."""
    made = schedule(long())
    for lane, domain in enumerate(made.domains):
        members = BASE.members["train", domain]
        short = set(members[BASE.tokens[members] <= 64].tolist())
        read: Counter[int] = Counter()
        for _, row in (item for item in documents(made, 0) if item[0] == lane):
            read.update(row)
            counts = [read[d] for d in short]
            assert max(counts) - min(counts) <= 1
        pending, again = {d for d in short if read[d] < max(read.values())} or set(), set[int]()
        pending |= set(members.tolist()) - short
        for _, row in (item for item in documents(made, 1) if item[0] == lane):
            again |= set(row) & set(read) - pending
            pending -= set(row)
            if pending:
                assert not again, "a document came a second time while others had not come once"


def test_epochs_differ_in_their_order() -> None:
    made = schedule(profile(curriculum=[{"steps": 60, "context": 128, "long_range": 0.1}]))
    rows = [tuple(row) for lane, row in documents(made) if lane == 0]
    size = len(made.epochs[0][0].whole)
    first, second = rows[:size], rows[size : 2 * size]
    assert sorted(first) == sorted(second) and first != second


def test_the_mixture_of_a_stage_is_of_what_it_admits_under_its_own_temperature() -> None:
    stages = [{"steps": 9, "context": 64, "temperature": 1.0}, {"steps": 9, "context": 128}]
    made = schedule(profile(curriculum=stages))
    for mixture, context, temperature in zip(made.mixtures, (64, 128), (1.0, 0.5), strict=True):
        fits = (BASE.split == "train") & (BASE.tokens <= context)
        weights = {d: float(BASE.tokens[fits & (BASE.domain == d)].sum()) ** temperature for d in made.domains}
        assert mixture == pytest.approx({d: w / sum(weights.values()) for d, w in weights.items()})


def test_the_limit_of_epochs_is_of_the_whole_run_and_not_of_a_stage() -> None:
    tokens = {domain: int(BASE.tokens[BASE.members["train", domain]].sum()) for domain in ("code", "docs")}
    data = {**profile().data.model_dump(), "max_epochs": 5}

    def four_stages(epochs: float) -> Schedule:
        steps = int(epochs * sum(tokens.values()) / (1024 * 0.9))
        return schedule(profile(curriculum=[{"steps": steps, "context": 128, "long_range": 0.1}] * 4, data=data))

    assert len(four_stages(1.1).plan) > 0
    with pytest.raises(ValueError, match="raise max_epochs 5"):
        four_stages(2.0)  # each stage alone reads twice


def test_a_context_that_no_document_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="no training document fits a context of 1 tokens: begin with a longer one"):
        schedule()._mixture(Stage.model_construct(context=1), {})


def test_rows_of_a_document_are_the_inverse_of_pieces() -> None:
    made = schedule(long())
    where: dict[int, list[int]] = {}
    for i in range(len(made.plan)):
        if made.plan[i].lane < len(made.domains):
            for d, *_ in made.pieces(i):
                where.setdefault(d, []).append(i)
    for d in range(len(BASE.tokens)):
        assert made.rows_of(d) == where.get(d, [])


@settings(max_examples=25)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("skip"), st.integers(1, 18), st.integers(1, 4)),
            st.tuples(st.just("stage_end"), st.integers(1, 8), st.just(0)),
            st.tuples(st.just("withdraw"), st.integers(1, 18), st.integers(0, 20)),
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda d: (d[0], d[1] if d[0] == "skip" else 0),
    )
)
def test_a_decision_moves_nothing_before_its_step(drawn: list[tuple[str, int, int]]) -> None:
    key = {"skip": "steps", "stage_end": "stage", "withdraw": "record_id"}
    taken = [
        {"kind": kind, "step": step, key[kind]: str(BASE.records[value]) if kind == "withdraw" else value}
        for kind, step, value in sorted(drawn, key=lambda d: d[1])
    ]
    made = schedule()
    for n in range(len(taken)):
        before = schedule(None, tuple(taken[:n]))
        number = before.plan.stage_at(before.plan.position(taken[n]["step"]))
        assume(taken[n]["kind"] != "stage_end" or number == 0)  # nobody ends a stage that skips have ended before
        after = schedule(None, tuple(taken[: n + 1]))
        first = after.plan.rows_at(after.plan.position(taken[n]["step"] - 1)).stop
        assert [before.pieces(i) for i in range(first)] == [after.pieces(i) for i in range(first)]
        assert np.array_equal(np.minimum(before.gone, first), np.minimum(after.gone, first))
        made.use(taken[: n + 1])  # under way, from the schedule of before
        assert [made.pieces(i) for i in range(len(made.plan))] == [after.pieces(i) for i in range(len(after.plan))]
