"""Telemetry tells of the run and of nobody: personal data and secrets go before a payload is written or sent."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from stackpkg.data.scrub import scrub

NAMES = re.compile(r"TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|COOKIE|API_?KEY|_KEY$|_AUTH$", re.I)  # of variables
SHORTEST = 8  # characters of a value that is taken for a secret: "true" is none
DIGEST = re.compile(r"[0-9a-f]{16}|[0-9a-f]{64}")  # names of shards and records, which a format alone may mistake


def known() -> tuple[str, ...]:
    """Values of the environment whose names look like those of secrets, the longest first."""
    found = {value for name, value in os.environ.items() if NAMES.search(name) and len(value) >= SHORTEST}
    return tuple(sorted(found, key=lambda value: (-len(value), value)))


@lru_cache(maxsize=4096)
def _masked(text: str, values: tuple[str, ...]) -> str:
    for value in values:
        text = text.replace(value, "<secret>")
    return text if DIGEST.fullmatch(text) else scrub(text, personal=True, secrets=True)[0]


def clean(value: Any, values: tuple[str, ...] | None = None) -> Any:
    """A payload, its strings, and those in its lists and mappings, without personal data (`<email>` and the other kinds
    of `data.scrub`) and without secrets: of published formats, or a value of the environment (`values`, or `known`).
    Numbers stay as they are, whether finite or not."""
    if value is None or isinstance(value, (int, float)):
        return value
    values = known() if values is None else values
    if isinstance(value, str):
        return _masked(value, values)
    if isinstance(value, dict):
        return {_masked(str(key), values): clean(inner, values) for key, inner in value.items()}
    return [clean(inner, values) for inner in value] if isinstance(value, (list, tuple)) else value


def append(path: Path, payloads: Iterable[dict[str, Any]]) -> None:
    """Lines of JSON, cleaned, at the end of a file."""
    with path.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(clean(payload)) + "\n" for payload in payloads)


def salt(run: Path) -> bytes:
    """The salt of a run, made when first asked for. It lies beside the runs, outside of every archive: whoever has it
    can test a guess at a name, and nobody else can."""
    path = run.parent / ".salts" / run.name
    path.parent.mkdir(mode=0o700, exist_ok=True)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(secrets.token_hex(32).encode())
    except FileExistsError:
        pass
    return path.read_bytes()


def hashed(name: str, run: Path) -> str:
    """32 digits of the salted SHA-256 (HMAC, RFC 2104) of a name: in one run the same, in another run another."""
    return hmac.new(salt(run), name.encode(), hashlib.sha256).hexdigest()[:32]
