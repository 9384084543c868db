"""A document that is not read yet, and how it becomes a record: whatever its source wrote, each field is checked."""

import hashlib
import json
import math
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa

from stackpkg import runs

LARGEST = 1_000_000  # bytes; a longer file, line or text is data, not a document
LATEST = 7_258_118_400  # unix seconds of the year 2200
UNITS = {"milliseconds": 1e3, "microseconds": 1e6, "nanoseconds": 1e9}
SCORES = {"trust": (0.0, 1.0), "score": (-math.inf, math.inf), "language_score": (0.0, 1.0)}
COLUMNS = ("id", "domain", "licence", "timestamp", "content_hash", "signature", "ttl_seconds", *SCORES)
UNREADABLE = (OSError, ValueError, TypeError, LookupError, EOFError, OverflowError, RecursionError, zlib.error,
              pa.ArrowException)  # fmt: skip


class Item(NamedTuple):
    """A document that is not read yet. An exception as its content says why it cannot be read."""

    source: str
    content: Path | str | bytes | Exception | None
    domain: str = ""
    stated: Mapping[str, Any] = {}  # what its source says of it: any of COLUMNS


def record_id(source: str) -> str:
    """16 digits of the SHA-256 of a source, which names one document."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def domain_of(path: str) -> str:
    """Domain told from a file's name; empty for a file that is not text we read."""
    name, suffix = PurePosixPath(path).name, PurePosixPath(path).suffix.lower()
    if name.lower().startswith(("license", "licence", "copying", "notice")) and suffix != ".py":
        return "licences" if suffix in ("", ".txt", ".md", ".rst") else ""
    return "code" if suffix == ".py" else "documentation" if suffix in (".md", ".rst", ".txt") else ""


def below(path: Path) -> Iterator[tuple[str, Path | Exception]]:
    """(relative name, file) of each file below a folder, or of a file itself, in an order that names alone decide.

    Links are followed to files inside the folder only. In place of a file that cannot be read: the exception.
    """
    if not path.is_dir():
        yield "", path if path.is_file() else ValueError("not a regular file")
        return
    home, broken = path.resolve(), list[OSError]()
    for place, folders, names in os.walk(path, onerror=broken.append):
        folders.sort()
        for name in sorted([*names, *(entry for entry in folders if Path(place, entry).is_symlink())]):
            file = Path(place, name)
            yield file.relative_to(path).as_posix(), _checked(file, home)
    for error in broken:
        yield Path(error.filename).relative_to(path).as_posix(), error


def _checked(file: Path, home: Path) -> Path | Exception:
    try:
        linked = file.is_symlink()
        target = Path(os.path.realpath(file, strict=True)) if linked else file  # Path.resolve hides a loop's OSError
        if linked and (not target.is_relative_to(home) or target.is_dir()):
            raise ValueError(f"a link {'to a folder' if target.is_relative_to(home) else 'out of the folder'}")
        if not stat.S_ISREG(file.stat().st_mode):
            raise ValueError("not a regular file")
    except (OSError, ValueError) as error:
        return error
    return file


def string(name: str, value: Any) -> str:
    """Text of a field, empty for none. Raises `ValueError` when it is something else."""
    value = value.decode() if isinstance(value, bytes) else "" if value is None else value
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, not text")
    value.encode()  # half of a surrogate pair is no text
    return value


def number(name: str, value: Any, low: float, high: float) -> float:
    """A finite number of a field within [low, high]. Raises `ValueError` when it is something else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is {type(value).__name__}, not a number")
    if not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name} is {value:.6g}: give a finite number" + f" from {low:g} to {high:g}" * (low == 0))
    return value


def seconds(value: Any) -> int:
    """Unix seconds of a number, a datetime or ISO 8601; without a zone it is UTC."""
    value = value.decode() if isinstance(value, bytes) else value
    value = datetime.fromisoformat(value) if isinstance(value, str) else value
    if isinstance(value, datetime):
        value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, (int, float)) and LATEST < value < math.inf:
        unit = next((f"{name}? " for name, size in UNITS.items() if value / size <= LATEST), "")
        raise ValueError(f"timestamp is after the year 2200: {unit}give seconds")
    return int(number("timestamp", value, 0, LATEST))


def reason(error: Exception) -> str:
    """Why something could not be read: one line, the same for the same fault, without paths of this machine."""
    if isinstance(error, UnicodeError):
        return f"not UTF-8: {getattr(error, 'reason', error)}"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    said = " ".join(runs.portable(str(getattr(error, "strerror", None) or error)).split())
    return said.encode("utf-8", "backslashreplace").decode()[:120] or type(error).__name__


def record(item: Item) -> dict[str, Any]:
    """The item as a row of `records.SCHEMA`. Raises one of `UNREADABLE` when it cannot be one."""
    if isinstance(item.content, Exception):
        raise item.content
    source, stated, file = string("its name", item.source), item.stated, None
    if isinstance(item.content, Path):
        file = item.content
        with file.open("rb") as stream:
            raw = stream.read(LARGEST + 1)
    else:
        raw = item.content if isinstance(item.content, bytes) else string("text", item.content).encode()
    if len(raw) > LARGEST:
        raise ValueError(f"longer than {LARGEST} bytes")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("UTF-16: convert it to UTF-8")
    text = raw.decode("utf-8-sig")
    if "\x00" in text:
        raise ValueError("holds a NUL byte: not text")
    if file and source.endswith(".dist-info/METADATA"):
        text = text.partition("\n\n")[2]  # the long description
    if not text.strip():
        raise ValueError("no text")
    for name in SCORES.keys() & stated.keys():
        if stated[name] is not None:  # not used, but a broken one tells of a broken row
            number(name, stated[name], *SCORES[name])
    fields = {name: string(name, stated.get(name)) for name in ("licence", "content_hash", "signature")}
    stamp, published = stated.get("timestamp"), fields["content_hash"].lower()
    same = hashlib.sha256(raw).hexdigest() == published
    return fields | {
        "record_id": record_id(source),
        "source": source,
        "domain": item.domain,
        "timestamp": seconds(file.stat().st_mtime if file and not stamp else stamp),
        "text": text,
        "content_hash": hashlib.sha256(text.encode()).hexdigest(),
        "hash_status": "unpublished" if not published else "verified" if same else "mismatch",
        "ttl_seconds": int(number("ttl_seconds", stated.get("ttl_seconds") or 0, 0, 1e12)),
    }
