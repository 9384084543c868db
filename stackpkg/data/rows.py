"""Rows of JSONL (plain, gzip, zstd), Parquet, Arrow files and Hugging Face datasets ids, a few at a time."""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi

from stackpkg.data.items import COLUMNS, LARGEST, UNREADABLE, Item, below, reason, string
from stackpkg.params import Source

ENDINGS = {
    "jsonl": tuple(f".{name}{packed}" for name in ("jsonl", "ndjson", "json") for packed in ("", ".gz", ".zst")),
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather", ".ipc"),
}
BATCH, CHUNK, SMALL = 256, 1 << 18, 1 << 12  # rows; bytes read at once; bytes that a break in zstd may cost
LONGEST_ID = 256  # characters
Row = dict[str, Any] | Exception


def items(source: Source, path: Path, prefix: str) -> Iterator[Item]:
    """Every row of a file, of a folder of such files in the order of their names, or of a datasets id.

    Rows may state any of `items.COLUMNS`; a row with an `id` is named by it, another by its number. A file that
    breaks ends with an item that says why.
    """
    if source.kind == "datasets":
        yield from _items(source, prefix, _hub(source, path), 0)
        return
    read = {"jsonl": _jsonl, "parquet": _parquet, "arrow": _arrow}[source.kind]
    for name, file in below(path):
        label = f"{prefix}{name}#" if name else prefix
        if isinstance(file, Path) and name and not name.lower().endswith(ENDINGS[source.kind]):
            file = ValueError(f"its name ends in none of {', '.join(ENDINGS[source.kind])}")
        if isinstance(file, Exception):
            yield Item(label.rstrip("#"), file)
        else:
            yield from _items(source, label, read(file, source.text_field), file.stat().st_mtime)


def _items(source: Source, label: str, rows: Iterator[Row], stamp: float) -> Iterator[Item]:
    count = 0
    try:
        for row in rows:
            try:
                yield _item(source, label, count, row, stamp)
            except UNREADABLE as error:
                yield Item(f"{label}{count}", error)
            count += 1
        if not count:
            raise ValueError("holds no rows")
    except UNREADABLE as error:
        yield Item(label.rstrip("#"), ValueError(f"after {count} rows: {reason(error)}") if count else error)


def _item(source: Source, label: str, count: int, row: Row, stamp: float) -> Item:
    if isinstance(row, Exception):
        raise row
    if source.text_field not in row:
        there = ", ".join(map(str, [*row][:8]))
        raise ValueError(f"no column {source.text_field!r} among {there}: set text_field")
    stated = {key: row[key] for key in COLUMNS if row.get(key) is not None}
    own = str(stated["id"]) if type(stated.get("id")) is int else string("id", stated.get("id"))
    if len(own) > LONGEST_ID:
        raise ValueError(f"id is longer than {LONGEST_ID} characters")
    licence = source.licence or stated.get("licence") or row.get("license")  # both spellings are about
    stated |= {"licence": licence, "timestamp": stated.get("timestamp") or stamp}
    domain = source.domain or string("domain", stated.get("domain")) or "text"
    return Item(f"{label}id={own}" if own else f"{label}{count}", row[source.text_field], domain, stated)


def _opened(raw: BinaryIO) -> Callable[[], bytes]:
    """What reads the next bytes of a file, unpacked when it begins as gzip or zstd does, whatever its name."""
    head = raw.read(4)
    raw.seek(0)
    if head.startswith(b"\x1f\x8b"):
        return partial(gzip.GzipFile(fileobj=raw).read1, CHUNK)  # gives every byte before a break
    if head == b"\x28\xb5\x2f\xfd":
        return partial(pa.CompressedInputStream(raw, "zstd").read, SMALL)
    return partial(raw.read, CHUNK)


def _lines(read: Callable[[], bytes]) -> Iterator[bytes | None]:
    """Lines without their ends; None for one of more than LARGEST bytes, which is never held."""
    rest, skipping = b"", False
    while chunk := read():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield None if skipping or len(line) > LARGEST else line
            skipping = False
        if len(rest) > LARGEST:
            rest, skipping = b"", True
    if rest or skipping:
        yield None if skipping else rest


def _jsonl(file: Path, field: str) -> Iterator[Row]:
    with file.open("rb") as raw:
        for count, line in enumerate(_lines(_opened(raw))):
            if not count and line and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise ValueError("UTF-16: convert it to UTF-8")
            if line is None or line.strip():
                yield _parsed(line if count or line is None else line.removeprefix(b"\xef\xbb\xbf"))


def _parsed(line: bytes | None) -> Row:
    if line is None:
        return ValueError(f"longer than {LARGEST} bytes")
    if b"\x00" in line:
        return ValueError("holds a NUL byte: not text")
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        return error
    return row if isinstance(row, dict) else ValueError(f"a row is {type(row).__name__}, not an object")


def _parquet(file: Path, field: str) -> Iterator[Row]:
    with file.open("rb") as raw:
        opened = pq.ParquetFile(raw, buffer_size=CHUNK)  # pages, not whole row groups, are in memory
        wanted = _wanted(opened.schema_arrow, field)
        for group in range(opened.num_row_groups):  # a broken one leaves those before it whole
            yield from _rows(opened.iter_batches(BATCH, [group], wanted))


def _arrow(file: Path, field: str) -> Iterator[Row]:
    with file.open("rb") as raw:
        framed = raw.read(6) == b"ARROW1"  # else the stream format, which `datasets` saves
    with pa.memory_map(str(file)) as mapped:
        opened = (pa.ipc.open_file if framed else pa.ipc.open_stream)(mapped)
        batches = (opened.get_batch(k) for k in range(opened.num_record_batches)) if framed else opened
        wanted = _wanted(opened.schema, field)
        yield from _rows(
            batch.select(wanted).slice(start, BATCH) for batch in batches for start in range(0, len(batch), BATCH)
        )


def _wanted(schema: pa.Schema, field: str) -> list[str]:
    if field not in schema.names:
        raise ValueError(f"no column {field!r} among {', '.join(schema.names)}: set text_field")
    if not _textual(schema.field(field).type):
        raise ValueError(f"column {field!r} is {schema.field(field).type}, not text")
    return [name for name in schema.names if name in (field, "license", *COLUMNS)]


def _textual(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _rows(batches: Iterable[pa.RecordBatch]) -> Iterator[Row]:
    """Text as bytes: a row that is not UTF-8 must not take its neighbours along."""
    for batch in batches:
        columns = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in batch.columns]
        plain = [column.cast(pa.large_binary()) if _textual(column.type) else column for column in columns]
        yield from pa.RecordBatch.from_arrays(plain, batch.schema.names).to_pylist()


def _hub(source: Source, path: Path) -> Iterator[Row]:
    """Rows of a datasets id; those that state no time have that of the last change, on the hub or on disk."""
    import datasets  # a second to import, and only this kind of source needs it

    try:
        place, changed = str(path) if path.exists() else source.path, cache(partial(_changed, source.path, path))
        for row in datasets.load_dataset(place, split=source.split, streaming=True):
            yield row | {"timestamp": row.get("timestamp") or changed()}
    except Exception as error:  # its own, the hub's and those of every format it reads
        raise ValueError(f"datasets: {reason(error)}") from error


def _changed(name: str, path: Path) -> Any:
    return path.stat().st_mtime if path.exists() else HfApi().dataset_info(name).last_modified
