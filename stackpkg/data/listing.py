"""What lies where a profile's text comes from, told without reading it: so that the runner knows when to read again."""

import hashlib
import json
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from stackpkg import runs
from stackpkg.params import Source


def listing(sources: Iterable[Source]) -> str:
    """SHA-256 over name, size and time of every file of the sources, and over the versions of the installed
    distributions where one of them is read. Of a datasets id it knows the name alone."""
    return hashlib.sha256(json.dumps([_state(source) for source in sources]).encode()).hexdigest()


def _state(source: Source) -> list[list[object]]:
    if source.kind == "distributions":
        return sorted([str(wheel.metadata["Name"]), wheel.version] for wheel in metadata.distributions())
    path = runs.root() / source.path  # a full path stays what it is
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return [_file(file, path) for file in files]


def _file(file: Path, home: Path) -> list[object]:
    about = file.lstat()
    return [file.relative_to(home).as_posix(), about.st_size, about.st_mtime_ns]
