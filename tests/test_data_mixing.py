import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackpkg.data import mixing

PARTS = st.lists(st.floats(0.01, 1), min_size=1, max_size=6).map(lambda w: [x / sum(w) for x in w])


def test_shares_follow_the_power_law():
    assert mixing.shares({"a": 900, "b": 100}, 1.0) == pytest.approx({"a": 0.9, "b": 0.1})
    assert mixing.shares({"a": 900, "b": 100}, 0.5) == pytest.approx({"a": 0.75, "b": 0.25})


def test_an_empty_domain_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        mixing.shares({"a": 10, "b": 0}, 0.7)


@given(PARTS, st.integers(1, 400))
def test_interleave_is_exact_and_even(parts, rows):
    lane, ordinal = mixing.interleave(parts, rows, 3)
    counts = np.bincount(lane, minlength=len(parts))
    assert counts.sum() == rows and (np.abs(counts - np.array(parts) * rows) < 1).all()
    for k, count in enumerate(counts):
        assert (ordinal[lane == k] == np.arange(count)).all()
        prefix = np.cumsum(lane == k) - counts[k] / rows * np.arange(1, rows + 1)
        assert np.abs(prefix).max() <= len(parts) + 1


def test_mix_is_the_published_splitmix64():
    state = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * mixing.GOLDEN
    assert mixing.mix(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_hashes_never_change_and_permutations_differ_by_key():
    assert mixing.hashed(3, 17, "rows").tolist() == [6038109398212350396, 194380224734944963, 7499877360737779506]
    assert sorted(mixing.permutation(50, "a")) == list(range(50))
    assert mixing.permutation(50, "a").tolist() != mixing.permutation(50, "b").tolist()
