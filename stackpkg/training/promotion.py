"""What decides which snapshot others use: a gate of named limits, and a registry that keeps its history."""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import hypergeom

from stackpkg import locks
from stackpkg.data import curriculum
from stackpkg.runs import as_json, digest, files_below, now, read_json, write_json, write_text
from stackpkg.training import learned, origin, snapshots, versions
from stackpkg.training.origin import CARD
from stackpkg.training.snapshots import PROMOTED, flush

COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le, "==": operator.eq}
WORSE = 1.02  # a loss on the same rows may be this much higher
COUNTED = {"precision_at_k": "pairs", "recall_at_k": "pairs", "mrr": "pairs", "ndcg_at_10": "pairs",
           "long_range_accuracy": "long_range_answers"}  # fmt: skip
CHANCE = 0.01 / len(COUNTED)  # that one of these is refused when nothing changed (Bonferroni)


def gate(values: Mapping[str, Any], limits: Mapping[str, tuple[str, float]]) -> list[str]:
    """The limits a candidate missed, one line each; empty means it may be promoted.

    `limits` maps a name to (comparison, limit). A value that is missing, null or not finite misses its limit:
    an infinity on the good side of a limit is a broken measure all the same.
    """
    missed = []
    for name, (comparison, limit) in limits.items():
        given = values.get(name)
        value = float("nan") if given is None else float(given)  # strict JSON holds "NaN" as a string
        if not (math.isfinite(value) and COMPARE[comparison](value, limit)):
            missed.append(f"{name} is {value:g}, must be {comparison} {limit:g}")
    return missed


def in_use(outbox: Path, run: str) -> dict[str, Any]:
    """The entry of the version of a run that others use, and `run`. Raises `ValueError` where it has none."""
    version = registry(outbox / run / "artifacts")["current"]
    if version is None:
        told = sorted(outbox.glob("*/artifacts/registry.json"))
        there = ", ".join(path.parents[1].name for path in told if read_json(path)["current"])
        raise ValueError(
            f"governance.baseline: no version of outbox/{run} is in use; give a run that has one "
            f"({there or 'none here'}), or leave it empty"
        )
    return promotions(outbox / run / "artifacts")[version] | {"run": run}


def to_beat(artifacts: Path, data: str, candidates: Iterable[Path], baseline: str = "") -> dict[str, Any]:
    """The entry, and its `run`, of the version that no candidate may be worse than; empty where there is none.

    It is the one in use of the run `baseline`; where that is empty, the last in use here that was measured on the
    corpus of digest `data` and has the weights of none of the candidates, since nothing is better than itself.
    Raises `ValueError` for a baseline that has no version in use, or was measured on another corpus.
    """
    if baseline:
        entry = in_use(artifacts.parents[1], baseline)
        if entry.get("data") != data:
            raise ValueError(
                f"governance.baseline: {entry['version']} of outbox/{baseline} was measured on the corpus "
                f"{entry.get('data', '')[:16]}, this run has {data[:16]}: other rows, numbers that don't compare. Give "
                "a run of the same data, or leave it empty"
            )
        return entry
    made, entries = {weights(path) for path in candidates}, promotions(artifacts)
    line = [entries[version] for version in _line(artifacts)]
    earlier = [entry for entry in line if entry.get("data") == data and entry.get("weights") not in made]
    return earlier[-1] | {"run": artifacts.parent.name} if earlier else {}


def called(entry: Mapping[str, Any]) -> str:
    """What `to_beat` found, in words."""
    return "{version} of outbox/{run}".format_map(entry) if entry else "none: no earlier version here, and no baseline"


def no_worse(entry: Mapping[str, Any]) -> dict[str, tuple[str, float]]:
    """Limits for `gate` that a candidate misses when it is worse than the version of a promotion's entry; none for the
    empty one of `to_beat`."""
    if not entry:
        return {}
    values = entry["values"]
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


def promotions(artifacts: Path) -> dict[str, dict[str, Any]]:
    """Version -> the entry of its last promotion."""
    return {entry["version"]: entry for entry in registry(artifacts)["history"] if entry["event"] == "promoted"}


def weights(folder: Path) -> str:
    """SHA-256 of the names and digests of every file of a model but its card."""
    files = [path for path in files_below(folder) if path != folder / CARD]
    lines = (f"{digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def name(artifacts: Path, candidate: Path, card: Callable[[str], str]) -> str:
    """The name that `candidate` with the card of that name has or gets: the current version's, if it is this very one,
    else the next of v1, v2 and so on that nothing was promoted under."""
    current = registry(artifacts)["current"]
    if current and whole(artifacts, current) and weights(candidate) == weights(artifacts / current):
        page = artifacts / current / CARD
        if page.exists() and page.read_text(encoding="utf-8") == card(current):
            return str(current)
    taken = [int(version[1:]) for version in promotions(artifacts) if re.fullmatch(r"v\d+", version)]
    return f"v{max(taken, default=0) + 1}"


def withheld(artifacts: Path, candidate: Path) -> str:
    """The last version of the same weights, if it was taken out of use, which promoting them again must not undo; else
    empty."""
    made = weights(candidate)
    same = [version for version, entry in promotions(artifacts).items() if entry.get("weights") == made]
    return "" if not same or same[-1] in _line(artifacts) else same[-1]


def _enter(artifacts: Path, event: dict[str, Any], current: str | None) -> None:
    history = [*registry(artifacts)["history"], {**event, "at": now()}]
    write_json(artifacts / "registry.json", {"current": current, "history": history})


@locks.in_turn
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

    The entry holds the measured `values`, the digests of the artifact, of its weights and of the corpus that the
    snapshot tells, what `learned` asks for, and the versions of its architecture and states. What the registry holds
    already is not entered again: the same refusal, the current version. Raises `ValueError` for a known version with
    other bytes, and as `origin.traced` does, before anything is copied.
    """
    if missed:
        refused = json.loads(as_json({"event": "refused", "version": version, "missed": missed, "values": values}))
        if all(entry | refused != entry for entry in registry(artifacts)["history"]):
            _enter(artifacts, refused, registry(artifacts)["current"])
        return False
    about = origin.traced(candidate, snapshot) if snapshot else {}
    target, temporary = artifacts / version, artifacts / f".{version}"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a copy that was interrupted
    shutil.copytree(candidate, temporary)
    if card:
        write_text(temporary / CARD, card)
    known = promotions(artifacts).get(version)
    if known and known["sha256"] != digest(temporary):
        shutil.rmtree(temporary)
        raise ValueError(
            f"{version} is {known['sha256'][:16]}, promoted {known['at']}, and a version keeps its bytes; give a name "
            f"that is free: none of {', '.join(promotions(artifacts))}"
        )
    if known and registry(artifacts)["current"] == version and whole(artifacts, version):
        shutil.rmtree(temporary)
        return True
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
    event: dict[str, Any] = {"event": "promoted", "version": version, "sha256": digest(target), "values": values}
    event |= {"versions": told, "weights": weights(target)}
    if snapshot:
        home, step = snapshot.parent, about["step"]
        marks = snapshots.promoted(home)
        marks[step] = [*(given for given in marks.get(step, ()) if given != version), version]
        write_json(home / PROMOTED, {str(at): " ".join(given) for at, given in marks.items()})
        event |= {"data": about["data"], "job": home.name, "step": step}
        event["decided"] = len(curriculum.decisions(home / "decisions.jsonl"))
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
    entry = promotions(artifacts).get(version)
    return entry is not None and (artifacts / version).is_dir() and digest(artifacts / version) == entry["sha256"]


def barred(artifacts: Path, version: str) -> str:
    """Why a version may not come into use again: it is not on disk as it was promoted, or learned from what may not be
    used any more. Empty when it may."""
    if not whole(artifacts, version):
        return "never promoted, or changed since"
    return learned.overdue(artifacts.parent, promotions(artifacts)[version], int(time.time()))


@locks.in_turn
def demote(artifacts: Path, reason: str) -> str | None:
    """Make the version promoted before the current one current again; returns it, None when there is none. One that may
    not come back is passed over, and entered as `passed_over` with the reason. Raises `ValueError` where none is
    current."""
    current = registry(artifacts)["current"]
    if current is None:
        raise ValueError(f"no version is in use; promoted so far: {', '.join(promotions(artifacts)) or 'none'}")
    back, passed = None, dict[str, str]()
    for version in reversed([version for version in _line(artifacts) if version != current]):
        if not (why := barred(artifacts, version)):
            back = version
            break
        passed[version] = why
    event = {"event": "demoted", "version": current, "reason": reason} | ({"passed_over": passed} if passed else {})
    _enter(artifacts, event, back)
    return back


@locks.in_turn
def roll_back(artifacts: Path, version: str, reason: str) -> None:
    """Make `version`, which was promoted once, current again, whatever was decided since.

    Raises `ValueError` for one that is `barred`, or is current.
    """
    if version == registry(artifacts)["current"]:
        raise ValueError(f"{version} is current already")
    if why := barred(artifacts, version):
        there = [known for known in sorted(promotions(artifacts)) if not barred(artifacts, known)]
        raise ValueError(f"{version} can't be current: {why}; allowed: {there or 'none'}")
    event = {"event": "rolled_back", "version": version, "from": registry(artifacts)["current"], "reason": reason}
    _enter(artifacts, event, version)
