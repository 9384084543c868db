"""Domain mixing with temperature and caps, and the schedule that makes of shares an exact, evenly spread row order."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numba.extending import register_jitable
from scipy.special import chdtrc

CACHE = os.access(Path(__file__).parent, os.W_OK)  # a read-only install compiles numba's kernels anew in each process
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ROUNDS = 6  # for each bit of the size


@register_jitable
def mix(x: Any) -> Any:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014), uint64 in and out, scalar or array."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed(n: int, *key: object) -> np.ndarray:
    """uint64[n], pseudo-random, a function of `key` alone: the same on every machine and with every numpy."""
    start = np.uint64(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little"))
    return mix(np.arange(1, n + 1, dtype=np.uint64) * GOLDEN + start)


def permutation(n: int, *key: object) -> np.ndarray:
    """int64[n], a permutation of 0..n-1 that depends on `key` alone."""
    return np.argsort(hashed(n, *key), kind="stable")


@njit(cache=CACHE)
def _swap(places: np.ndarray, n: int, keys: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    found = places.copy()
    for r in range(len(keys)):
        for i in range(len(found)):
            # x' = k_r - x mod n;  swap them if f_r(max(x, x')) = 1        (Hoang, Morris and Rogaway 2012, figure 1)
            x = found[i]
            other = offsets[r] - x
            other += n & (other >> 63)
            drawn = mix(keys[r] + np.uint64(max(x, other)) * GOLDEN) >> np.uint64(63)
            found[i] = x + (other - x) * np.int64(drawn)
    return found


class Shuffle:
    """A permutation of 0..n-1 that depends on `key` alone, of which any place is found without the others.

    Swap-or-not (Hoang, Morris and Rogaway, An Enciphering Scheme Based on a Card Shuffle, arXiv 1208.1176).
    """

    def __init__(self, n: int, *key: object) -> None:
        self.n, self._keys = n, hashed(ROUNDS * n.bit_length(), *key)
        self._offsets = (mix(self._keys) % np.uint64(max(1, n))).astype(np.int64)

    def at(self, places: np.ndarray) -> np.ndarray:
        """int64[k], what stands at `places` int64[k], each in 0..n-1."""
        return _swap(places, self.n, self._keys, self._offsets)

    def __getitem__(self, place: int) -> int:
        return int(self.at(np.array([place]))[0])

    def place(self, item: int) -> int:
        """Inverse of `shuffle[place]`: every round is its own."""
        return int(_swap(np.array([item]), self.n, self._keys[::-1], self._offsets[::-1])[0])


def shares(
    tokens: Mapping[str, int],
    temperature: float,
    max_share: float = 1,
    max_epochs: float = np.inf,
    budget: int = 0,
    before: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Share of each domain, summing to 1. A temperature below 1 lifts small domains.

    No domain gets more than `max_share`, nor is read more than `max_epochs` times in `budget` tokens and what was read
    `before` (tokens by domain); what is above goes to the other domains in proportion. Raises `ValueError` when the
    domains can't fill the run under these.
    """
    if not tokens or min(tokens.values()) < 1:
        raise ValueError(f"every domain needs at least one token to mix; given {dict(tokens)}; drop the empty domain")
    if max_epochs < np.inf and budget < 1:
        raise ValueError(f"max_epochs {max_epochs} needs `budget`, the tokens the run reads; given {budget}")
    read = before or {}
    limits = {
        d: min(max_share, max(0.0, max_epochs * count - read.get(d, 0)) / max(1, budget)) if budget else max_share
        for d, count in sorted(tokens.items())
    }
    if sum(limits.values()) < 1 - 1e-9:
        mend = f"raise max_epochs {max_epochs:g} or max_share {max_share:g}, shorten the run or add text"
        mend = mend if max_share * len(tokens) >= 1 else f"give max_share {1 / len(tokens):.3g} or more"
        raise ValueError(f"{limits}, as far as domains can be read, make {sum(limits.values()):.3g}, not 1; {mend}")
    # p_d = tokens_d^T / sum_j tokens_j^T        (Devlin et al. 2018, multilingual BERT)
    weights = {domain: float(count) ** temperature for domain, count in sorted(tokens.items())}
    made, capped = {domain: weight / sum(weights.values()) for domain, weight in weights.items()}, set[str]()
    while over := {domain for domain, share in made.items() if share > limits[domain]}:
        capped |= over
        # p_d = min(limit_d, c w_d), with the c at which they sum to 1
        free = sum(weight for domain, weight in weights.items() if domain not in capped)
        c = (1 - sum(limits[domain] for domain in capped)) / (free or 1)
        made = {domain: limits[domain] if domain in capped else c * weight for domain, weight in weights.items()}
    return made


def deviation(target: Mapping[str, float], counts: Mapping[str, int]) -> tuple[dict[str, float], float]:
    """(difference, p): realised less target share of each domain, and the probability of so uneven a draw by chance.

    `counts` are of rows or documents, not of tokens. Raises `ValueError` for a count in a domain without a share.
    """
    total = sum(counts.values())
    if total < 1 or any(target.get(domain, 0) <= 0 < count for domain, count in counts.items()):
        raise ValueError(f"counts {dict(counts)}, targets {dict(target)}: count rows, of domains that have a share")
    apart = {domain: counts.get(domain, 0) / total - share for domain, share in target.items()}
    # chi^2 = sum_d (n_d - n p_d)^2 / (n p_d) with D - 1 degrees of freedom        (Pearson 1900)
    terms = [total * apart[domain] ** 2 / share for domain, share in target.items() if share > 0]
    return apart, float(chdtrc(max(1, len(terms) - 1), sum(terms)))


def interleave(parts: Sequence[float], rows: int, *key: object) -> tuple[np.ndarray, np.ndarray]:
    """(lane[rows], ordinal[rows]): row r is row number `ordinal` of its lane. Lane counts are by largest remainder.

    Jittered stratified sampling: item k of a lane with c rows sits at (k + u) / c, so every prefix keeps the shares.
    """
    exact = np.asarray(parts, dtype=np.float64) * rows
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: rows - counts.sum()]] += 1
    lane, ordinal = np.repeat(np.arange(len(counts)), counts), np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((ordinal + hashed(rows, *key) / 2.0**64) / counts[lane], kind="stable")
    return lane[order], ordinal[order]
