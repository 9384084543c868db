"""Exact and near duplicates: sketches, LSH bands, and every candidate verified by exact Jaccard over word shingles."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from stackpkg.data.mixing import GOLDEN, mix
from stackpkg.data.provenance import Record

CACHE = os.access(Path(__file__).parent, os.W_OK)  # a read-only install compiles the kernels anew in each process
SIZE, STAR = 112, 8  # values of a sketch; neighbours a document is compared with inside one bucket
WORD, LOWER = np.zeros(256, np.bool_), np.arange(256, dtype=np.uint64)
WORD[[*range(48, 58), *range(65, 91), 95, *range(97, 123), *range(128, 256)]] = True
LOWER[65:91] += np.uint64(32)
EMPTY, FNV, PRIME = np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
S7, S32, S57, LOW32 = np.uint64(7), np.uint64(32), np.uint64(57), np.uint64(0xFFFFFFFF)
_mix = njit(inline="always")(mix)


class Duplicate(NamedTuple):
    """A removed record, the one kept in its place, their exact Jaccard, and the kind: exact (same bytes) or near."""

    removed: str
    kept: str
    jaccard: float
    kind: str


@njit(cache=CACHE)
def _shingles(text: np.ndarray, ends: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of every n consecutive lower-cased words of the documents text[ends[d]:ends[d+1]], one after another, and
    where those of each document end. A document of fewer than n words has one shingle, of none no shingle."""
    out, stops, ring = np.empty(len(text) // 2 + len(ends), np.uint64), np.zeros_like(ends), np.zeros(n, np.uint64)
    for d in range(len(ends) - 1):
        ring[:] = FNV
        count, word, inside = 0, FNV, False
        for i in range(ends[d], ends[d + 1] + 1):
            byte = text[i] if i < ends[d + 1] else np.uint8(32)
            if WORD[byte]:
                word, inside = (word ^ LOWER[byte]) * PRIME, True
            elif inside:
                ring[count % n] = _mix(word)
                count, word, inside, total = count + 1, FNV, False, FNV
                for j in range(count, count + n):
                    total = total * GOLDEN + ring[j % n]
                out[stops[d] + max(0, count - n)] = _mix(total)  # the first n words share a place
        stops[d + 1] = stops[d] + (max(1, count - n + 1) if count else 0)
    return out[: stops[-1]], stops


@njit(cache=CACHE)
def _sketch(hashes: np.ndarray, stops: np.ndarray, size: int) -> np.ndarray:
    """uint64[documents, size], fast similarity sketching (Dahlgaard et al. 2017): a pass fills many bins."""
    sketches = np.full((len(stops) - 1, size), EMPTY)
    for d in range(len(stops) - 1):
        h, left, turn = hashes[stops[d] : stops[d + 1]].copy(), size, np.uint64(0)
        while len(h) and left > 0 and turn < np.uint64(127):
            for j in range(len(h)):
                place, value = ((h[j] & LOW32) * np.uint64(size)) >> S32, (turn << S57) | (h[j] >> S7)
                if value < sketches[d, place]:
                    left -= sketches[d, place] == EMPTY
                    sketches[d, place] = value
                h[j] = _mix(h[j] + GOLDEN)
            turn += np.uint64(1)
    return sketches


def bands_for(threshold: float) -> int:
    """Fewest bands that make a pair at `threshold` a candidate with probability 0.95 or more."""
    # P(candidate) = 1 - (1 - J^rows)^bands        (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4)
    return next((b for b in (4, 7, 8, 14, 16, 28, 56) if 1 - (1 - threshold ** (SIZE // b)) ** b >= 0.95), SIZE)


def _candidates(sketches: np.ndarray, threshold: float) -> np.ndarray:
    """int64[pairs, 2], documents that share a band and whose sketches agree; each meets STAR others a bucket."""
    found = [np.empty(0, np.int64)]
    for band in np.split(sketches, bands_for(threshold), axis=1):
        key = band[:, 0]
        for column in band.T[1:]:
            key = mix(key * GOLDEN + column)
        order = np.argsort(key, kind="stable")
        for gap in range(1, min(STAR + 1, len(order))):
            same = np.flatnonzero(key[order][gap:] == key[order][:-gap])
            found.append((order[same] << 32) | order[same + gap])
    codes = np.unique(np.concatenate(found))
    pairs = np.stack([codes >> 32, codes & 0xFFFFFFFF], axis=1)
    agree = [sketches[a, 0] != EMPTY and (sketches[a] == sketches[b]).mean() >= threshold - 0.15 for a, b in pairs]
    return pairs[np.array(agree, bool)]


def _jaccard(hashes: np.ndarray, stops: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """float64[pairs], |A and B| / |A or B| of the shingle sets of two documents."""
    sets = {d: np.unique(hashes[stops[d] : stops[d + 1]]) for d in np.unique(pairs).tolist()}
    common = np.array([np.intersect1d(sets[a], sets[b], assume_unique=True).size for a, b in pairs.tolist()])
    return common / np.maximum(1, [len(sets[a]) + len(sets[b]) for a, b in pairs.tolist()] - common)


def deduplicate(records: Sequence[Record], n: int, threshold: float) -> tuple[list[Record], list[Duplicate]]:
    """(kept, removed) by shingles of n words. Kept is the first by trust, length, age, id: input order is no matter.

    Linked documents form components. In each, the best is kept and takes out those whose exact Jaccard with it is at
    least `threshold`; then the best of the rest, and so on. So every removal is a verified pair.
    """
    first: dict[str, Record] = {}
    ranked = sorted(records, key=lambda r: (-r.trust, -len(r.text), r.timestamp, r.record_id))
    copies = [(record, first.setdefault(record.content_hash, record)) for record in ranked]
    docs = [record for record, original in copies if record is original]
    raw = [record.text.encode() for record in docs]
    hashes, stops = _shingles(np.frombuffer(b"".join(raw) or b" ", np.uint8), np.cumsum([0, *map(len, raw)]), n)
    pairs = _candidates(_sketch(hashes, stops, SIZE), threshold)
    a, b = pairs[_jaccard(hashes, stops, pairs) >= threshold].T
    component = connected_components(coo_array((np.ones(len(a)), (a, b)), (len(docs), len(docs))), directed=False)[1]
    waiting, near = np.flatnonzero(np.bincount(component)[component] > 1), {}
    while len(waiting):
        _, best, back = np.unique(component[waiting], return_index=True, return_inverse=True)
        chosen = waiting[best][back]
        scores = _jaccard(hashes, stops, np.stack([chosen, waiting], axis=1))
        for k in np.flatnonzero((waiting != chosen) & (scores >= threshold)).tolist():
            lost, kept = docs[waiting[k]].record_id, docs[chosen[k]].record_id
            near[lost] = Duplicate(lost, kept, float(scores[k]), "near")
        waiting = waiting[(waiting != chosen) & (scores < threshold)]
    exact = [Duplicate(r.record_id, o.record_id, 1.0, "exact") for r, o in copies if r is not o]
    moved = [near[item.kept]._replace(removed=item.removed) if item.kept in near else item for item in exact]
    return [record for record in docs if record.record_id not in near], [*moved, *near.values()]
