"""Snapshots: complete or not there, verified before use; and the gate that decides what is promoted."""

from __future__ import annotations

import operator
import shutil
from pathlib import Path
from typing import Any

from stackpkg.runs import digest, files_below, now, read_json, write_json

MARKER = "complete.json"
COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le, "==": operator.eq}


def complete(checkpoint: Path, step: int) -> None:
    """Write the marker, last of all files: from here on the checkpoint counts."""
    files = {path.relative_to(checkpoint).as_posix(): digest(path) for path in files_below(checkpoint)}
    write_json(checkpoint / MARKER, {"step": step, "at": now(), "files": files})


def problems(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, one line each; empty when it is whole."""
    if not (checkpoint / MARKER).exists():
        return [f"{checkpoint.name}: no {MARKER}; saving was interrupted"]
    found = []
    for name, sha in read_json(checkpoint / MARKER)["files"].items():
        path = checkpoint / name
        if not path.exists():
            found.append(f"{checkpoint.name}/{name}: missing")
        elif digest(path) != sha:
            found.append(f"{checkpoint.name}/{name}: changed since it was saved")
    return found


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a launch, and the problems of newer ones, which are set aside, not deleted."""
    complaints: list[str] = []
    candidates = [path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    for checkpoint in sorted(candidates, key=lambda path: int(path.name.partition("-")[2]), reverse=True):
        bad = problems(checkpoint)
        if not bad:
            return checkpoint, complaints
        complaints += bad
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged-{now().replace(':', '')}")
        checkpoint.rename(aside)
    return None, complaints


def gate(values: dict[str, Any], limits: dict[str, tuple[str, float]]) -> list[str]:
    """The limits a candidate missed, one line each; empty means it may be promoted.

    `limits` maps a name to (comparison, limit). A value that is missing, null or not a number misses its limit.
    """
    missed = []
    for name, (comparison, limit) in limits.items():
        given = values.get(name)
        value = float("nan") if given is None else float(given)  # strict JSON holds "NaN" as a string
        if not COMPARE[comparison](value, limit):  # false for NaN as well
            missed.append(f"{name} is {value:g}, must be {comparison} {limit:g}")
    return missed


def _registry(artifacts: Path) -> dict[str, Any]:
    path = artifacts / "registry.json"
    return read_json(path) if path.exists() else {"current": None, "history": []}


def _enter(artifacts: Path, event: dict[str, Any], current: str | None) -> dict[str, Any]:
    registry = _registry(artifacts)
    registry = {"current": current, "history": [*registry["history"], {**event, "at": now()}]}
    write_json(artifacts / "registry.json", registry)
    return registry


def promote(artifacts: Path, candidate: Path, version: str, values: dict[str, float], missed: list[str]) -> bool:
    """Copy `candidate` to `artifacts/<version>/` and make it current, or enter the refusal and its reasons."""
    if missed:
        _enter(artifacts, {"event": "refused", "version": version, "missed": missed}, _registry(artifacts)["current"])
        return False
    target, temporary = artifacts / version, artifacts / f".{version}"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a copy that was interrupted
    shutil.copytree(candidate, temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    _enter(artifacts, {"event": "promoted", "version": version, "sha256": digest(target), "values": values}, version)
    return True


def demote(artifacts: Path, reason: str) -> str | None:
    """Make the version promoted before the current one current again; returns it, None when there is none."""
    registry = _registry(artifacts)
    line: list[str] = []  # versions in the order of their last promotion, those demoted since taken out
    for event in registry["history"]:
        if event["event"] != "refused":
            line = [v for v in line if v != event["version"]] + [event["version"]] * (event["event"] == "promoted")
    earlier = [version for version in line if version != registry["current"]]
    current = earlier[-1] if earlier else None
    _enter(artifacts, {"event": "demoted", "version": registry["current"], "reason": reason}, current)
    return current
