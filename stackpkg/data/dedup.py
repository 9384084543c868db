"""Exact and near duplicates of a corpus on disk: sketches, LSH bands, and every candidate verified by exact Jaccard.

Two passes over the parts. What is held in memory: a sketch of 512 bytes and some 400 bytes more for each distinct text,
for one with many copies up to 16 bytes for each of 32 neighbours, and the shingle hashes of texts that have a
candidate. The order of parts and records and the threads are no matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from xxhash import xxh3_128_digest

from stackpkg.data import sketches as kernels

DUPLICATES = pa.schema(
    {
        "removed": pa.string(),
        "kept": pa.string(),
        "linked": pa.string(),
        "jaccard": pa.float64(),
        "kind": pa.string(),
    }
)
ABOUT = pa.schema(
    {
        "earlier": pa.int8(),
        "trust": pa.float64(),
        "length": pa.int64(),
        "timestamp": pa.int64(),
        "record_id": pa.string(),
    }
)
# The better of two records is of the earlier corpus, else more trusted, longer, older, of the lower id.
PREFERENCE = list(zip(ABOUT.names, ["descending"] * 3 + ["ascending"] * 2, strict=True))
STAR, BLOCK = 32, 32  # texts that one is paired with inside a bucket; texts that a thread takes at once
Pairs = tuple[np.ndarray, np.ndarray]


class Corpus(NamedTuple):
    """Records, and the distinct texts among them; both are numbered as they were read."""

    records: pa.Table  # ABOUT
    text_of: np.ndarray  # int64[records]
    sketches: np.ndarray  # uint32[texts, SIZE]


def about(batch: kernels.Batch, trust: Mapping[str, float], earlier: bool = False) -> pa.Table:
    """`ABOUT` the rows of a batch: length in bytes; trust 0 where none is given."""
    times, names = (batch.table[name].take(pa.array(batch.rows)) for name in ("timestamp", "record_id"))
    known = np.array([trust.get(name, 0.0) for name in names.to_pylist()], np.float64)
    lengths, side = np.diff(batch.ends)[batch.rows], np.full(len(known), earlier, np.int8)
    return pa.table([side, known, lengths, times, names], schema=ABOUT)


def ranked(records: pa.Table) -> np.ndarray:
    """int64[records], their numbers, the best first."""
    return pc.sort_indices(records, sort_keys=PREFERENCE).to_numpy().astype(np.int64)


def shape_for(threshold: float) -> tuple[int, int]:
    """(bands, rows): the longest bands that make a pair at `threshold` a candidate with probability 0.98 or more."""
    # P(candidate) = 1 - (1 - J^rows)^bands        (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4)
    shapes = ((kernels.SIZE // rows, rows) for rows in range(16, 0, -1))
    return next((b, r) for b, r in shapes if r == 1 or 1 - (1 - threshold**r) ** b >= 0.98)


def _spread(pool: ThreadPoolExecutor, kernel: Callable, batch: kernels.Batch, rows: np.ndarray, n: int) -> list:
    """What `kernel` makes of the rows, BLOCK by BLOCK, in their order."""
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    return list(pool.map(lambda block: kernel(batch.text, batch.ends, block, n), blocks))


def _read(sides: Sequence[Sequence[Path]], trust: Mapping[str, float], n: int, pool: ThreadPoolExecutor) -> Corpus:
    rows = sum(pq.read_metadata(path).num_rows for paths in sides for path in paths)
    sketches, text_of, seen = np.empty((rows, kernels.SIZE), np.uint32), list[int](), dict[bytes, int]()
    tables = [ABOUT.empty_table()]
    for side, paths in enumerate(sides):
        for batch in kernels.batches(paths, "record_id", "timestamp"):
            text, ends, new = batch.text.data, batch.ends.tolist(), list[int]()
            for row in batch.rows.tolist():
                known = len(seen)
                text_of.append(seen.setdefault(xxh3_128_digest(text[ends[row] : ends[row + 1]]), known))
                if text_of[-1] == known:
                    new.append(row)
            at = len(seen) - len(new)
            for block in _spread(pool, kernels.sketch, batch, np.array(new, np.int64), n):
                sketches[at : at + len(block)] = block
                at += len(block)
            tables.append(about(batch, trust, earlier=side == 0))
    return Corpus(pa.concat_tables(tables), np.array(text_of, np.int64), sketches[: len(seen)])


def _candidates(sketches: np.ndarray, by_rank: np.ndarray, threshold: float, floor: float) -> list[Pairs]:
    """Pairs of texts that share a band and whose sketches agree: first each text and the next one of its bucket in
    order of preference, then the one after that, up to STAR. So the work is bounded however large a bucket is."""
    bands, width = shape_for(threshold)
    worded, buckets, found = by_rank[sketches[by_rank, 0] != kernels.EMPTY], list[Pairs](), list[Pairs]()
    for band in range(bands):
        keys = kernels.band_keys(sketches, worded, band * width, width)
        order = np.argsort(keys, kind="stable")
        buckets.append((keys[order], worded[order].astype(np.uint32)))
    for gap in range(1, min(STAR + 1, max(2, len(worded)))):
        codes = [np.empty(0, np.int64)]
        for keys, texts in buckets:
            same = np.flatnonzero(keys[gap:] == keys[:-gap])
            codes.append(texts[same].astype(np.int64) << 32 | texts[same + gap])
        code = np.unique(np.concatenate(codes))
        code = code[kernels.agreements(sketches, code >> 32, code & 0xFFFFFFFF) >= floor]
        found.append((code >> 32, code & 0xFFFFFFFF))
    return found


def _sets(paths: Sequence[Path], corpus: Corpus, wanted: np.ndarray, n: int, pool: ThreadPoolExecutor) -> Pairs:
    """Shingle hashes of the wanted texts, and where those of each text begin and the last ends: int64[texts + 1]."""
    texts, first = np.unique(corpus.text_of, return_index=True)
    needed, begins = np.zeros(len(corpus.text_of), bool), np.zeros(len(texts) + 1, np.int64)
    needed[first[wanted]] = True
    hashes, sizes, at = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], 0
    for batch in kernels.batches(paths):
        rows = batch.rows[needed[at : at + len(batch.rows)]]
        at += len(batch.rows)
        for block, counts in _spread(pool, kernels.shingle_sets, batch, rows, n):
            hashes.append(block)
            sizes.append(counts)
    begins[1:][wanted] = np.concatenate(sizes)
    return np.concatenate(hashes), np.cumsum(begins)


def _components(texts: int, links: Sequence[Pairs]) -> np.ndarray:
    a, b = (np.concatenate(side) for side in zip(*links, strict=True))
    return connected_components(coo_array((np.ones(len(a), np.int8), (a, b)), (texts, texts)), directed=False)[1]


def _strongest(links: Sequence[Pairs], scores: np.ndarray, rank: np.ndarray) -> tuple[np.ndarray, ...]:
    """(text, other, Jaccard): for each linked text the most similar of those it is linked to, the better of equals."""
    a, b = (np.concatenate(side) for side in zip(*links, strict=True))
    one, other, score = np.concatenate([a, b]), np.concatenate([b, a]), np.concatenate([scores, scores])
    order = np.lexsort((rank[other], -score, one))
    first = order[np.unique(one[order], return_index=True)[1]]
    return one[first], other[first], score[first]


def deduplicate(
    parts: Sequence[Path], trust: Mapping[str, float], n: int, threshold: float, earlier: Sequence[Path] = ()
) -> pa.Table:
    """`DUPLICATES` of the parts of a corpus, by shingles of n words: removed and kept record; the record that the
    removed one was found to be a duplicate of, and their exact Jaccard; and the kind: exact (same bytes as the kept
    one), near, or earlier (kept is a record of `earlier`, of which none is removed).

    Texts whose exact Jaccard is at least `threshold` are linked; of each connected component the best by PREFERENCE is
    kept (Lee et al. 2022, Deduplicating Training Data Makes Language Models Better). So every removal is a verified
    pair, though the ends of a chain may be less alike than `threshold`.
    A text of fewer words than n is one shingle; a text of no words is a duplicate of its own bytes alone.
    Raises `ValueError` for a `record_id` that two records of the parts have.
    """
    floor = threshold - 3 * (threshold * (1 - threshold) / kernels.SIZE) ** 0.5  # three standard deviations below
    with ThreadPoolExecutor(numba.get_num_threads()) as pool:
        corpus = _read([earlier, parts], trust, n, pool)
        names, old = corpus.records["record_id"], corpus.records["earlier"].to_numpy().astype(bool)
        if repeated := np.count_nonzero(~old) - pc.count_distinct(names.filter(pa.array(~old))).as_py():
            raise ValueError(f"{repeated} records have the record_id of another: give each a source of its own")
        order = ranked(corpus.records)
        texts, first = np.unique(corpus.text_of[order], return_index=True)
        best, by_rank = order[first], np.argsort(first)
        fixed = old[best]
        found = _candidates(corpus.sketches, by_rank, threshold, floor)
        found = [(a[~(fixed[a] & fixed[b])], b[~(fixed[a] & fixed[b])]) for a, b in found]
        wanted = np.unique(np.concatenate([side for pair in found for side in pair]))
        hashes, begins = _sets([*earlier, *parts], corpus, wanted, n, pool)
        links, scores, label = [(texts[:0], texts[:0])], [np.empty(0)], texts
        for a, b in found:  # a pair of one component would join nothing
            apart = label[a] != label[b]
            a, b = a[apart], b[apart]
            exact = kernels.jaccards(hashes, begins, a, b)
            links.append((a[exact >= threshold], b[exact >= threshold]))
            scores.append(exact[exact >= threshold])
            label = _components(len(texts), links)
    rank, linked, jaccard = np.argsort(by_rank), texts.copy(), np.ones(len(texts))
    highest = np.full(len(texts), len(texts))
    np.minimum.at(highest, label, rank)
    stays = np.where(fixed, texts, by_rank[highest[label]])
    one, other, score = _strongest(links, np.concatenate(scores), rank)
    linked[one], jaccard[one] = other, score
    kept = best[stays[corpus.text_of]]
    removed = np.flatnonzero(~old & (kept != np.arange(len(kept))))
    near, kept = stays[corpus.text_of[removed]] != corpus.text_of[removed], kept[removed]
    kind = np.where(old[kept], "earlier", np.where(near, "near", "exact"))
    through = np.where(near, best[linked[corpus.text_of[removed]]], kept)
    score = np.where(near, jaccard[corpus.text_of[removed]], 1.0)
    columns = [names.take(removed), names.take(kept), names.take(through), score, pa.array(kind, pa.string())]
    return pa.table(columns, schema=DUPLICATES).sort_by("removed")
