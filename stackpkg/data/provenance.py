"""The record and its provenance: licence, verified hash, trust, time-to-live, uses. Every decision is audited."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from stackpkg import runs
from stackpkg.params import Data

# What metadata writes in many ways -> SPDX identifier; the first match wins.
SPDX = {
    "apache": "Apache-2.0", "mozilla|mpl": "MPL-2.0", "lgpl|lesser general": "LGPL-3.0-or-later",
    "gpl|general public": "GPL-3.0-or-later", "(2.clause|simplified).bsd|bsd.2": "BSD-2-Clause",
    "bsd|redistributions? of source": "BSD-3-Clause", "python software|psf|matplotlib": "PSF-2.0",
    r"\bisc": "ISC", r"\bmit\b|permission is hereby granted, free": "MIT", "unlicense": "Unlicense",
}  # fmt: skip
COPY = {"MIT", "MIT-0", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "Apache-2.0", "ISC", "PSF-2.0", "Zlib", "Unlicense"}


@dataclass(frozen=True, slots=True)
class Record:
    """One document and where it comes from (spec: Records)."""

    source: str  # e.g. pypi:numpy==2.4.6/numpy/version.py; no absolute path, no host
    domain: str
    licence: str  # SPDX expression, empty when unknown
    timestamp: int  # unix seconds
    text: str
    hash_status: str = "unpublished"  # or verified, or mismatch, against the hash its source published
    signature: str = ""
    trust: float = 0.0
    ttl_seconds: int = 0
    may_copy: bool = False
    may_use_tools: bool = False

    @property
    def record_id(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()[:16]

    @property
    def content_hash(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


class Audit(NamedTuple):
    """One decision, keep or drop, of one filter about one record."""

    record_id: str
    source: str
    filter: str
    value: float
    threshold: float
    decision: str


def spdx(stated: str, *hints: str) -> str:
    """SPDX licence: as stated (PEP 639), else read off older metadata fields; empty if they tell nothing."""
    found = (name for hint in hints for pattern, name in SPDX.items() if re.search(pattern, hint[:400].lower()))
    return stated or next(found, "")


def trust(record: Record, allowed: Sequence[str], agreement: bool) -> float:
    """Trust in [0, 1]. Content that contradicts its published hash has none, whatever else is known of it."""
    if record.hash_status == "mismatch":
        return 0.0
    listed, verified = record.source.startswith(tuple(allowed)), record.hash_status == "verified"
    # trust = 0.35 licence known + 0.30 hash verified (half if none published) + 0.25 source allowed + 0.10 agreement
    return round(0.35 * bool(record.licence) + 0.15 * (1 + verified) + 0.25 * listed + 0.10 * agreement, 4)


def assess(records: Sequence[Record], allowed: Sequence[str], ttl_seconds: int) -> list[Record]:
    """The records with trust, time-to-live and allowed uses; `allowed` holds the prefixes of the allow-list's sources.

    To copy, every part of the licence must permit it; tools need a licence that is known. Agreement is that another
    distribution, folder or file holds the same content.
    """
    origins, made = defaultdict(set), []
    for record in records:
        origins[record.content_hash].add(re.split("[/#]", record.source)[0])
    for record in records:
        parts = set(re.split(r" AND | OR |[()]", record.licence)) - {""}
        score = trust(record, allowed, agreement=len(origins[record.content_hash]) > 1)
        record = replace(record, trust=score, ttl_seconds=ttl_seconds, may_use_tools=bool(parts))
        made.append(replace(record, may_copy=bool(parts) and parts <= COPY))
    return made


def decide(audit: list[Audit], record: Record, **limits: tuple[float, str, float]) -> bool:
    """Whether a record passes every limit (value, ">=" or "<=", threshold); one audit row for each."""
    passed = {name: value >= limit if sign == ">=" else value <= limit for name, (value, sign, limit) in limits.items()}
    for name, (value, _, limit) in limits.items():
        verdict = "keep" if passed[name] else "drop"
        audit.append(Audit(record.record_id, record.source, name, float(value), float(limit), verdict))
    return all(passed.values())


def admit(records: Iterable[Record], data: Data, now: int, audit: list[Audit]) -> list[Record]:
    """Records with trust of at least `data.min_trust` that are within their time-to-live at `now` (unix seconds)."""
    limits = ((r, (r.trust, ">=", data.min_trust), (now - r.timestamp, "<=", r.ttl_seconds)) for r in records)
    return [record for record, score, age in limits if decide(audit, record, trust=score, time_to_live=age)]


def row(record: Record) -> dict[str, Any]:
    """A record as a row of `records.parquet`."""
    return {"record_id": record.record_id, "content_hash": record.content_hash} | asdict(record)


def write(path: Path, rows: Iterable[dict[str, Any]], **stamp: str) -> Path:
    """One Parquet file, whole or not at all; `stamp` goes into its metadata."""
    with runs.replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows)).replace_schema_metadata(stamp), temporary, compression="zstd")
    return path


def load(path: Path) -> list[Record]:
    """The records of a `records.parquet`."""
    return [Record(**item) for item in pq.read_table(path, columns=[f.name for f in fields(Record)]).to_pylist()]
