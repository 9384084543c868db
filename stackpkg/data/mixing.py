"""Domain mixing with temperature, and the schedule that turns shares into an exact, evenly spread row order."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


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


def shares(tokens: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Share of each domain, summing to 1. A temperature below 1 lifts small domains."""
    if not tokens or min(tokens.values()) < 1:
        raise ValueError(f"every domain needs at least one token to mix; given {dict(tokens)}; drop the empty domain")
    # p_d = tokens_d^T / sum_j tokens_j^T        (Devlin et al. 2018, multilingual BERT)
    weights = {domain: float(count) ** temperature for domain, count in sorted(tokens.items())}
    return {domain: weight / sum(weights.values()) for domain, weight in weights.items()}


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
