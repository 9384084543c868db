"""Text that documents share: paragraphs that many repeat, and runs of words that evaluation sets hold too.

Hashes are held in memory, never texts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numba import njit

from stackpkg.data import dedup, records, sketches
from stackpkg.data.sketches import CACHE, FNV, GOLDEN, PRIME, ZERO, finalise

BITS = np.uint64(40)
COMMON = 10  # an n-gram of more documents than this is boilerplate (Brown et al. 2020, appendix C)
WORD = re.compile(rb"[0-9A-Za-z_\x80-\xff]+")  # as the kernels part words
PARAGRAPHS = pa.schema([("record_id", pa.string()), ("paragraph", pa.int64()), ("documents", pa.int64())])
CONTAMINATED = pa.schema(
    {"record_id": pa.string(), "evaluation": pa.string(), "shared": pa.int64(), "share": pa.float64()}
    | {"excerpt": pa.string()}
)
REPORT = pa.schema(
    {"evaluation_set": pa.string(), "documents": pa.int64(), "too_short": pa.int64(), "found": pa.int64()}
    | {"largest_share": pa.float64(), "records": pa.int64()}
)


@njit(nogil=True, cache=CACHE)
def _paragraphs(text: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """uint64[paragraphs], a hash of the words, and int64[paragraphs, 3]: words, first byte of the first, end of the
    last. Blank lines part paragraphs, white space parts words, A to Z count as a to z."""
    most, count, i = (stop - start) // 3 + 1, 0, start
    hashes, places = np.empty(most, np.uint64), np.empty((most, 3), np.int64)
    while True:
        while i < stop and text[i] <= 32:
            i += 1
        if i >= stop:
            return hashes[:count], places[:count]
        total, words, first, last, lines = ZERO, 0, i, i, 0
        while i < stop and lines < 2:
            word, lines = FNV, 0
            while i < stop and text[i] > 32:
                lower = text[i] + 32 if 65 <= text[i] <= 90 else text[i]
                word, i = (word ^ np.uint64(lower)) * PRIME, i + 1
            total, words, last = finalise(total * GOLDEN + word), words + 1, i
            while i < stop and text[i] <= 32:
                lines, i = lines + (text[i] == 10), i + 1
        hashes[count], places[count, 0], places[count, 1], places[count, 2] = total, words, first, last
        count += 1


def repeated_paragraphs(
    parts: Sequence[Path], min_words: int, repeats: int, preference: Mapping[str, float]
) -> pa.Table:
    """`PARAGRAPHS` to cut: those of `min_words` words or more that are in more than `repeats` documents, everywhere but
    in the best one (preference: trust, then length, age, id). `paragraph` is its number in the text, from 0;
    `documents`, how many hold it. Raises `ValueError` for `repeats` below 1."""
    if repeats < 1:
        raise ValueError(f"repeats = {repeats}: a paragraph of one document is no repeat; give 1 or more")
    tables, found, at = [dedup.ABOUT.empty_table()], [(np.empty(0, np.uint64), *[np.empty(0, np.int64)] * 2)], 0
    for batch in sketches.batches(parts, "record_id", "timestamp"):
        tables.append(dedup.about(batch, preference))
        for document, row in enumerate(batch.rows, at):
            hashes, places = _paragraphs(batch.text, batch.ends[row], batch.ends[row + 1])
            long = np.flatnonzero(places[:, 0] >= min_words)
            found.append((hashes[long], np.full(len(long), document), long))
        at += len(batch.rows)
    about, (hashes, documents, numbers) = pa.concat_tables(tables), map(np.concatenate, zip(*found, strict=True))
    order = np.lexsort((numbers, np.argsort(dedup.ranked(about))[documents], hashes))
    hashes, documents, numbers = hashes[order], documents[order], numbers[order]
    new = np.diff(hashes, prepend=~hashes[:1]) != 0
    run = np.cumsum(new) - 1
    holders = np.bincount(run, weights=new | (np.diff(documents, prepend=-1) != 0))[run].astype(np.int64)
    cuts = (holders > repeats) & (documents != documents[new][run])
    columns = [about["record_id"].take(documents[cuts]), numbers[cuts], holders[cuts]]
    return pa.table(columns, schema=PARAGRAPHS).sort_by([("record_id", "ascending"), ("paragraph", "ascending")])


def cut(part: pa.Table, table: pa.Table | Path) -> pa.Table:
    """A stage: the part without the paragraphs of `PARAGRAPHS`, whole lines each; a decision `paragraph_repeats` in
    every kept row: how many were cut; drop, when nothing is left. Other paragraphs stay as they are."""
    table = pq.read_table(table) if isinstance(table, Path) else table
    mine, numbers = table.filter(pc.is_in(table["record_id"], part["record_id"].combine_chunks())), defaultdict(set)
    for name, number in zip(mine["record_id"].to_pylist(), mine["paragraph"].to_pylist(), strict=True):
        numbers[name].add(number)
    rows: list[dict[str, Any]] = []
    for row in part.to_pylist():
        if row.setdefault("kept", True):
            text, gone = row["text"], numbers.get(row["record_id"], set())
            row["text"] = _without(text.encode(), gone).decode() if gone else text
            row["kept"] = not gone or bool(row["text"].strip())
            decision = {"filter": "paragraph_repeats", "value": float(len(gone)), "threshold": 0.0}
            decision["decision"] = ("mask" if row["kept"] else "drop") if gone else "keep"
            row["decisions"] = [*(row.get("decisions") or []), decision]
        rows.append(row)
    schema = part.schema
    for name, kind in (("kept", pa.bool_()), ("decisions", records.DECISIONS)):
        schema = schema if name in schema.names else schema.append(pa.field(name, kind))
    return pa.Table.from_pylist(rows, schema)


def _without(text: bytes, numbers: Collection[int]) -> bytes:
    """A text without some of its paragraphs: each goes with its lines and the blank ones up to the next."""
    firsts = _paragraphs(np.frombuffer(text, np.uint8), 0, len(text))[1][:, 1].tolist()
    begins = [0, *(text.rfind(b"\n", 0, first) + 1 for first in firsts[1:]), len(text)]
    return b"".join(text[begins[k] : begins[k + 1]] for k in range(len(firsts)) if k not in numbers)


class Grams(NamedTuple):
    """Of a document: its number, record_id or source, its distinct n-grams, where each is first, whether it has any."""

    number: int
    name: str
    hashes: np.ndarray
    places: np.ndarray
    long: bool


def _grams(paths: Sequence[Path], name: str, n: int, wanted: np.ndarray | None = None) -> Iterator[Grams]:
    """The n-grams of each document; only the wanted ones, if those are given, sorted."""
    ring, number, start = np.empty(n, np.uint64), 0, np.zeros(1 << 24, bool)
    start[slice(None) if wanted is None else wanted >> BITS] = True  # tells most others apart by 24 bits
    for batch in sketches.batches(paths, name):
        names = batch.table[name].take(pa.array(batch.rows)).to_pylist()
        out = np.empty(int(np.diff(batch.ends).max(initial=0)) // 2 + 2, np.uint64)
        for row, label in zip(batch.rows, names, strict=True):
            count = sketches.shingles(batch.text, batch.ends[row], batch.ends[row + 1], ring, out)
            long = bool(count) and bool(ring.all())  # else it has fewer words than n
            places = np.flatnonzero(start[out[:count] >> BITS]) if long else np.arange(0)
            places = places if wanted is None else places[np.isin(out[places], wanted)]
            hashes, first = np.unique(out[places], return_index=True)
            yield Grams(number, label, hashes, places[first], long)
            number += 1


def contaminated(parts: Sequence[Path], evaluation: Sequence[Path], words: int) -> pa.Table:
    """`CONTAMINATED`: each record and each evaluation document that share an n-gram of `words` words, in lower case,
    without punctuation (Brown et al. 2020, appendix C). `shared` counts distinct n-grams, `share` is their
    share of the evaluation document's, `excerpt` is the first in the record.

    No evidence is what more than COMMON evaluation documents hold (a template of the set) or more than COMMON
    records (boilerplate, after the paper): so look for contamination after duplicates are removed. An evaluation
    document of fewer words has no n-gram; `report` counts those.
    """
    tests = list(_grams(evaluation, "source", words))
    owners, owned = _pairs(tests)
    rare = _rare(owned)
    owners, owned = owners[rare], owned[rare]
    order = np.argsort(owned, kind="stable")
    owners, owned, sizes = owners[order], owned[order], np.bincount(owners, minlength=len(tests))
    hits = [gram for gram in _grams(parts, "record_id", words, np.unique(owned)) if len(gram.hashes)]
    places = np.concatenate([np.empty(0, np.int64), *(gram.places for gram in hits)])
    where, shared = _pairs(hits)
    rare = _rare(shared)
    where, shared, places = where[rare], shared[rare], places[rare]
    low, high = np.searchsorted(owned, shared), np.searchsorted(owned, shared, side="right")
    met = np.repeat(np.arange(len(shared)), high - low)
    tested = owners[np.arange(len(met)) - np.repeat(np.cumsum(high - low) - high, high - low)]
    pairs, back, counts = np.unique(np.stack([where[met], tested]), axis=1, return_inverse=True, return_counts=True)
    first = np.full(pairs.shape[1], np.iinfo(np.int64).max)
    np.minimum.at(first, back.ravel(), places[met])
    excerpts = _excerpts(parts, [(hits[a].number, int(k)) for a, k in zip(pairs[0], first, strict=True)], words)
    names = [[hits[k].name for k in pairs[0]], [tests[k].name for k in pairs[1]]]
    table = pa.table([*names, counts, counts / sizes[pairs[1]], excerpts], schema=CONTAMINATED)
    return table.sort_by([("record_id", "ascending"), ("evaluation", "ascending")])


def _pairs(grams: Sequence[Grams]) -> tuple[np.ndarray, np.ndarray]:
    """int64 place in `grams` and uint64 hash of every n-gram."""
    where = np.repeat(np.arange(len(grams)), [len(gram.hashes) for gram in grams])
    return where, np.concatenate([np.empty(0, np.uint64), *(gram.hashes for gram in grams)])


def _rare(hashes: np.ndarray) -> np.ndarray:
    """bool, whether no more than COMMON documents hold it."""
    _, back, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    return counts[back] <= COMMON


def _excerpts(parts: Sequence[Path], wanted: Sequence[tuple[int, int]], words: int) -> list[str]:
    """`words` words from word k of document d, for each (d, k); white space as single spaces."""
    places, made, number = defaultdict(set), {}, 0
    for document, k in wanted:
        places[document].add(k)
    for batch in sketches.batches(parts):
        for document, row in enumerate(batch.rows, number):
            raw = batch.text[batch.ends[row] : batch.ends[row + 1]].tobytes() if document in places else b""
            for k in places.get(document, ()):
                spans = [match.span() for match in islice(WORD.finditer(raw), k, k + words)]
                made[document, k] = " ".join(raw[spans[0][0] : spans[-1][1]].decode().split())
        number += len(batch.rows)
    return [made[key] for key in wanted]


def report(found: pa.Table, evaluation: Sequence[Path], words: int) -> pa.Table:
    """`REPORT`, one row an evaluation set: its documents, those too short to look for, those found in the corpus, the
    largest share of one that was found, and the records that hold some. A set is what stands before `#` in a source,
    or before the first `/`."""
    sets: dict[str, list[Grams]] = defaultdict(list)
    for gram in _grams(evaluation, "source", words):
        sets[_set(gram.name)].append(gram)
    rows = []
    for name, grams in sorted(sets.items()):
        hits = [row for row in found.to_pylist() if _set(row["evaluation"]) == name]
        short, worst = sum(not gram.long for gram in grams), max((row["share"] for row in hits), default=0.0)
        many = [len({row[column] for row in hits}) for column in ("evaluation", "record_id")]
        rows.append((name, len(grams), short, many[0], worst, many[1]))
    return pa.table([list(column) for column in zip(*rows, strict=True)] or [[]] * len(REPORT), schema=REPORT)


def _set(source: str) -> str:
    return source.partition("#" if "#" in source else "/")[0]
