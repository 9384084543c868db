"""The logbook of a run, `outbox/<run>/logbook.md`: a dated entry for each alert and each note; only ever added to."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stackpkg.runs import now
from stackpkg.telemetry.privacy import clean

FILE = "logbook.md"
OPEN = ("Looked, who and when", "Found", "Done, command by command", "Lost, in steps and hours", "What remains")


def add(run: Path, title: str, lines: Iterable[str]) -> Path:
    """Append an entry, on disk when this returns; `run` is the run's folder."""
    with (run / FILE).open("a", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        head = "" if stream.tell() else f"# Logbook of {run.name}\n"
        stream.write(f"{head}\n## {now()} {clean(title)}\n\n" + "".join(f"{clean(line)}\n" for line in lines))
        stream.flush()
        os.fsync(stream.fileno())
    return run / FILE


def fired(run: Path, job: str, step: int, attempt: int, alerts: Iterable[dict[str, Any]], good: str) -> None:
    """A stub for each alert of a step: what was seen, the last good checkpoint, and what a person fills in."""
    for alert in alerts:
        seen = f"Seen: {alert['series']} {alert['value']:.6g}, limit {alert['threshold']}, held {alert['hold']}"
        _stub(run, alert, f"{seen}, in step {step} of {job}, attempt {attempt}: {alert['summary']}.", good)


def received(run: Path, letter: dict[str, Any], good: str) -> None:
    """The stub of an alert that Prometheus fired, after Alertmanager's letter: one for each time that it fires, however
    often it is told, and by whichever process."""
    seen = f"Seen from outside: {letter['alert']} of {letter['job']}, firing since {letter['since']}:"
    known = (run / FILE).read_text(encoding="utf-8") if (run / FILE).exists() else ""
    if letter["status"] == "firing" and seen not in known:
        page = letter["runbook"].replace(".html", ".md")
        _stub(run, letter | {"runbook": page}, f"{seen} {letter['summary']}.", good)


def _stub(run: Path, alert: dict[str, Any], seen: str, good: str) -> None:
    add(run, f"{alert['alert']} ({alert['severity']})", [
        seen,
        f"Last checkpoint before it: {good or 'none'}. Action: {alert['action']}. Page: {alert['runbook']}.\n",
        *(f"- {line}:" for line in OPEN),
    ])  # fmt: skip
