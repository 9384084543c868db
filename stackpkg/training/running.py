"""Whether a job runs: its launch and all its ranks share a lock beside the run, which the kernel frees when they die.
Another lock is its launch's alone: a job is launched once at a time.

The locks are outside the run, in `outbox/.locks`, `<run>.<job>` and `.launch-<run>.<job>`: they are no part of the
archive and are not copied with it.
"""

from __future__ import annotations

import fcntl
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from stackpkg import locks, params
from stackpkg.runs import read_json
from stackpkg.training import clusters, stop

SILENT = 120.0  # seconds without a row after which a job of another machine, whose lock may not be seen, counts as gone
DYING = 15.0  # seconds in which what a launch that was killed has left is gone: its ranks die with it
LOOK = 0.5  # seconds between two looks at it


def _open(home: Path, what: str = "") -> IO[str]:
    run = home.resolve().parents[1]
    return locks.opened(run.parent / ".locks" / f"{what}{run.name}.{home.name}")


def hold(home: Path) -> IO[str]:
    """Say that the job whose folder is `home` runs, until the file that is returned is closed or this process dies.
    Waits while `idle` changes the job. On a file system without locks nothing is held."""
    stream = _open(home)
    with suppress(OSError):
        fcntl.flock(stream, fcntl.LOCK_SH)
    locks.sign(stream)
    return stream


def _await(home: Path, busy: Callable[[], str]) -> None:
    """Until `busy` tells of nobody; raises `ValueError` when it still does after `DYING` seconds."""
    late = time.monotonic() + DYING
    while who := busy():
        if time.monotonic() > late:
            raise ValueError(
                f"{who}; nothing was changed. Wait until that has ended, ask it to end with the file "
                f"checkpoints/{home.name}/{stop.FILE}, or give this job another name"
            )
        time.sleep(LOOK)


def claim(home: Path) -> IO[str]:
    """Have the launch of the job whose folder is `home` alone, until the file that is returned is closed or this
    process dies. On a file system without locks nothing is held. Raises `ValueError` where another launch has it, and
    is not being killed: two would write into one folder."""
    stream = _open(home, ".launch-")

    def taken() -> str:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"{home.name} has been launched already ({locks.holder(stream)[1]})"
        except OSError:
            pass
        return ""

    try:
        _await(home, taken)
        locks.sign(stream)
    except BaseException:
        stream.close()
        raise
    return stream


def await_end(home: Path) -> None:
    """Until nothing of the job runs: ranks die with their launch, within moments. Raises `ValueError` where it goes on
    or its scheduler can't be asked from here, `RuntimeError` where that does not answer."""

    def busy() -> str:
        try:
            return runs(home)
        except ValueError as error:
            if not (known := home / clusters.SUBMITTED).exists():  # it has never been on a cluster
                return ""
            raise ValueError(
                f"whether {home.name} still runs is not known: {error}; if it has ended, remove "
                f"checkpoints/{home.name}/{known.name}"
            ) from None

    _await(home, busy)


def _elsewhere(home: Path, host: str) -> str:
    """What tells of a job that runs on other machines: the scheduler's word, else a row that is young and not of
    a job that has ended."""
    job = home / "job.json"
    told = read_json(job).get("params") if job.exists() else None
    if told and (p := params.validate(told)).cluster.scheduler != "none":
        called = clusters.name_of(p, home.name)
        return f"{p.cluster.scheduler} has it, as {called}" if clusters.alive(p, called) else ""
    if (home / "done.json").exists() or stop.stopped(home):
        return ""
    rows = (home.parents[1] / "telemetry" / home.name).glob("rank-*.jsonl")
    age = time.time() - max((path.stat().st_mtime for path in rows), default=0.0)
    if host and host != platform.node() and age < SILENT:
        return f"{host} wrote a row {age:.0f} s ago; look again once it is {SILENT:.0f} s old"
    return ""


@contextmanager
def idle(home: Path) -> Iterator[None]:
    """For what may not be done to a job that runs; none begins before the block ends. Raises `BlockingIOError` that
    says who runs it."""
    with _open(home) as stream:
        host, who = locks.holder(stream)
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise BlockingIOError(f"{home.name} runs ({who})") from None
        if why := _elsewhere(home, host):
            raise BlockingIOError(f"{home.name} runs: {why}")
        yield


def runs(home: Path) -> str:
    """Who runs the job; empty when nobody does. Raises `ValueError` or `RuntimeError` when its scheduler does not
    answer."""
    try:
        with idle(home):
            return ""
    except BlockingIOError as error:
        return str(error)
