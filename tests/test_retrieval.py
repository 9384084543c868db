"""Retrieval: exact and inverted search, withdrawal, the guard's filters, calibration of sigma_min, the switch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from stackpkg.model import retrieval
from stackpkg.model.retrieval import Index, Record, Switch, calibrate, guard

NOW = 1e9


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def records(count: int, first: int = 0) -> list[Record]:
    return [Record(str(i), "docs", NOW, 1.0) for i in range(first, first + count)]


def filled(count: int = 50, dimension: int = 8) -> tuple[Index, torch.Tensor]:
    index, vectors = Index(dimension), drawn(0, count, dimension)
    index.add(vectors, records(count))
    return index, vectors


def names(found: list) -> list[list[str]]:
    return [[record.name for record, _ in row] for row in found]


# ---- index


@settings(max_examples=30, deadline=None)
@given(count=st.integers(0, 60), queries=st.integers(1, 5), k=st.integers(1, 70), seed=st.integers(0, 99))
def test_search_of_a_batch_is_exact(count: int, queries: int, k: int, seed: int) -> None:
    vectors, query, index = drawn(seed, count, 8), drawn(seed + 100, queries, 8), Index(8)
    index.add(vectors, records(count))
    cosines = F.normalize(query, dim=-1) @ F.normalize(vectors, dim=-1).T
    best = cosines.sort(-1, descending=True)
    found = index.search(query, k)
    assert names(found) == [[str(i) for i in row[:k].tolist()] for row in best.indices]
    for row, expected in zip(found, best.values, strict=True):
        assert [cosine for _, cosine in row] == pytest.approx(expected[:k].tolist(), abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(gone=st.sets(st.integers(0, 60)), again=st.sets(st.integers(0, 49)))
def test_a_withdrawn_record_is_never_found(gone: set[int], again: set[int]) -> None:
    index, vectors = filled()
    assert index.remove(map(str, gone)) == len({i for i in gone if i < 50})
    left = set(range(50)) - gone
    assert set(names(index.search(vectors[:1], 50))[0]) == set(map(str, left)) and len(index) == len(left)
    some = sorted(again)
    index.add(-vectors[some], [Record(str(i), "new", NOW, 1.0) for i in some])
    assert len(index) == len(left | again) and all(str(i) in index for i in again)
    for i in some[:3]:
        record, cosine = index.search(-vectors[i : i + 1], 1)[0][0]
        assert (record.name, record.source, cosine) == (str(i), "new", pytest.approx(1.0, abs=1e-5)), "replaced"


def test_a_large_index_searches_lists_and_forgets_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(retrieval, "EXACT", 1_000)
    topics = F.normalize(drawn(1, 60, 32), dim=-1)
    vectors = topics.repeat_interleave(50, 0) + 0.08 * drawn(2, 3_000, 32)
    exact, index = Index(32), Index(32)
    for first in range(0, 3_000, 500):
        index.add(vectors[first : first + 500], records(500, first))
    monkeypatch.setattr(retrieval, "EXACT", 10_000)
    exact.add(vectors, records(3_000))
    queries = vectors[::30] + 0.05 * drawn(3, 100, 32)
    mine, truth = names(index.search(queries)), names(exact.search(queries))
    recall = np.mean([len(set(a) & set(b)) / 8 for a, b in zip(mine, truth, strict=True)])
    assert recall > 0.9, f"recall@8 {recall:.3f}"
    assert "IVF" in type(index._index).__name__ and "IVF" not in type(exact._index).__name__
    gone = {name for row in truth[:20] for name in row}
    assert index.remove(gone) == len(gone) and index._index.ntotal == 3_000 - len(gone)
    assert not gone & {name for row in names(index.search(queries)) for name in row}
    index.save(tmp_path / "index.npz")
    assert len(Index.load(tmp_path / "index.npz")) == 3_000 - len(gone)


def test_save_and_load_keep_every_answer(tmp_path: Path) -> None:
    index, vectors = filled()
    index.remove(["3", "7"])
    index.add(drawn(5, 1, 8), [Record("naïve", "wiki", 12.5, 0.25)])
    index.save(tmp_path / "index.npz")
    again = Index.load(tmp_path / "index.npz")
    for one, other in zip(index.search(vectors, 50), again.search(vectors, 50), strict=True):
        assert [record for record, _ in one] == [record for record, _ in other]
        assert [cosine for _, cosine in one] == pytest.approx([cosine for _, cosine in other], abs=1e-6)
    Index(4).save(tmp_path / "empty.npz")
    assert len(Index.load(tmp_path / "empty.npz")) == 0 and Index.load(tmp_path / "empty.npz").dimension == 4


def test_a_file_with_objects_or_too_few_vectors_is_refused(tmp_path: Path) -> None:
    told = np.frombuffer(json.dumps([vars(records(1)[0])]).encode(), np.uint8)
    np.savez(tmp_path / "bad.npz", vectors=np.array([{}], object), records=told)
    with pytest.raises(ValueError, match="allow_pickle"):
        Index.load(tmp_path / "bad.npz")
    np.savez(tmp_path / "few.npz", vectors=np.zeros((2, 4), np.float32), records=told)
    with pytest.raises(ValueError, match="2 vectors for 1 names"):
        Index.load(tmp_path / "few.npz")


@pytest.mark.parametrize(
    ("vectors", "complaint"),
    [
        (torch.ones(3, 7), r"\[3, 7\]; allowed: finite \[n, 8\]"),
        (torch.ones(8), r"\[8\]"),
        (torch.full((3, 8), float("nan")), "NaN or infinity"),
        (torch.ones(2, 8), "2 vectors for 3 names"),
    ],
)
def test_bad_vectors_are_refused_and_change_nothing(vectors: torch.Tensor, complaint: str) -> None:
    index, known = filled()
    with pytest.raises(ValueError, match=complaint):
        index.add(vectors, records(3))
    with pytest.raises(ValueError, match="2 vectors for 1 names"):
        index.add(torch.ones(2, 8), [records(1)[0]] * 2)
    assert len(index) == 50 and names(index.search(known[:3], 1)) == [["0"], ["1"], ["2"]]


# ---- guard


def test_guard_counts_each_rejection_once() -> None:
    good = Record("good", "docs", NOW - 604_800, 0.6)
    cases = {
        "similarity": (Record("a", "docs", NOW, 1.0), 0.4499),
        "age": (Record("b", "docs", NOW - 604_801, 1.0), 0.9),
        "source": (Record("c", "elsewhere", NOW, 1.0), 0.9),
        "trust": (Record("d", "docs", NOW, 0.59), 0.9),
    }
    worst = (Record("e", "elsewhere", NOW + 5, 0.0), 0.0)
    accepted, rejected = guard([(good, 0.45), *cases.values(), worst], NOW, {"docs"})
    assert accepted == [(good, 0.45)]
    assert rejected == {"similarity": 2, "age": 1, "source": 1, "trust": 1}
    assert guard([(Record("f", "docs", NOW + 5, 1.0), 0.9)], NOW, {"docs"})[1]["age"] == 1, "from the future"


@settings(max_examples=20, deadline=None)
@given(k=st.integers(1, 30), sigma=st.floats(-1, 1), seed=st.integers(0, 99))
def test_retrieve_accounts_for_every_candidate(k: int, sigma: float, seed: int) -> None:
    index, g = Index(8), torch.Generator().manual_seed(seed)
    traits = torch.rand(20, 3, generator=g).tolist()
    mixed = [Record(str(i), "docs" if s < 0.8 else "x", NOW - 1e6 * a, t) for i, (s, a, t) in enumerate(traits)]
    index.add(drawn(seed, 20, 8), mixed)
    found, rejected = index.retrieve(drawn(seed + 1, 3, 8), NOW, {"docs"}, k, sigma_min=sigma)
    assert sum(map(len, found)) + sum(rejected.values()) == 3 * min(k, 20)
    for record, cosine in (pair for row in found for pair in row):
        assert cosine >= sigma and record.source == "docs" and record.trust >= 0.6 and NOW - record.timestamp <= 604_800
    assert list(rejected) == ["similarity", "age", "source", "trust"]


# ---- calibration


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(*[st.tuples(st.integers(25, 75), st.booleans())] * 2), min_size=1, max_size=12),
    target=st.sampled_from([0.1, 0.5, 0.75, 1.0]),
)
def test_calibration_is_the_smallest_threshold_that_reaches_the_target(rows: list, target: float) -> None:
    similarities = torch.tensor([[s / 100 for s, _ in row] for row in rows])
    relevant = torch.tensor([[r for _, r in row] for row in rows])

    def precision(sigma: float) -> float:
        accepted = similarities.double() >= sigma
        return float((accepted & relevant).sum() / accepted.sum()) if accepted.any() else 0.0

    # between two neighbouring similarities nothing changes, so these thresholds are all there are
    steps = [0.35, *sorted(s for s in similarities.double().flatten().tolist() if 0.35 < s < 0.6), 0.6]
    reaching = [sigma for sigma in steps if precision(sigma) >= target]
    if not reaching:
        with pytest.raises(ValueError, match=r"no sigma_min in \[0.35, 0.6\] reaches precision"):
            calibrate(similarities, relevant, target)
        return
    found = calibrate(similarities, relevant, target)
    assert found.sigma_min == reaching[0] and found.precision == pytest.approx(precision(reaching[0]))
    passing = [
        guard([(Record("a", "docs", NOW, 1.0), s) for s in row], NOW, {"docs"}, found.sigma_min)[0]
        for row in similarities.tolist()
    ]
    assert found.coverage == pytest.approx(sum(map(bool, passing)) / len(rows)), "the guard accepts the same"


def test_calibration_tells_what_it_costs() -> None:
    similarities = torch.tensor([[0.58, 0.41], [0.5, 0.3], [0.42, 0.36], [0.4, 0.38]])
    relevant = torch.tensor([[True, False], [True, False], [False, False], [False, True]])
    assert calibrate(similarities, relevant, 0.25) == pytest.approx((0.35, 3 / 7, 1.0))
    assert calibrate(similarities, relevant, 0.75) == pytest.approx((0.5, 1.0, 0.5))
    for bad in (relevant[:2], relevant.flatten()):
        with pytest.raises(ValueError, match="two of one shape"):
            calibrate(similarities, bad, 0.5)
    with pytest.raises(ValueError, match=r"best is 0\.000"):
        calibrate(similarities, ~relevant & relevant, 0.5)


# ---- switch

GOOD = (torch.tensor([[0.55], [0.4]]), torch.tensor([[True], [False]]))
HOPELESS = (torch.tensor([[0.55], [0.4]]), torch.tensor([[False], [True]]))


def test_a_calibration_turns_retrieval_on_and_one_that_fails_changes_nothing() -> None:
    switch = Switch()
    switch.on = False
    with pytest.raises(ValueError, match="no sigma_min"):
        switch.recalibrate(*HOPELESS, target=0.75)
    assert switch.state_dict() == {"on": False, "sigma_min": 0.45}
    assert switch.recalibrate(*GOOD, target=0.75) == (pytest.approx(0.55), 1.0, 0.5)
    restored = Switch()
    restored.load_state_dict(json.loads(json.dumps(switch.state_dict())))
    assert restored.on and restored.sigma_min == pytest.approx(0.55)
