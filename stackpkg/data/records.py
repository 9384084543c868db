"""The record: one document with its provenance, as a row of an Arrow table (spec: Records), and its audit rows."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

SCHEMA = pa.schema(
    [
        ("record_id", pa.string()),  # the first 16 digits of sha256(source)
        ("source", pa.string()),  # e.g. pypi:numpy==2.4.6/numpy/version.py; no absolute path, no host
        ("domain", pa.string()),
        ("licence", pa.string()),  # SPDX expression, empty when unknown
        ("timestamp", pa.int64()),  # unix seconds
        ("text", pa.large_string()),
        ("content_hash", pa.string()),  # sha256 of the text as read, hexadecimal
        ("hash_status", pa.string()),  # unpublished, verified or mismatch, against the hash its source published
        ("signature", pa.string()),  # base64 ed25519 over content hash and source, or empty
        ("ttl_seconds", pa.int64()),  # 0: the profile's
        ("may_copy", pa.bool_()),
        ("may_use_tools", pa.bool_()),
    ]
)
DECISION = pa.struct(
    [("filter", pa.string()), ("value", pa.float64()), ("threshold", pa.float64()), ("decision", pa.string())]
)
DECISIONS = pa.list_(DECISION)  # one entry for each filter that looked at the record: keep, drop, or mask
AUDIT = pa.schema([("record_id", pa.string()), ("source", pa.string()), *DECISION])
EMPTY: dict[str, Any] = {"timestamp": 0, "ttl_seconds": 0}
COPY = {"MIT", "MIT-0", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "Apache-2.0", "ISC", "PSF-2.0", "Zlib", "Unlicense"}


def uses(licence: str) -> tuple[bool, bool]:
    """(may_copy, may_use_tools): to copy, every part of the licence must permit it; tools need one that is known."""
    parts = set(re.split(r" AND | OR |[()]", licence)) - {""}
    known = bool(parts) and not parts & {"NONE", "NOASSERTION"}  # SPDX 2.3, 7.13: nothing is stated
    return known and parts <= COPY, known


def table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """A table of `SCHEMA`; what a row does not state is empty or 0, and its uses are those that its licence permits."""
    made = [{name: row.get(name, EMPTY.get(name, "")) for name in SCHEMA.names} for row in rows]
    permits = {licence: uses(licence) for licence in {row["licence"] for row in made}}
    for row in made:
        row["may_copy"], row["may_use_tools"] = permits[row["licence"]]
    return pa.Table.from_pylist(made, SCHEMA)


def audit_rows(part: pa.Table) -> pa.Table:
    """`AUDIT`: one row a decision, of a table with record_id, source and decisions."""
    lists = part["decisions"].combine_chunks()
    rows, found = part.select(["record_id", "source"]).take(pc.list_parent_indices(lists)), pc.list_flatten(lists)
    columns = [rows["record_id"], rows["source"], *(pc.struct_field(found, field.name) for field in DECISION)]
    return pa.table(columns, schema=AUDIT)


def kept(part: pa.Table) -> pa.Table:
    """The rows that no stage has dropped."""
    return part.filter(part["kept"]) if "kept" in part.column_names else part
