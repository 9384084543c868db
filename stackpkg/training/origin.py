"""Whether what is to be promoted is what a job wrote, and of the checkpoint that tells about it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from stackpkg.runs import digest, files_below, read_json
from stackpkg.training.snapshots import MANIFEST

DONE = "done.json"
CARD = "README.md"  # where the hub looks for a model card


def described(snapshot: Path) -> dict[str, Any]:
    """What the manifest of a snapshot says. Raises `ValueError` where it is gone or damaged: then nothing tells the
    step and the corpus that a version is of."""
    try:
        about = read_json(snapshot / MANIFEST)
    except (OSError, ValueError):
        about = None
    if not isinstance(about, dict) or not isinstance(about.get("step"), int) or not isinstance(about.get("data"), str):
        raise ValueError(
            f"{snapshot.name}/{MANIFEST} is gone or damaged, and tells the step and the corpus of what is promoted: "
            "restore it, or give a checkpoint that has one"
        )
    return about


def traced(candidate: Path, snapshot: Path) -> dict[str, Any]:
    """What the manifest of `snapshot` says, the checkpoint that `candidate`, a folder of weights, is of.

    Raises `ValueError` as `described` does; and for a folder of the same job where the job has not ended, ended at
    another step, or wrote other files, which are named: the measures and the data of the snapshot are none of its.
    A job that ended under a version that kept no digests is taken as it is, with a warning: it may have cost weeks, and
    was promoted on no more than that before.
    """
    about, home = described(snapshot), snapshot.parent
    if candidate.resolve().parent != home.resolve():
        return about
    if not (home / DONE).exists():
        raise ValueError(f"{home.name} has no {DONE}: it has not ended, or was rolled back since; launch it again")
    done = read_json(home / DONE)
    if (ended := done.get("steps")) != about["step"]:
        raise ValueError(
            f"{candidate.name} is of step {ended}, where {home.name} ended, {snapshot.name} of step {about['step']}: "
            f"give the checkpoint of step {ended}"
        )
    if "files" not in done:
        warnings.warn(
            f"{home.name} ended under a version that kept no digests: whether {candidate.name} is as the job wrote it "
            f"is not checked. To have it checked: roll back to the checkpoint before {snapshot.name} and launch again",
            stacklevel=2,
        )
        return about
    here = {path.relative_to(candidate).as_posix(): digest(path) for path in files_below(candidate)}
    wrote = {name.removeprefix(f"{candidate.name}/"): sha for name, sha in done["files"].items()
             if name.startswith(f"{candidate.name}/")}  # fmt: skip
    changed = [name for name in sorted(here.keys() | wrote.keys()) if here.get(name) != wrote.get(name)]
    if other := [f"{candidate.name}/{name}" for name in changed if name != CARD]:
        raise ValueError(
            f"not as {home.name} wrote it ({DONE}): {', '.join(other)}. Restore what changed, or roll back to the "
            f"checkpoint before {snapshot.name} and launch again"
        )
    return about
