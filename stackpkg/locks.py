"""Who holds a run, or a folder: one process at a time, by a lock that the kernel frees at the process's death."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import IO, Concatenate, ParamSpec, TypeVar

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


def opened(path: Path) -> IO[str]:
    """The file of a lock, which tells who has it (`sign`); it is not locked yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a+", encoding="utf-8")


def sign(stream: IO[str]) -> None:
    """Write into the file of a lock that this process has it."""
    stream.truncate(0)
    stream.write(f"{platform.node()} {os.getpid()}")
    stream.flush()


def holder(stream: IO[str]) -> tuple[str, str]:
    """Host and process that had a lock last; `unknown` where none has signed."""
    stream.seek(0)
    host, _, process = stream.read().partition(" ")
    return host, f"process {process or 'unknown'} on {host or 'unknown'}"


@contextmanager
def exclusive(name: str) -> Iterator[None]:
    """Hold the run `name`; raises `BlockingIOError` when another process holds it. The kernel frees it at death."""
    with opened(_file(name)) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BlockingIOError(
                f"run {name!r} is being executed by {holder(stream)[1]}; wait for it, stop it, or give another --run"
            ) from None
        sign(stream)
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
