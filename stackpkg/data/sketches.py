"""Kernels over the words of UTF-8 text: shingles, sketches, band keys, exact Jaccard. They hold no lock: threads share
the work. A word is a run of letters, digits, `_` and non-ASCII characters; A to Z count as a to z.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numba import njit

from stackpkg.data.mixing import CACHE, GOLDEN, mix

SIZE = 128  # values of a sketch
EMPTY = np.uint32(0xFFFFFFFF)  # what a sketch of no words is made of
FOLD = np.where(np.isin(np.arange(256), [*b"0123456789_abcdefghijklmnopqrstuvwxyz", *range(128, 256)]), range(256), 0)
FOLD[65:91] = range(97, 123)
FOLD = FOLD.astype(np.uint64)  # byte -> lower case, 0 where it parts words
FNV, PRIME, ZERO, ONE = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3), np.uint64(0), np.uint64(1)
TURN, KEEP, HALF, LOW = np.uint64(24), np.uint64(40), np.uint64(32), np.uint64(0xFFFFFFFF)
finalise = njit(inline="always")(mix)


class Batch(NamedTuple):
    """Rows of one row group that no stage has dropped, as they lie in memory: nothing is copied."""

    table: pa.RecordBatch  # with the columns asked for besides the text
    text: np.ndarray  # uint8, of all rows
    ends: np.ndarray  # int64[rows + 1], where each row's text ends
    rows: np.ndarray  # int64, those that are kept


def batches(parts: Sequence[Path], *columns: str) -> Iterator[Batch]:
    """The parts of a corpus, one row group after another, without the rows that an earlier stage dropped."""
    for path in parts:
        with pq.ParquetFile(path) as file:
            names = [name for name in ("kept", *columns) if name in file.schema_arrow.names]
            for group in file.iter_batches(1_000, columns=["text", *names]):
                text = group["text"].cast(pa.large_string())
                ends = np.frombuffer(text.buffers()[1], np.int64)[text.offset : text.offset + len(text) + 1]
                kept = group["kept"].to_numpy(zero_copy_only=False) if "kept" in names else np.ones(len(text), bool)
                yield Batch(group, np.frombuffer(text.buffers()[2] or b" ", np.uint8), ends, np.flatnonzero(kept))


@njit(nogil=True, cache=CACHE)
def shingles(text: np.ndarray, start: int, stop: int, ring: np.ndarray, out: np.ndarray) -> int:
    """Hashes of every len(ring) consecutive words of text[start:stop] into `out`; returns how many. A document of
    fewer words has one shingle, of none no shingle."""
    n, power, total, words, place, i = len(ring), ONE, ZERO, 0, 0, start
    ring[:] = ZERO
    for _ in range(n):
        power *= GOLDEN
    while True:
        while i < stop and FOLD[text[i]] == ZERO:
            i += 1
        if i >= stop:
            return max(words - n + 1, min(words, 1))
        word = FNV
        while i < stop and FOLD[text[i]] != ZERO:
            word, i = (word ^ FOLD[text[i]]) * PRIME, i + 1
        word = finalise(word)
        # H(w2..wn+1) = (H(w1..wn) - w1 G^(n-1)) G + wn+1        (Karp, Rabin 1987)
        total = total * GOLDEN + word - ring[place] * power
        ring[place], place = word, place + 1 if place + 1 < n else 0
        words += 1
        out[max(0, words - n)] = finalise(total)  # the first n words share a place


@njit(nogil=True, cache=CACHE)
def sketch(text: np.ndarray, ends: np.ndarray, rows: np.ndarray, n: int) -> np.ndarray:
    """uint32[rows, SIZE], the fast similarity sketch (Dahlgaard, Knudsen, Thorup 2017) of shingles of n words."""
    longest = 0
    for row in rows:
        longest = max(longest, ends[row + 1] - ends[row])
    hashes, ring, size = np.empty(longest // 2 + 2, np.uint64), np.empty(n, np.uint64), np.uint64(SIZE)
    out = np.full((len(rows), SIZE), EMPTY)
    for k in range(len(rows)):
        count = shingles(text, ends[rows[k]], ends[rows[k] + 1], ring, hashes)
        values, left, turn = out[k], SIZE if count else 0, ZERO
        while left > 0 and turn < size + size:  # the first turn fills most bins; the last ones, one bin each
            for j in range(count):
                place = ((hashes[j] & LOW) * size) >> HALF if turn < size else turn - size
                value = np.uint32((turn << TURN) | (hashes[j] >> KEEP))
                if value < values[place]:
                    left -= values[place] == EMPTY
                    values[place] = value
            turn += ONE
            if left > 0:
                for j in range(count):
                    hashes[j] = finalise(hashes[j] + GOLDEN)
    return out


@njit(nogil=True, cache=CACHE)
def band_keys(sketches: np.ndarray, order: np.ndarray, first: int, width: int) -> np.ndarray:
    """uint64[order], a hash of the values first..first+width-1 of each sketch."""
    keys = np.empty(len(order), np.uint64)
    for k in range(len(order)):
        key = ZERO
        for j in range(first, first + width):
            key = finalise(key * GOLDEN + np.uint64(sketches[order[k], j]))
        keys[k] = key
    return keys


@njit(nogil=True, cache=CACHE)
def agreement(sketches: np.ndarray, a: int, b: int) -> float:
    """Share of equal values: an estimate of the Jaccard, standard deviation sqrt(J (1 - J) / size)."""
    same = 0
    for j in range(sketches.shape[1]):
        same += sketches[a, j] == sketches[b, j]
    return same / sketches.shape[1]


@njit(nogil=True, cache=CACHE)
def shingle_sets(text: np.ndarray, ends: np.ndarray, rows: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted shingle hashes of each row, without repeats, one row after another, and int64[rows] how many each has."""
    total, sizes, ring = 1, np.zeros(len(rows), np.int64), np.empty(n, np.uint64)
    for row in rows:
        total += (ends[row + 1] - ends[row]) // 2 + 2
    out, begin = np.empty(total, np.uint64), 0
    for k in range(len(rows)):
        count = shingles(text, ends[rows[k]], ends[rows[k] + 1], ring, out[begin:])
        out[begin : begin + count].sort()
        last = begin
        for j in range(begin, begin + count):
            if j == begin or out[j] != out[last - 1]:
                out[last] = out[j]
                last += 1
        sizes[k], begin = last - begin, last
    return out[:begin].copy(), sizes


@njit(nogil=True, cache=CACHE)
def jaccard(hashes: np.ndarray, stops: np.ndarray, a: int, b: int) -> float:
    """|A and B| / |A or B| of the shingle sets hashes[stops[d]:stops[d + 1]] of two documents; 0 if both are empty."""
    i, j, common = stops[a], stops[b], 0
    while i < stops[a + 1] and j < stops[b + 1]:
        x, y = hashes[i], hashes[j]
        common += x == y
        i += x <= y
        j += y <= x
    union = stops[a + 1] - stops[a] + stops[b + 1] - stops[b] - common
    return common / union if union else 0.0


@njit(nogil=True, cache=CACHE)
def agreements(sketches: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64[pairs] of `agreement`."""
    out = np.empty(len(a))
    for k in range(len(a)):
        out[k] = agreement(sketches, a[k], b[k])
    return out


@njit(nogil=True, cache=CACHE)
def jaccards(hashes: np.ndarray, stops: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64[pairs] of `jaccard`."""
    out = np.empty(len(a))
    for k in range(len(a)):
        out[k] = jaccard(hashes, stops, a[k], b[k])
    return out
