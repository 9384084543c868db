import itertools
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from stackpkg.data import mixing

PARTS = st.lists(st.floats(0.01, 1), min_size=1, max_size=6).map(lambda w: [x / sum(w) for x in w])


def test_shares_follow_the_power_law():
    assert mixing.shares({"a": 900, "b": 100}, 1.0) == pytest.approx({"a": 0.9, "b": 0.1})
    assert mixing.shares({"a": 900, "b": 100}, 0.5) == pytest.approx({"a": 0.75, "b": 0.25})


def test_an_empty_domain_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        mixing.shares({"a": 10, "b": 0}, 0.7)


TOKENS = st.dictionaries(st.sampled_from("abcdefg"), st.integers(1, 10**12), min_size=1)


@given(TOKENS, st.floats(0.05, 5), st.floats(0, 1), st.integers(1, 10), st.floats(0.01, 1))
def test_caps_hold_and_the_rest_keeps_its_proportions(tokens, temperature, tightness, epochs, length):
    loosest = 1 / len(tokens)
    cap = loosest + (1 - loosest) * tightness
    plain, capped = mixing.shares(tokens, temperature), mixing.shares(tokens, temperature, max_share=cap)
    assert sum(capped.values()) == pytest.approx(1) and max(capped.values()) <= cap * (1 + 1e-12)
    free = [domain for domain in tokens if capped[domain] < cap * (1 - 1e-9)]
    for a, b in pairwise(free):
        assert capped[a] * plain[b] == pytest.approx(capped[b] * plain[a], rel=1e-6)
    ordered = sorted(tokens, key=tokens.get)
    assert all(capped[a] <= capped[b] * (1 + 1e-9) for a, b in pairwise(ordered))
    if max(plain.values()) <= cap:
        assert capped == plain
    budget = max(1, int(epochs * sum(tokens.values()) * length))
    read = mixing.shares(tokens, temperature, max_epochs=epochs, budget=budget)
    assert sum(read.values()) == pytest.approx(1)
    assert all(read[domain] * budget <= epochs * count * (1 + 1e-9) for domain, count in tokens.items())


def test_what_is_above_a_cap_goes_to_the_others_in_proportion():
    tokens = {"a": 700, "b": 200, "c": 100}
    assert mixing.shares(tokens, 1.0, max_share=0.4) == pytest.approx({"a": 0.4, "b": 0.4, "c": 0.2})
    # two epochs of c are 0.2 of the run, so a and b, alike at temperature 0, share 0.8
    assert mixing.shares(tokens, 1e-9, max_epochs=2, budget=1000) == pytest.approx({"a": 0.4, "b": 0.4, "c": 0.2})
    # one epoch of c is 100 / 520; a and b then have 210 / 520 each, more than one epoch of b: a takes what is left
    both = mixing.shares(tokens, 1e-9, max_share=0.45, max_epochs=1, budget=520)
    assert both == pytest.approx({"a": 220 / 520, "b": 200 / 520, "c": 100 / 520})


@pytest.mark.parametrize(
    ("caps", "message"),
    [
        ({"max_share": 0.3}, r"0.6, not 1; give max_share 0.5 or more"),
        ({"max_epochs": 2, "budget": 4000}, r"0.5, not 1; raise max_epochs 2 or max_share 1, shorten the run"),
        ({"max_share": 0.6, "max_epochs": 2, "budget": 1800}, r"0.711, not 1; raise max_epochs 2 or max_share 0.6"),
        ({"max_epochs": 2}, r"max_epochs 2 needs `budget`"),
    ],
)
def test_caps_that_cannot_hold_are_refused_with_advice(caps, message):
    with pytest.raises(ValueError, match=message):
        mixing.shares({"a": 900, "b": 100}, 0.7, **caps)


def test_deviation_by_hand():
    apart, p = mixing.deviation({"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 45, "b": 35, "c": 20})
    assert apart == pytest.approx({"a": -0.05, "b": 0.05, "c": 0.0})
    # chi^2 = 25 / 50 + 25 / 30 = 4 / 3 with two degrees of freedom: p = exp(-2 / 3)
    assert p == pytest.approx(np.exp(-2 / 3))
    assert mixing.deviation({"a": 1.0}, {"a": 7}) == ({"a": 0.0}, 1.0)
    assert mixing.deviation({"a": 0.5, "b": 0.5, "c": 0.0}, {"a": 90, "b": 10})[1] < 1e-10


@pytest.mark.parametrize("counts", [{"a": 1, "z": 1}, {"a": 0}, {}, {"a": 3, "c": 1}])
def test_counts_without_a_share_are_refused(counts):
    with pytest.raises(ValueError, match="of domains that have a share"):
        mixing.deviation({"a": 0.6, "b": 0.4, "c": 0.0}, counts)


def test_the_p_value_of_a_fair_draw_is_uniform_and_of_an_interleaved_order_near_one():
    target, generator = {"a": 0.5, "b": 0.3, "c": 0.2}, np.random.default_rng(5)
    draws = generator.multinomial(2000, list(target.values()), size=1000)
    values = [mixing.deviation(target, dict(zip(target, draw.tolist(), strict=True)))[1] for draw in draws]
    assert 0.02 < np.mean(np.array(values) < 0.05) < 0.08  # binomial: 0.05 and four standard deviations
    lane, _ = mixing.interleave(list(target.values()), 997, 4)
    counts = dict(zip(target, np.bincount(lane).tolist(), strict=True))
    apart, p = mixing.deviation(target, counts)
    assert p > 0.99 and max(map(abs, apart.values())) < 1 / 997


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


@given(st.integers(1, 3000), st.integers())
def test_a_shuffle_is_a_permutation_and_knows_its_inverse(n, key):
    shuffle = mixing.Shuffle(n, key)
    found = shuffle.at(np.arange(n))
    assert sorted(found) == list(range(n)) and all(shuffle[k] == found[k] for k in (0, n // 2, n - 1))
    assert all(shuffle.place(int(found[k])) == k for k in (0, n // 3, n - 1))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_order_of_a_few_rows_is_as_likely_as_every_other(n):
    orders = dict.fromkeys(itertools.permutations(range(n)), 0)
    for key in range(200 * len(orders)):
        orders[tuple(mixing.Shuffle(n, "order", key).at(np.arange(n)).tolist())] += 1
    assert chisquare(list(orders.values())).pvalue > 1e-3


def test_every_row_of_a_shuffle_comes_to_every_place_and_shuffles_do_not_follow_each_other():
    counts, n = np.zeros((40, 40)), 40
    for key in range(4000):
        counts[np.arange(n), mixing.Shuffle(n, "place", key).at(np.arange(n))] += 1
    assert chisquare(counts.ravel()).pvalue > 1e-3
    long, next_ = (mixing.Shuffle(200_000, "epoch", epoch).at(np.arange(200_000)) for epoch in (0, 1))
    # of independent orders: correlation N(0, 1 / n), and Poisson(1) items that keep their place, or their neighbour
    assert abs(np.corrcoef(long, next_)[0, 1]) < 4 / math.sqrt(200_000)
    assert abs(np.corrcoef(long[:-1], long[1:])[0, 1]) < 4 / math.sqrt(200_000)
    assert (long == next_).sum() < 8 and (np.diff(long) == 1).sum() < 8


def test_shuffles_never_change():
    assert [mixing.Shuffle(1000, 17, "rows", "docs", 0, 0)[k] for k in range(5)] == [593, 704, 472, 568, 973]
