"""SIGTERM: a job that trains below the process that gets it ends with a checkpoint that all ranks agreed on.

Ranks can't heed it themselves: torchrun sends it also when another rank has died. So the process that launched them
writes the stop file, and so does the one that executes the notebook they were launched from.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from stackpkg.training.stop import FILE, TERMINATED, request

PATIENCE = 10  # seconds in which a notebook whose jobs have ended must end too


class Terminated(KeyboardInterrupt):
    """Raised in the main thread on SIGTERM, when no job below this process has to be waited for."""


@contextmanager
def heeded(home: Path) -> Iterator[None]:
    """While this thread waits for the job in `home`; a thread beside the main one leaves SIGTERM as it is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: request(home, TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def jobs() -> set[Path]:
    """The folders of the jobs whose processes descend from this one."""
    found = set[Path]()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            found |= {Path(word).parent for word in child.cmdline()[-1:] if Path(word).name == "job.json"}
    return found


class Heed:
    """For a process that executes notebooks, inside its block: SIGTERM asks the jobs that notebooks launched to stop,
    at once and each second those begun since, and their notebook ends by `Stopped`. Raises `Terminated` where there is
    none, or was none for `PATIENCE` seconds: then the notebook goes on without."""

    def __init__(self) -> None:
        self.got, self.idle, self.asked = False, PATIENCE, set[Path]()

    def __enter__(self) -> Heed:
        self.before = {number: signal.signal(number, self) for number in (signal.SIGTERM, signal.SIGALRM)}
        return self

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def __call__(self, *_: object) -> None:
        self.got, running = True, jobs()
        for home in running - self.asked:
            request(home, TERMINATED)
        self.asked, self.idle = self.asked | running, 0 if running else self.idle + 1
        if self.idle > PATIENCE:
            for home in self.asked:  # one that ended by itself has not looked, and the next launch would obey it
                (home / FILE).unlink(missing_ok=True)
            raise Terminated
        signal.alarm(1)
