"""Jobs whose place another of the same name took: in outbox/.previous/<run>/<job>/, a folder each, with all they wrote.

The folder is named by the digest of the job. It is not whole without `checkpoints`, which leaves last and returns
first: what it has then belongs to the job that is in the run, and a move that was broken off is taken back.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from stackpkg.runs import RunFolder, read_json

FOLDERS = ("telemetry", "eval", "checkpoints")
BESIDE = ("parquet", "alerts.jsonl", "events.jsonl", "reports")  # of telemetry/<job>: `telemetry/<job>.parquet`


def _places(folder: RunFolder, name: str) -> dict[str, Path]:
    """What a job wrote, where it lies in the run; the name of each part in the folder of a job set aside."""
    beside = {end: folder.path / f"telemetry/{name}.{end}" for end in BESIDE}
    return beside | {part: folder.path / part / name for part in FOLDERS}


def _all(folder: RunFolder, name: str) -> Path:
    return folder.path.parent / ".previous" / folder.name / name


def _bring_back(folder: RunFolder, name: str, aside: Path) -> None:
    for part, place in reversed(_places(folder, name).items()):
        if (aside / part).exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            (aside / part).rename(place)
    aside.rmdir()


def _ended(checkpoints: Path) -> bool:
    return (checkpoints / "done.json").exists()


def settle(folder: RunFolder, name: str) -> None:
    """Take a move back that was broken off."""
    for half in _all(folder, name).glob("*"):
        if not (half / "checkpoints").exists():
            _bring_back(folder, name, half)


def set_aside(folder: RunFolder, name: str) -> Path | None:
    """Move what the job of this name left; where to, None if it left nothing. Nothing is deleted but a job that has
    ended, of which nothing was promoted, in favour of one with the same description that ended later."""
    kept, places = _all(folder, name), _places(folder, name)
    if not any(place.exists() for place in places.values()):
        return None
    home = places["checkpoints"]
    key = read_json(home / "job.json")["digest"][:12] if (home / "job.json").exists() else "unknown"
    for old in kept.glob(f"{key}*") if _ended(home) else ():
        if _ended(old / "checkpoints") and not (old / "checkpoints/promoted.json").exists():
            shutil.rmtree(old)
    free = (kept / (f"{key}-{number}" if number > 1 else key) for number in count(1))
    aside = next(path for path in free if not path.exists())
    aside.mkdir(parents=True)
    for part, place in places.items():
        if place.exists():
            place.rename(aside / part)
    (aside / "checkpoints").mkdir(exist_ok=True)
    return aside


def take_up(folder: RunFolder, name: str, same: Callable[[dict[str, Any]], bool]) -> Path | None:
    """Bring an unfinished job back whose description is the `same`: its checkpoints, rows and reports, where nothing
    lies now. Where it was, None if there is none."""
    for job in sorted(_all(folder, name).glob("*/checkpoints/job.json")):
        if not _ended(job.parent) and same(read_json(job)):
            _bring_back(folder, name, job.parents[1])
            return job.parents[1]
    return None
