"""The record: one document with its provenance, as a row of an Arrow table (spec: Records), and its audit rows."""

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
EMPTY: dict[str, Any] = {"timestamp": 0, "ttl_seconds": 0, "may_copy": False, "may_use_tools": False}


def table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """A table of `SCHEMA`; what a row does not state is empty, 0 or false."""
    return pa.Table.from_pylist([{n: row.get(n, EMPTY.get(n, "")) for n in SCHEMA.names} for row in rows], SCHEMA)


def audit_rows(part: pa.Table) -> pa.Table:
    """`AUDIT`: one row a decision, of a table with record_id, source and decisions."""
    lists = part["decisions"].combine_chunks()
    rows, found = part.select(["record_id", "source"]).take(pc.list_parent_indices(lists)), pc.list_flatten(lists)
    columns = [rows["record_id"], rows["source"], *(pc.struct_field(found, field.name) for field in DECISION)]
    return pa.table(columns, schema=AUDIT)


def kept(part: pa.Table) -> pa.Table:
    """The rows that no stage has dropped."""
    return part.filter(part["kept"]) if "kept" in part.column_names else part
