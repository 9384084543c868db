"""What decides which snapshot others use: a gate of named limits, and a registry that keeps its history."""

from __future__ import annotations

import operator
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import hypergeom

from stackpkg.runs import digest, files_below, now, read_json, write_json, write_text
from stackpkg.training import versions
from stackpkg.training.snapshots import MANIFEST, PROMOTED, flush

COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le, "==": operator.eq}
CARD = "README.md"  # where the hub looks for a model card
WORSE = 1.02  # a loss on the same rows may be this much higher
COUNTED = {"precision_at_k": "pairs", "recall_at_k": "pairs", "mrr": "pairs", "ndcg_at_10": "pairs",
           "long_range_accuracy": "long_range_answers"}  # fmt: skip
CHANCE = 0.01 / len(COUNTED)  # that one of these is refused when nothing changed (Bonferroni)


def gate(values: Mapping[str, Any], limits: Mapping[str, tuple[str, float]]) -> list[str]:
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


def no_worse(artifacts: Path, data: str) -> dict[str, tuple[str, float]]:
    """Limits for `gate` that a candidate misses when it is worse than the current version; none where nothing is
    promoted, or was measured on other rows: on another corpus than that of digest `data`."""
    found = registry(artifacts)
    events = [e for e in found["history"] if e["event"] == "promoted" and e["version"] == found["current"]]
    if not events or events[-1].get("data") != data:
        return {}
    values = events[-1]["values"]
    limits = {"validation_loss": ("<=", WORSE * float(values["validation_loss"]))}
    for name, counted in COUNTED.items():
        if n := values.get(counted):
            least = np.arange(round(n * float(values[name])) + 1)
            # the least x with P(X <= x) >= alpha, X of n drawn among 2n with x + k right        (Fisher 1935)
            kept = hypergeom.cdf(least, 2 * n, least + least[-1], n) >= CHANCE
            limits[name] = (">=", float(least[kept.argmax()] / n))
    return limits


def registry(artifacts: Path) -> dict[str, Any]:
    """`current`, the version that others use or None, and `history`, an event each: promoted, refused, demoted,
    rolled_back."""
    path = artifacts / "registry.json"
    return read_json(path) if path.exists() else {"current": None, "history": []}


def _enter(artifacts: Path, event: dict[str, Any], current: str | None) -> None:
    history = [*registry(artifacts)["history"], {**event, "at": now()}]
    write_json(artifacts / "registry.json", {"current": current, "history": history})


def promote(
    artifacts: Path,
    candidate: Path,
    version: str,
    values: Mapping[str, Any],
    missed: list[str],
    *,
    card: str = "",
    snapshot: Path | None = None,
) -> bool:
    """Copy `candidate`, a folder of `save_pretrained`, to `artifacts/<version>/` and make it current; or enter the
    refusal and its reasons. `card` is its model card; `snapshot`, the checkpoint it is of, will not be pruned.

    The entry holds the measured `values`, the digests of the artifact and of the corpus that the snapshot tells, and
    the versions of its architecture and states.
    """
    if missed:
        event = {"event": "refused", "version": version, "missed": missed, "values": values}
        _enter(artifacts, event, registry(artifacts)["current"])
        return False
    target, temporary = artifacts / version, artifacts / f".{version}"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a copy that was interrupted
    shutil.copytree(candidate, temporary)
    if card:
        write_text(temporary / CARD, card)
    told = {"architecture": versions.architecture(read_json(candidate / "config.json"), artifacts)}
    told |= {"router": versions.ROUTER, "retriever": versions.RETRIEVER}
    for path in [*files_below(temporary), temporary]:
        flush(path)
    replaced = artifacts / f".{version}.replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    temporary.rename(target)
    flush(artifacts)
    shutil.rmtree(replaced, ignore_errors=True)
    if snapshot:
        marks = snapshot.parent / PROMOTED
        kept = read_json(marks) if marks.exists() else {}
        write_json(marks, kept | {str(read_json(snapshot / MANIFEST)["step"]): version})
    event = {"event": "promoted", "version": version, "sha256": digest(target), "values": values, "versions": told}
    event |= {"data": read_json(snapshot / MANIFEST)["data"]} if snapshot else {}
    _enter(artifacts, event, version)
    return True


def _line(artifacts: Path) -> list[str]:
    """Versions in the order of their last promotion, without those demoted since, or rolled back from."""
    line: list[str] = []
    for event in registry(artifacts)["history"]:
        kind, version = event["event"], event.get("version")
        if kind == "rolled_back" and version in line:
            line = line[: line.index(version) + 1]
        elif kind in ("promoted", "demoted", "rolled_back"):
            line = [v for v in line if v != version] + [version] * (kind != "demoted")
    return line


def whole(artifacts: Path, version: str) -> bool:
    """Whether the artifact of a version is on disk as it was promoted."""
    events = [e for e in registry(artifacts)["history"] if e["event"] == "promoted" and e["version"] == version]
    return bool(events) and (artifacts / version).is_dir() and digest(artifacts / version) == events[-1]["sha256"]


def demote(artifacts: Path, reason: str) -> str | None:
    """Make the version promoted before the current one current again; returns it, None when there is none. One that is
    not on disk as it was promoted is passed over."""
    current = registry(artifacts)["current"]
    earlier = [version for version in _line(artifacts) if version != current and whole(artifacts, version)]
    back = earlier[-1] if earlier else None
    _enter(artifacts, {"event": "demoted", "version": current, "reason": reason}, back)
    return back


def roll_back(artifacts: Path, version: str, reason: str) -> None:
    """Make `version`, which was promoted once, current again, whatever was decided since.

    Raises `ValueError` for one that never was, or is not on disk as it was promoted.
    """
    if not whole(artifacts, version):
        known = sorted({event["version"] for event in registry(artifacts)["history"] if event["event"] == "promoted"})
        there = [name for name in known if whole(artifacts, name)]
        raise ValueError(f"{version} can't be current: never promoted, or changed since; allowed: {there or 'none'}")
    event = {"event": "rolled_back", "version": version, "from": registry(artifacts)["current"], "reason": reason}
    _enter(artifacts, event, version)
