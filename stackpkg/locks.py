"""Who holds a run, or a folder: one process at a time, by a lock that the kernel frees at the process's death."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from stackpkg import runs

P = ParamSpec("P")
T = TypeVar("T")


def _file(name: str) -> Path:
    return runs.root() / "outbox" / ".locks" / name


def held(name: str) -> bool:
    """Whether a process holds the run `name`."""
    if not _file(name).exists():
        return False
    with _file(name).open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


@contextmanager
def exclusive(name: str) -> Iterator[None]:
    """Hold the run `name`; raises `BlockingIOError` when another process holds it. The kernel frees it at death."""
    path = _file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            holder = stream.read() or "unknown"
            raise BlockingIOError(
                f"run {name!r} is being executed by process {holder}; wait for it, stop it, or give another --run"
            ) from None
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def in_turn(act: Callable[Concatenate[Path, P], T]) -> Callable[Concatenate[Path, P], T]:
    """For what reads in a folder, its first argument, decides and writes there: another waits until it is done. Nothing
    is held on a file system that can't lock a folder."""

    @wraps(act)
    def held(folder: Path, *given: P.args, **named: P.kwargs) -> T:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            return act(folder, *given, **named)
        finally:
            os.close(handle)

    return held
