"""Whether a job runs: its launch and all its ranks share a lock beside the run, which the kernel frees when they die.

The lock is outside the run, in `outbox/.locks/<run>.<job>`: it is no part of the archive and is not copied with it.
"""

from __future__ import annotations

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from stackpkg import params
from stackpkg.runs import read_json
from stackpkg.training import clusters

SILENT = 120.0  # seconds without a row after which a job of another machine, whose lock may not be seen, counts as gone


def _open(home: Path) -> IO[str]:
    run = home.resolve().parents[1]
    path = run.parent / ".locks" / f"{run.name}.{home.name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a+", encoding="utf-8")


def hold(home: Path) -> IO[str]:
    """Say that the job whose folder is `home` runs, until the file that is returned is closed or this process dies.
    Waits while `idle` changes the job. On a file system without locks nothing is held."""
    stream = _open(home)
    with suppress(OSError):
        fcntl.flock(stream, fcntl.LOCK_SH)
    stream.truncate(0)
    stream.write(f"{platform.node()} {os.getpid()}")
    stream.flush()
    return stream


def _elsewhere(home: Path, host: str) -> str:
    """What tells of a job that runs on other machines: the scheduler's word, else a row that is young."""
    job = home / "job.json"
    told = read_json(job).get("params") if job.exists() else None
    if told and (p := params.validate(told)).cluster.scheduler != "none":
        called = clusters.name_of(p, home.name)
        return f"{p.cluster.scheduler} has it, as {called}" if clusters.alive(p, called) else ""
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
        stream.seek(0)
        host, _, process = stream.read().partition(" ")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise BlockingIOError(f"{home.name} runs (process {process} on {host})") from None
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
