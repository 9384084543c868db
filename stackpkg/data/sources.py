"""Text and its provenance from any kind of source, into parts: streaming, one part in memory, no silent loss."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stackpkg import runs
from stackpkg.data import distributions, engine, items, records, rows
from stackpkg.data.items import Item
from stackpkg.params import Source


def write_parts(sources: Sequence[Source], folder: Path, part_mb: float, audit: list[dict[str, Any]]) -> list[Path]:
    """Parts `folder/NNNNN.parquet` of `records.SCHEMA`, each of at most `part_mb` megabytes of text or one document.

    What cannot be read is set aside with a row of `records.AUDIT` in `audit`, `unreadable: <reason>`; so is a record
    whose source came before. The same input gives the same bytes. Held are one part and 8 bytes a document. Raises
    `ValueError` when a path does not exist or nothing at all could be read.
    """
    made, before, seen = list[Path](), len(audit), list[np.ndarray]()
    for part in _parts(read(sources, audit), part_mb * 1e6):
        new = _unseen(np.array([int(row["record_id"], 16) for row in part], np.uint64), seen)
        for row, fresh in zip(part, new, strict=True):
            if not fresh:
                why = ValueError("a record of this source came before: ids repeat")
                audit.append(_set_aside(f"{row['source']} (again)", why))  # the one before has the id
        if new.any():
            kept = records.table(row for row, fresh in zip(part, new, strict=True) if fresh)
            made.append(engine.write(folder / f"{len(made):05d}.parquet", kept))
    if not made:
        said = "; ".join(f"{why} ({n})" for why, n in Counter(row["filter"] for row in audit[before:]).most_common(3))
        raise ValueError(f"nothing could be read from {[prefix(s) for s in sources]}: {said or 'all empty'}")
    engine.tidy(folder, made)
    return made


def read(sources: Iterable[Source], audit: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of `records.SCHEMA` of each source in turn, up to its `max_mb` megabytes of text."""
    for source in sources:
        left = source.max_mb * 1e6
        for item in _items(source):
            try:
                row = items.record(item)
            except items.UNREADABLE as error:
                audit.append(_set_aside(item.source, error))
                continue
            left -= len(row["text"].encode())
            if left < 0:
                break
            yield row


def tally(given: Sequence[Source], read: pa.Table, audit: Sequence[Mapping[str, Any]]) -> pa.Table:
    """What came of each source: `source`, `read`, `unreadable` and `unlicensed` records (of those read), and the
    commonest reason why something was `set_aside`. `read` has source and licence."""
    made = []
    for name in dict.fromkeys(map(prefix, given)):
        mine = read.filter(pc.starts_with(read["source"], name))
        why = Counter(row["filter"] for row in audit if row["source"].startswith(name.rstrip("#/")))
        unlicensed = pc.sum(pc.equal(mine["licence"], "")).as_py() or 0
        said = why.most_common(1)[0][0] if why else ""
        made.append({"source": name, "read": len(mine), "unreadable": why.total(), "unlicensed": unlicensed,
                     "set_aside": said})  # fmt: skip
    return pa.Table.from_pylist(made)


def prefix(source: Source) -> str:
    """How the `source` of its every record begins; the allow-list of a run is made of these."""
    path = runs.root() / source.path  # a full path stays what it is
    if source.kind == "distributions":
        return "pypi:"
    name = source.path if source.kind == "datasets" and not path.exists() else path.name
    return f"{source.kind}:{name}" + ("/" if path.is_dir() and source.kind != "datasets" else "#")


def _items(source: Source) -> Iterator[Item]:
    if source.kind == "distributions":
        return distributions.items(source.domain, source.licence)
    path = runs.root() / source.path
    if not path.exists() and source.kind != "datasets":
        raise ValueError(f"source path {source.path!r} does not exist; give a file below the repository or a full path")
    if source.kind == "folder" and not path.is_dir():
        raise ValueError(f"source path {source.path!r} is not a folder; give one, or the kind that it is")
    return _folder(source, path) if source.kind == "folder" else rows.items(source, path, prefix(source))


def _folder(source: Source, path: Path) -> Iterator[Item]:
    for name, file in items.below(path):
        domain = source.domain or items.domain_of(name)
        if not domain and isinstance(file, Path):
            file = ValueError(
                f"no domain is told by *{file.suffix or ' without an ending'}: give the source a `domain`"
            )
        yield Item(prefix(source) + name, file, domain, {"licence": source.licence})


def _set_aside(source: str, error: Exception) -> dict[str, Any]:
    label = source.encode("utf-8", "backslashreplace").decode()
    name, why = items.record_id(label), f"unreadable: {items.reason(error)}"
    return {"record_id": name, "source": label, "filter": why, "value": 0.0, "threshold": 1.0, "decision": "drop"}


def _parts(found: Iterable[dict[str, Any]], limit: float) -> Iterator[list[dict[str, Any]]]:
    part, size = list[dict[str, Any]](), 0
    for row in found:
        length = len(row["text"].encode())
        if part and size + length > limit:
            yield part
            part, size = [], 0
        part.append(row)
        size += length
    if part:
        yield part


def _unseen(ids: np.ndarray, seen: list[np.ndarray]) -> np.ndarray:
    """bool[n], which of uint64[n] are new; `seen` holds the earlier ones in few sorted runs (O'Neil et al. 1996)."""
    new = np.zeros(len(ids), bool)
    new[np.unique(ids, return_index=True)[1]] = True
    for old in seen:
        new &= old[np.minimum(np.searchsorted(old, ids), len(old) - 1)] != ids
    if new.any():
        seen.append(np.sort(ids[new]))
    while len(seen) > 1 and len(seen[-2]) <= 2 * len(seen[-1]):
        seen[-2:] = [np.union1d(*seen[-2:])]
    return new
