"""Long-range rows read by a sceptic: how far is the evidence of each answer, and what can be guessed without it?"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.special import betaincinv, chdtrc, stdtrit

from stackpkg.data import longrange

Interval = dict[str, float]
RARE = 1e-4  # a leak is called only beyond what a fair draw shows once in ten thousand


class Rows(NamedTuple):
    """Rows of tasks: token ids int64 [n, L], and bool [n, L], where the answers are."""

    ids: np.ndarray
    answers: np.ndarray


def proportion(right: Iterable[bool], level: float = 0.05) -> Interval:
    """Share of `right` with its exact interval of confidence 1 - level."""
    seen = np.asarray(list(right), bool)
    k, n = int(seen.sum()), len(seen)
    # low: P(X >= k | p) = level / 2, high: P(X <= k | p) = level / 2        (Clopper and Pearson 1934)
    low = float(betaincinv(k, n - k + 1, level / 2)) if k else 0.0
    high = float(betaincinv(k + 1, n - k, 1 - level / 2)) if k < n else 1.0
    return {"value": k / n, "low": low, "high": high, "n": n}


def over_seeds(values: Iterable[float]) -> Interval:
    """Mean over seeds with its interval of confidence 0.95; a single seed has no interval."""
    x = np.array(list(values))
    # mean +- t_{n-1, 0.975} s / sqrt(n)        (Student 1908)
    half = float(stdtrit(len(x) - 1, 0.975) * x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan
    return {"value": float(x.mean()), "low": float(x.mean()) - half, "high": float(x.mean()) + half, "n": len(x)}


def construction(rows: Rows, reach: int, specials: Mapping[str, int], values: range) -> dict[str, Any]:
    """Share `beyond` of answers told only beyond `reach`, and what the best predictor that sees no farther gets: its
    loss in nats, exactly, and its accuracy. `distance` is of each answer, in tokens.
    """
    distance = longrange.distances(*rows, specials, values)
    beyond = proportion(distance > reach)
    # H(answer | what is in reach) = log V beyond it and 0 inside: loss >= rho log V        (Cover and Thomas 2006, 2.1)
    bayes = beyond["value"] * math.log(len(values))
    ceiling = 1 - beyond["value"] * (1 - 1 / len(values))
    return {"beyond": beyond, "bayes_loss": bayes, "ceiling": ceiling, "distance": distance.tolist()}


def leakage(rows: Rows, reach: int, values: range) -> dict[str, Any]:
    """Accuracy of predictors that have no evidence, each with its interval, beside `chance`; `uniform_p` of answers.

    `position`, `last_token`, `frequency`: the commonest answer for a place, for the name asked, at all, counted on the
    rows before. `window_frequency`, `copy`: the commonest and the last value in reach.
    """
    said = rows.ids[rows.answers]
    places = np.argwhere(rows.answers)
    near = [[int(token) for token in rows.ids[r, max(0, at - 1 - reach) : at] if token in values] for r, at in places]
    features = {"position": places[:, 1], "last_token": rows.ids[places[:, 0], places[:, 1] - 1],
                "frequency": np.zeros(len(said), int)}  # fmt: skip
    found = {
        "window_frequency": [
            bool(seen) and Counter(seen).most_common(1)[0][0] == v for seen, v in zip(near, said, strict=True)
        ],
        "copy": [bool(seen) and seen[-1] == v for seen, v in zip(near, said, strict=True)],
    }
    for name, feature in features.items():
        told, right = defaultdict[int, Counter[int]](Counter), []
        for key, value in zip(feature.tolist(), said.tolist(), strict=True):
            right.append(bool(told[key]) and told[key].most_common(1)[0][0] == value)
            told[key][value] += 1
        found[name] = right[len(right) // 2 :]
    counts = np.bincount(said - values.start, minlength=len(values))
    # chi^2 = sum_v (n_v - n/V)^2 / (n/V) with V - 1 degrees of freedom        (Pearson 1900)
    uniform = float(chdtrc(len(values) - 1, ((counts - counts.mean()) ** 2 / counts.mean()).sum()))
    return {"chance": 1 / len(values), "uniform_p": uniform} | {k: proportion(v, RARE) for k, v in found.items()}


def no_leak(found: Mapping[str, Any]) -> bool:
    """Whether no predictor of `leakage` is above chance, and the answers are uniform."""
    low = max(interval["low"] for interval in found.values() if isinstance(interval, dict))
    return low <= found["chance"] and found["uniform_p"] > RARE
