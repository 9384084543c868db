"""The switches that every job honours: files in its folder, `stop` and `kill` with the reason as text, and `save`.

`stop`: the job ends after the step in which rank 0 saw it, with a checkpoint; launching the same job again goes on from
there. `save`: a checkpoint after that step, and the job goes on. `kill`: every rank ends by itself within seconds,
though it hangs, without a checkpoint, and no launch goes on until the file is gone.
`python -m stackpkg.training.stop HOME` exits with 143 when the job in HOME was stopped by a preemption, else with 0.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from stackpkg.runs import read_json, write_json, write_text
from stackpkg.telemetry.privacy import clean

FILE, SAVE, KILL = "stop", "save", "kill"
PREEMPTED, TERMINATED = "preempted", "SIGTERM"  # reasons
AGAIN = 143  # exit code of what a preemption or SIGTERM ended, and that wants to go on (128 + SIGTERM, as in shells)


class Stopped(RuntimeError):
    """The job ended early because it was asked to, for a `reason`; it is whole on disk."""

    def __init__(self, job: str, step: int, reason: str) -> None:
        super().__init__(f"{job} stopped after step {step}: {reason}; launch it again to go on")
        self.reason = reason


def request(home: Path, reason: str) -> Path:
    """Ask the job whose folder is `home` to end after its present step. A job in its last step just finishes."""
    return write_text(home / FILE, clean(reason))


def ask_save(home: Path) -> Path:
    """Ask the job for a checkpoint after its present step."""
    return write_text(home / SAVE, "")


def kill(home: Path, reason: str) -> Path:
    """End every rank of the job now, and let none begin again until the file that is returned is removed."""
    return write_text(home / KILL, clean(reason))


def killed(home: Path) -> str:
    """Why the job may not go on; empty when it may."""
    if not (home / KILL).exists():
        return ""
    reason = (home / KILL).read_text(encoding="utf-8").strip() or "no reason given"
    return f"{home.name} was killed: {reason}; remove checkpoints/{home.name}/{KILL} to let it go on"


def record(home: Path, step: int) -> str:
    """The reason, kept with the attempt; the file was obeyed and goes. For rank 0 of the job."""
    attempts, reason = read_json(home / "attempts.json"), (home / FILE).read_text(encoding="utf-8").strip()
    attempts[-1]["stopped"] = {"step": step, "reason": reason or "no reason given"}
    write_json(home / "attempts.json", attempts)
    (home / FILE).unlink()
    return attempts[-1]["stopped"]["reason"]


def stopped(home: Path) -> dict[str, Any] | None:
    """`step` and `reason` when the newest attempt of the job was stopped."""
    attempts = read_json(home / "attempts.json") if (home / "attempts.json").exists() else [{}]
    return attempts[-1].get("stopped")


if __name__ == "__main__":
    sys.exit(AGAIN if (stopped(Path(sys.argv[1])) or {}).get("reason") == PREEMPTED else 0)
