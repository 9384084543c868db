"""What is known of where a record comes from: licence and uses, signature, last date. `trust` weighs it."""

import fcntl
import os
import re
import time
import warnings
from base64 import b64decode, b64encode
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field

from stackpkg import runs
from stackpkg.data import manifest
from stackpkg.data.items import record_id
from stackpkg.params import Data, Section

# What metadata writes in many ways -> SPDX identifier; the first match wins.
SPDX = {
    "apache": "Apache-2.0", "mozilla|mpl": "MPL-2.0", "lgpl|lesser general": "LGPL-3.0-or-later",
    "gpl|general public": "GPL-3.0-or-later", "(2.clause|simplified).bsd|bsd.2": "BSD-2-Clause",
    "bsd|redistributions? of source": "BSD-3-Clause", "python software|psf|matplotlib": "PSF-2.0",
    r"\bisc": "ISC", r"\bmit\b|permission is hereby granted, free": "MIT", "unlicense": "Unlicense",
}  # fmt: skip
Keys = dict[str, list[Ed25519PublicKey]]  # source prefix -> who may sign below it


def spdx(stated: str, *hints: str) -> str:
    """SPDX licence: as stated (PEP 639), else read off older metadata fields; empty if they tell nothing."""
    found = (name for hint in hints for pattern, name in SPDX.items() if re.search(pattern, hint[:400].lower()))
    return stated or next(found, "")


def write(path: Path, rows: Iterable[dict], **stamp: str) -> Path:
    """One Parquet file, whole or not at all; `stamp` goes into its metadata."""
    with runs.replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows)).replace_schema_metadata(stamp), temporary, compression="zstd")
    return path


# --- signatures: ed25519 (RFC 8032) over the content hash and the source, so that neither can be exchanged


def _message(content_hash: str, source: str) -> bytes:
    return f"{content_hash}\n{source}".encode()


def sign(private_key: Ed25519PrivateKey, source: str, content_hash: str) -> str:
    """What a publisher puts into `signature`, base64."""
    return b64encode(private_key.sign(_message(content_hash, source))).decode()


def signers(path: Path) -> Keys:
    """The key list: a line is `source-prefix base64-raw-ed25519-public-key [name]`, or a comment that starts with #.

    A prefix may have several keys (rotation). End it where names end: `pypi:a` covers `pypi:ab` too, `pypi:a==` not.
    Raises `ValueError` naming the first line that is neither.
    """
    keys: Keys = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            if (fields := line.split(None, 2)) and not fields[0].startswith("#"):
                prefix, key = fields[:2]
                keys.setdefault(prefix, []).append(Ed25519PublicKey.from_public_bytes(b64decode(key, validate=True)))
        except ValueError as error:
            raise ValueError(f"{path.name} line {number} is not `prefix base64-ed25519-key [name]`: {error}") from None
    return keys


def _confirmed(row: dict[str, str], keys: Keys) -> bool:
    for key in (key for prefix, found in keys.items() if row["source"].startswith(prefix) for key in found):
        with suppress(InvalidSignature, ValueError):
            key.verify(b64decode(row["signature"], validate=True), _message(row["content_hash"], row["source"]))
            return True
    return False


def check(part: pa.Table, keys: Keys) -> pa.Array:
    """string[rows]: signed, bad or unsigned, of a table with source, content_hash and signature.

    Bad is what no key listed for its source confirms; one for another source or content is not confirmed. Without
    keys nothing can be checked: all are unsigned.
    """
    states = np.full(len(part), "unsigned", object)
    if keys:
        claims = np.flatnonzero(pc.not_equal(pc.fill_null(part["signature"], ""), "").to_numpy(zero_copy_only=False))
        rows = part.select(["source", "content_hash", "signature"]).take(pa.array(claims)).to_pylist()
        states[claims] = ["signed" if _confirmed(row, keys) else "bad" for row in rows]
    return pa.array(states, pa.string())


# --- the last date: time-to-live and withdrawal


def expiry(part: pa.Table, data: Data) -> pa.Array:
    """int64[rows], the unix second from which on a record is not used; `part` has timestamp and ttl_seconds.

    A time-to-live of 0 is the profile's. A negative one is refused: 1970, so it has always expired. A date before
    1970 counts as 1970.
    """
    stamp, ttl = (pc.fill_null(part[name], 0).to_numpy() for name in ("timestamp", "ttl_seconds"))
    span = np.where(ttl == 0, data.ttl_seconds, ttl)
    # expiry = timestamp + time-to-live, at most what 64 bits hold
    return pa.array(np.where(span < 0, 0, stamp.clip(0) + np.minimum(span, np.iinfo(np.int64).max - stamp.clip(0))))


class Withdrawal(Section):
    """One line of `withdrawn.jsonl`."""

    record_id: str = Field(pattern=r"^[0-9a-f]{16}$")
    date: int = Field(ge=0, strict=True, description="unix seconds from which on the record is not used")
    reason: str = Field(min_length=1)


def withdrawals(path: Path) -> dict[str, int]:
    """record_id -> the earliest date (unix seconds) it is withdrawn from; empty when there is no such file.

    Raises `ValueError` naming a bad line. A last line that was not finished is warned of and does not count.
    """
    found: dict[str, int] = {}
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines, 1):
        try:
            row = Withdrawal.model_validate_json(line)
            found[row.record_id] = min(row.date, found.get(row.record_id, row.date))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path.name} line {number} must be a withdrawal or go: {error}") from None
            if line:
                warnings.warn(f"{path.name} line {number} is unfinished and ignored: withdraw again", stacklevel=2)
    return found


def withdraw(path: Path, record_id: str | Iterable[str], date: int, reason: str) -> None:
    """Append withdrawals, on disk when this returns. What an earlier writer did not finish is cut off first."""
    names = [record_id] if isinstance(record_id, str) else record_id
    made = (Withdrawal(record_id=name, date=date, reason=reason) for name in names)
    line = b"".join(each.model_dump_json().encode() + b"\n" for each in made)
    with path.open("a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        whole, end, tail = stream.read().rpartition(b"\n")
        try:
            Withdrawal.model_validate_json(tail)
            line = b"\n" + line  # after a row that only lacks its line end
        except ValueError:
            stream.truncate(len(whole + end))
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())


def named(folder: Path, name: str) -> dict[str, str]:
    """record_id -> source of the records of the head that `name` means: an id; a source, whole or up to a `/`, `#` or
    `==` of it, such as pypi:numpy; or with a `*` at its end all sources that begin so. `folder` is a run's `data/`.

    Raises `ValueError` where there is none.
    """
    found, rest = dict[str, str](), re.escape(name.rstrip("/"))
    inside = f"^{re.escape(name[:-1])}" if name.endswith("*") else f"^{rest}(/|#|==|$)"
    for path in manifest.records(folder):
        part = pq.read_table(path, columns=["record_id", "source"])
        part = part.filter(pc.or_(pc.equal(part["record_id"], name), pc.match_substring_regex(part["source"], inside)))
        found |= dict(zip(part["record_id"].to_pylist(), part["source"].to_pylist(), strict=True))
    if not found:
        twins = folder / "duplicates.parquet"
        table = pq.read_table(twins, columns=["removed", "kept"]).to_pylist() if twins.exists() else []
        kept = [row["kept"] for row in table if row["removed"] in (name, record_id(name))]
        twin = f"; it was dropped as a duplicate of {kept[0]}, which holds the same text: ask for that" if kept else ""
        raise ValueError(
            f"no record {name!r} in the corpus{twin}. Give a record id, its source or the beginning of it, such as "
            "pypi:numpy, as `stackpkg trace` shows them; what was read and dropped is in data/audit.parquet"
        )
    return found


def _shards(folder: Path) -> pa.Table:
    """record_id and shard of every document of the head."""
    index = pa.ipc.open_file(str(manifest.index(folder, manifest.read(folder)))).read_all()
    return index.select(["record_id", "shard"]).cast(pa.schema([("record_id", pa.string()), ("shard", pa.string())]))


def withdraw_shard(folder: Path, shard: str, date: int, reason: str) -> int:
    """Withdraw every record with a document in a shard of the head; how many. Raises `ValueError` when it has none."""
    table = _shards(folder)
    mine = table.filter(pc.equal(table["shard"], shard))["record_id"].unique().to_pylist()
    if not mine:
        raise ValueError(
            f"no document is in a shard {shard!r}; there are {', '.join(table['shard'].unique().to_pylist())}"
        )
    withdraw(folder / "withdrawn.jsonl", mine, date, reason)
    return len(mine)


def passed_over(folder: Path) -> set[str]:
    """Names, as `manifest.verify` gives them, of the shards that nothing reads: all their records are withdrawn."""
    gone = [name for name, date in withdrawals(folder / "withdrawn.jsonl").items() if date <= time.time()]
    if not gone:
        return set()
    table = _shards(folder)
    read = table.filter(pc.invert(pc.is_in(table["record_id"], pa.array(gone, pa.string()))))["shard"]
    return {f"shards/{name}.bin" for name in {*table["shard"].to_pylist()} - {*read.to_pylist()}}


def withdrawals_due(folder: Path, data: Data, by: int) -> dict[str, str]:
    """record_id -> why, of the records that may not be used at some moment up to `by` (unix seconds): withdrawn, as
    `folder/withdrawn.jsonl` says, or past their time-to-live. `folder` is a run's `data/`."""
    due = {name: "withdrawn" for name, date in withdrawals(folder / "withdrawn.jsonl").items() if date <= by}
    for path in manifest.records(folder):
        part = pq.read_table(path, columns=["record_id", "timestamp", "ttl_seconds"])
        late = part["record_id"].filter(pc.less_equal(expiry(part, data), by))
        due |= dict.fromkeys(late.to_pylist(), "expired")
    return due
