"""Run Python so that the operating system kills it with its parent: a killed run leaves no orphan that goes on writing.

`python -m stackpkg.training.tether ARGUMENTS` is `python ARGUMENTS`, tethered before its long imports begin.
"""

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
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])  # noqa: S606  the caller's own list, no shell
