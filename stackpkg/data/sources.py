"""Text and its provenance from installed distributions, folders, JSONL, Parquet and Hugging Face datasets ids."""

import base64
import csv
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from stackpkg import runs
from stackpkg.data.provenance import Audit, Record, spdx
from stackpkg.params import Source

LARGEST = 1_000_000  # bytes; a longer file is data, not a document
SHARES = {"code": 0.6, "documentation": 0.25, "licences": 0.15}  # of the bytes taken from distributions


class Item(NamedTuple):
    """A document that is not read yet."""

    source: str
    domain: str
    content: Path | str | None
    licence: str
    sha256: str = ""  # published by its source, hexadecimal
    timestamp: int = 0  # 0: the file's
    signature: str = ""


def read(sources: Iterable[Source], audit: list[Audit]) -> Iterator[Record]:
    """Records of each source in turn, up to its `max_mb` megabytes of text.

    What cannot be read becomes an audit row `unreadable: <reason>`: never fatal, never silent.
    """
    for source in sources:
        left = source.max_mb * 1e6
        for item in {"distributions": _distributions, "folder": _folder}.get(source.kind, _rows)(source):
            try:
                record = _record(item)
            except (OSError, ValueError) as error:
                reason = f"unreadable: {getattr(error, 'strerror', None) or error}"[:120]
                name = hashlib.sha256(item.source.encode()).hexdigest()[:16]
                audit.append(Audit(name, item.source, reason, 0.0, 1.0, "drop"))
                continue
            left -= len(record.text.encode())
            if left < 0:
                break
            yield record


def _record(item: Item) -> Record:
    file = item.content if isinstance(item.content, Path) else None
    if item.content is None or (file and file.stat().st_size > LARGEST):
        raise ValueError(f"longer than {LARGEST} bytes" if file else "no text in this row")
    raw = file.read_bytes() if file else str(item.content).encode()
    text = raw.decode("utf-8-sig")
    if "\x00" in text:
        raise ValueError("holds a NUL byte: not text")
    if item.source.endswith("/METADATA"):
        text = text.partition("\n\n")[2]  # the long description
    same = hashlib.sha256(raw).hexdigest() == item.sha256
    status = "unpublished" if not item.sha256 else "verified" if same else "mismatch"
    stamp = item.timestamp or int(file.stat().st_mtime if file else time.time())
    return Record(item.source, item.domain, item.licence, stamp, text, status, item.signature)


def prefix(source: Source) -> str:
    """How the `source` of its every record begins; the allow-list of a run is made of these."""
    name = source.path if source.kind == "datasets" and not _path(source).exists() else _path(source).name
    return {"distributions": "pypi:", "folder": f"folder:{name}/"}.get(source.kind, f"{source.kind}:{name}#")


def domain_of(path: str) -> str:
    """Domain told from a file's name; empty for a file that is not text we read."""
    name, suffix = PurePosixPath(path).name, PurePosixPath(path).suffix.lower()
    if name.lower().startswith(("license", "licence", "copying", "notice")) and suffix != ".py":
        return "licences" if suffix in ("", ".txt", ".md", ".rst") else ""
    return "code" if suffix == ".py" else "documentation" if suffix in (".md", ".rst", ".txt") else ""


def _path(source: Source) -> Path:
    return runs.root() / source.path  # a full path stays what it is


def _distributions(source: Source) -> Iterator[Item]:
    """Files of every installed wheel, in an order that names alone decide: the domain most behind its share is next,
    in it distributions take turns; in each, files go by the hash of their path. RECORD holds the published hashes."""
    queues: dict[str, list[tuple[int, bytes, int, Item]]] = {domain: [] for domain in SHARES}
    found: dict[str, tuple[metadata.Distribution, Any]] = {}
    for wheel in metadata.distributions():
        about: Any = wheel.metadata
        found.setdefault(str(about["Name"]).lower(), (wheel, about))
    found.pop("stackpkg", None)
    for name, (wheel, about) in found.items():
        licence = spdx(about["License-Expression"] or "", about["License"] or "", *about.get_all("Classifier", []))
        rows, turns = csv.reader((wheel.read_text("RECORD") or "").splitlines()), Counter[str]()
        for path, digest, size in sorted(rows, key=lambda row: hashlib.sha256(row[0].encode()).digest()):
            domain = "documentation" if path.endswith(".dist-info/METADATA") else domain_of(path)
            if domain and not path.startswith(("..", "/")):
                turns[domain] += 1
                sha = base64.urlsafe_b64decode(digest.removeprefix("sha256=") + "=").hex()
                label, file = f"pypi:{name}=={about['Version']}/{path}", Path(str(wheel.locate_file(path)))
                item = Item(label, source.domain or domain, file, source.licence or licence, sha)
                queues[domain].append((-turns[domain], hashlib.sha256(name.encode()).digest(), int(size or 0), item))
    for queue in queues.values():
        queue.sort(key=lambda entry: entry[:2])
    taken = dict.fromkeys(SHARES, 0)
    while waiting := [domain for domain in queues if queues[domain]]:
        domain = min(waiting, key=lambda name: taken[name] / SHARES[name])
        *_, bytes_next, item = queues[domain].pop()
        taken[domain] += bytes_next if bytes_next <= LARGEST else 0
        yield item


def _folder(source: Source) -> Iterator[Item]:
    if not _path(source).is_dir():
        raise ValueError(f"source path {source.path!r} is not a folder; give one, or the kind that it is")
    for path in runs.files_below(_path(source)):
        relative = path.relative_to(_path(source)).as_posix()
        if domain := source.domain or domain_of(relative):
            yield Item(prefix(source) + relative, domain, path, source.licence)


def _rows(source: Source) -> Iterator[Item]:
    """Rows of JSONL, Parquet or a datasets id; columns domain, licence, timestamp, content_hash and signature count."""
    path, stamp = _path(source), int(_path(source).stat().st_mtime) if _path(source).exists() else 0
    if not path.exists() and source.kind != "datasets":
        raise ValueError(f"source path {source.path!r} does not exist; give a file below the repository or a full path")
    for number, row in enumerate(_dicts(source, path)):
        text, keys = row.get(source.text_field), ("domain", "licence", "content_hash", "signature")
        domain, licence, sha, signature = (str(row.get(key) or "") for key in keys)
        where, when = (source.domain or domain or "text", text if text is None else str(text)), row.get("timestamp")
        yield Item(f"{prefix(source)}{number}", *where, source.licence or licence, sha, int(when or stamp), signature)


def _dicts(source: Source, path: Path) -> Iterator[dict[str, Any]]:
    if source.kind == "jsonl":
        for line in path.open("rb"):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield row if isinstance(row, dict) else {}
    elif source.kind == "parquet":
        for batch in pq.ParquetFile(path).iter_batches(1000):
            yield from batch.to_pylist()
    else:
        import datasets  # a second to import, and only this kind of source needs it

        yield from datasets.load_dataset(
            str(path) if path.exists() else source.path, split=source.split, streaming=True
        )
