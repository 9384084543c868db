"""Run a command that the operating system kills with its parent: a killed run leaves no orphan that goes on writing."""

import ctypes
import os
import signal
import sys


def die_with_parent() -> None:
    """Linux only; elsewhere an orphan ends at its next collective."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; survives exec


if __name__ == "__main__":
    die_with_parent()
    os.execv(sys.argv[1], sys.argv[1:])  # noqa: S606  the caller's own list, no shell
