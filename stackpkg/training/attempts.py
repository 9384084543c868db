"""The attempts of a job, in `attempts.json` of its folder: when each began, from what, and what the one before left."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch.distributed as dist

from stackpkg.runs import now, read_json, write_json
from stackpkg.training import hang, snapshots

FILE = "attempts.json"


def read(home: Path) -> list[dict[str, Any]]:
    """All attempts so far; none of a job that did not begin."""
    return read_json(home / FILE) if (home / FILE).exists() else []


def code() -> str:
    """16 digits over the sources of the package: a checkpoint says little of what another code makes of it."""
    package, found = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def _together(checkpoint: Path | None) -> list[str] | None:
    """A collective: the problems of the checkpoint that rank 0 names, each rank reading its share of the files; None
    when it names none."""
    told = [str(checkpoint) if checkpoint else None]
    dist.broadcast_object_list(told)
    if told[0] is None:
        return None
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, snapshots.problems(Path(told[0]), dist.get_rank(), dist.get_world_size()))
    return sorted({line for lines in found for line in lines})


def begin(home: Path, record: dict[str, Any]) -> tuple[int, Path | None]:
    """Rank 0 counts the attempt, with a `record` of what it computes from and on what, and picks the checkpoint to
    resume from; the others hear it. A collective. Raises `ResumeFailed` on all ranks."""
    told: list[Any] = [None]
    while dist.get_rank() and _together(None) is not None:
        pass
    if dist.get_rank() == 0:
        told = [_first(home, record)]
    dist.broadcast_object_list(told)
    if isinstance(told[0], Exception):
        raise told[0]
    attempt, path = told[0]
    return attempt, Path(path) if path else None


def _first(home: Path, record: dict[str, Any]) -> tuple[int, str | None] | snapshots.ResumeFailed:
    """What rank 0 does in `begin`: the number of the attempt and the checkpoint, or why there is none."""
    try:
        checkpoint, complaints = snapshots.latest(home, lambda path: _together(path) or [])
    except snapshots.ResumeFailed as error:
        _together(None)
        return error
    _together(None)
    before, sources = read(home), code()
    this: dict[str, Any] = {
        "at": now(),
        "resumed_from": checkpoint.name if checkpoint else None,
        "aside": complaints,
    }
    this |= {"ranks": dist.get_world_size(), "code": sources, "record": record}
    said = [f"set aside {complaint}" for complaint in complaints]
    if before and (hung := hang.found(home, before[-1].get("ranks", 1), len(before))):
        this["hung"] = hung
        where = f"rank(s) {', '.join(map(str, hung['ranks']))} hung in step {hung['step']}"
        said.append(f"attempt {len(before)}: {where}; the stacks of all ranks are in {hung['stacks']}/")
    if before and before[-1].get("code", sources) != sources:
        this["code_changed"] = True
        change = f"{before[-1]['code']} -> {sources}"
        said.append(f"the code is not that of attempt {len(before)} ({change}): what comes may differ from there on")
    for line in said:
        print(f"[{home.name}] {line}", flush=True)
    write_json(home / FILE, [*before, this])
    return len(before) + 1, str(checkpoint) if checkpoint else None
