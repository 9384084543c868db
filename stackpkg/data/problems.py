"""Labelled files, read line by line: a line that is wrong is set aside with its place, what is wrong and the remedy."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from stackpkg.data.items import record_id

REFUSED = 0.1  # a file of which more is wrong was meant for something else


class Problem(NamedTuple):
    """A line, from 1 (in Parquet: a row) of a file, what is wrong with it, and how to mend it."""

    file: str
    line: int
    wrong: str
    mend: str


class Wrong(Exception):
    """Raised with (what is wrong, how to mend it) by what parses a line."""


def origin(source: str, licence: str = "") -> dict[str, Any]:
    """The columns that say where a row comes from."""
    return {"record_id": record_id(source), "source": source, "licence": licence}


def lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, row) of Parquet, else (number, bytes) of lines that aren't blank; .gz and .zst are unpacked."""
    if path.suffix == ".parquet":
        batches = pq.ParquetFile(path).iter_batches(1_000)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    else:
        with pa.input_stream(path) as packed, io.BufferedReader(packed) as stream:
            yield from ((number, line) for number, line in enumerate(stream, 1) if line.strip())


def sift(path: Path, parse: Callable[[int, Any], Any]) -> tuple[list[Any], list[Problem]]:
    """(made, problems): what `parse(number, line)` makes of each line, and the lines it is `Wrong` about."""
    made, found = [], []
    for number, line in lines(path):
        try:
            made.append(parse(number, line))
        except Wrong as error:
            found.append(Problem(path.name, number, *error.args))
    return made, found


def row(line: Any) -> dict[str, Any]:
    """The keys of a line of JSON, or of a row of Parquet, that have a value."""
    try:
        value = json.loads(line) if isinstance(line, bytes) else line
        json.dumps(value, ensure_ascii=False, default=str).encode()  # half a surrogate pair can't be written anywhere
    except (ValueError, RecursionError) as error:
        raise Wrong(f"no JSON in UTF-8: {error}", "write one object on each line") from None
    if not isinstance(value, dict):
        raise Wrong(f"a {type(value).__name__}, no object", "write one object on each line, no list around them")
    return {key: item for key, item in value.items() if item is not None}


def text(found: dict[str, Any], key: str, where: str = "") -> str:
    """The text below a key, which must be there, be text and say something."""
    value = found.get(key)
    if not isinstance(value, str) or not value.strip():
        wrong = "empty" if isinstance(value, str) else "missing" if value is None else f"a {type(value).__name__}"
        raise Wrong(f"`{key}` is {wrong}{where}", f"give a text for `{key}`, or drop the line")
    return value


def check(path: Path, usable: int, found: Sequence[Problem]) -> None:
    """Raises `ValueError`, with the first problems, when nothing of a file is usable or over `REFUSED` of it wrong."""
    if not usable or len(found) > REFUSED * (usable + len(found)):
        shown = "\n".join(f"{item.file}:{item.line}: {item.wrong}; {item.mend}" for item in found[:10])
        raise ValueError(f"{path}: {usable} usable rows, {len(found)} problems; a tenth may be wrong. Mend:\n{shown}")
