"""Snapshots on disk: complete or not there, verified before use; which of them stay."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from stackpkg.params import Snapshots
from stackpkg.runs import digest, files_below, now, read_json, write_json
from stackpkg.training.recovery import MAX_CONSECUTIVE_SKIPS

MARKER, MANIFEST = "complete.json", "manifest.json"
PARTIAL = ".saving"  # what is being written lies in here, and counts for nothing
VOUCHED = ".digests-"  # and the rank: of the files that it wrote
PROMOTED = "promoted.json"  # step -> versions of the snapshots that were promoted: these stay
ENDS = ("final", "final_ema")  # the weights at the end of a job, and their average
TOLD = 8  # problems that an error names


class ResumeFailed(RuntimeError):
    """There are checkpoints, and none is whole; they are where they were."""


def flush(path: Path) -> None:
    """To the disk itself: the contents of a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def complete(checkpoint: Path, step: int, ranks: int = 0, promised: Iterable[str] = ()) -> None:
    """Write the marker, last of all files, when all of them are on disk: from here on the checkpoint counts. What the
    `ranks` hashed themselves (`vouch`) is not read again, and asked for by name: a folder on another machine may be
    listed as it was a moment ago. Raises `ValueError` where a rank did not vouch, or for none of the files `promised`.
    """
    files: dict[str, str] = {}
    for rank in range(ranks):
        told = checkpoint / f"{VOUCHED}{rank}.json"
        if not told.exists():
            raise ValueError(f"the files of rank {rank} are not in {checkpoint.name}: give all nodes one outbox/")
        files |= read_json(told)
        told.unlink()
    if lacking := sorted({*promised} - files.keys()):
        raise ValueError(f"no rank vouched for {', '.join(lacking[:TOLD])} of {checkpoint.name}")
    for path in files_below(checkpoint):
        if (name := path.relative_to(checkpoint).as_posix()) not in files:
            flush(path)
            files[name] = digest(path)
    files = dict(sorted(files.items()))
    write_json(checkpoint / MARKER, {"step": step, "at": now(), "files": files})
    for folder in {path.parent for path in files_below(checkpoint)}:
        flush(folder)


def vouch(checkpoint: Path, rank: int, paths: Collection[Path]) -> None:
    """Flush the files that this rank wrote, which nobody else may, and leave their digests for `complete`."""
    for path in paths:
        flush(path)
    told = {path.relative_to(checkpoint).as_posix(): digest(path) for path in paths}
    write_json(checkpoint / f"{VOUCHED}{rank}.json", told)


def publish(partial: Path, step: int, ranks: int = 0, promised: Iterable[str] = ()) -> Path:
    """`complete` HOME/.saving/checkpoint-N and move it to HOME/checkpoint-N in one act. Returns where it is then."""
    complete(partial, step, ranks, promised)
    home = partial.parents[1]
    target = home / partial.name
    if target.exists():
        _set_aside(target, "replaced")
    partial.rename(target)
    flush(home)
    return target


def _read(path: Path) -> dict[str, Any]:
    """What a file of JSON holds; nothing when it is damaged."""
    try:
        told = read_json(path)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def make(folder: Path, write: Callable[[Path], object]) -> None:
    """A folder beside the checkpoints of a job, by `write`: all of it is on the disk, or none of it is there."""
    partial = folder.parent / PARTIAL / folder.name
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    for path in files_below(partial):
        flush(path)
    flush(partial)
    partial.rename(folder)
    flush(folder.parent)


def problems(checkpoint: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint, one line each; empty when it is whole. Of `parts` ranks that share the reading,
    each gives its number, `part`, and looks at its files alone."""
    if not (checkpoint / MARKER).exists():
        return [f"{checkpoint.name}: no {MARKER}; saving was interrupted"]
    files = _read(checkpoint / MARKER).get("files")
    if not files or not isinstance(files, dict):
        return [f"{checkpoint.name}/{MARKER}: changed since it was saved"]
    found = []
    for name, sha in [*files.items()][part::parts]:
        path = checkpoint / name
        try:
            if digest(path) != sha:
                found.append(f"{checkpoint.name}/{name}: changed since it was saved")
        except FileNotFoundError:
            found.append(f"{checkpoint.name}/{name}: missing")
        except OSError as error:  # of the disk, or of a file system on another machine
            found.append(f"{checkpoint.name}/{name}: can't be read, {error.strerror}")
    return found


def listed(home: Path) -> dict[int, Path]:
    """Step -> checkpoint, in order; those set aside and those being written are none."""
    found = {path.name.partition("-")[2]: path for path in home.glob("checkpoint-*")}
    return {int(step): found[step] for step in sorted(filter(str.isdigit, found), key=int)}


def _set_aside(checkpoint: Path, why: str) -> None:
    name = f"{checkpoint.name}.{why}-{now().replace(':', '')}"
    taken = len([*checkpoint.parent.glob(f"{name}*")])  # within the same second
    checkpoint.rename(checkpoint.with_name(f"{name}-{taken + 1}" if taken else name))


def latest(home: Path, check: Callable[[Path], list[str]] = problems) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a job that is not running, and the problems of newer ones, which are set aside,
    not deleted. What a save left that was broken off is removed: nothing of it was ever promised; one that lacked no
    more than its name gets it.

    Raises `ResumeFailed` where there are checkpoints and none is whole: to begin anew is for a person to say.
    """
    complaints, wrong, damaged = list[str](), list[str](), list[Path]()
    for partial in sorted((home / PARTIAL).glob("checkpoint-*")):
        if partial.name.endswith(".deleted"):
            continue  # all of it goes below, whatever of it is left
        if (partial / MARKER).exists() and not (home / partial.name).exists():
            partial.rename(home / partial.name)
        else:
            complaints.append(f"{partial.name}: saving was broken off; removed")
    shutil.rmtree(home / PARTIAL, ignore_errors=True)
    for checkpoint in reversed(listed(home).values()):
        bad = check(checkpoint)
        if not bad:
            for path in damaged:
                _set_aside(path, "damaged")
            return checkpoint, [*complaints, *wrong]
        wrong += bad
        damaged.append(checkpoint)
    if damaged:
        more = f"; and {len(wrong) - TOLD} more" if len(wrong) > TOLD else ""
        raise ResumeFailed(
            f"{home.name} has {len(damaged)} checkpoint(s), and none is whole: {'; '.join(wrong[:TOLD])}{more}. They "
            "are where they were: restore one, or mend the file system that shows them so, and launch again; "
            f"to begin anew from step 0: stackpkg rollback outbox/{home.parents[1].name} --step 0 --job {home.name}"
        )
    return None, complaints


def roll_back(home: Path, step: int) -> tuple[Path | None, list[str]]:
    """Set aside the checkpoints after `step`, the report of the end and the weights at it, so that the job, which must
    not be running, goes on from an earlier one; that one, and the names of what was set aside."""
    aside = [path for at, path in listed(home).items() if at > step]
    aside += [path for path in (home / name for name in ("done.json", *ENDS)) if path.exists()]
    for path in aside:
        _set_aside(path, "aside")
    left = [*listed(home).values()]
    return (left[-1] if left else None), [path.name for path in aside]


def before(home: Path, step: int) -> int:
    """The number of the newest checkpoint without the learning of optimiser step `step` (from 0); 0 for none."""
    return max((at for at in listed(home) if at <= step), default=0)


def promoted(home: Path) -> dict[int, list[str]]:
    """Step of a checkpoint -> the versions that were promoted from it."""
    told = read_json(home / PROMOTED) if (home / PROMOTED).exists() else {}
    return {int(at): given.split() for at, given in told.items()}


def touched(home: Path, step: int) -> list[str]:
    """What holds the learning of optimiser step `step` (from 0): checkpoints, promoted versions, weights at the end."""
    found = [path.name for at, path in listed(home).items() if at > step]
    found += [f"version {version}" for at, given in promoted(home).items() if at > step for version in given]
    return found + [name for name in ENDS if (home / name).exists()]


def reach(home: Path, step: int) -> dict[str, Any]:
    """What of a job holds the learning of optimiser step `step` (from 0), and the newest checkpoint that does not."""
    last = before(home, step)
    return {"snapshots": touched(home, step), "newest_without": f"checkpoint-{last}" if last else ""}


def carry(name: str, source: Path, target: Path) -> Path:
    """Give the checkpoint `target` the file `name` of the checkpoint `source`, such as the state of its routers: made
    anew and whole in its place; what was there is set aside. Returns it. For a job that is not running.

    Raises `ValueError` where one of them is not whole or `source` has no such file.
    """
    if bad := [*problems(source), *problems(target)]:
        raise ValueError(f"only whole checkpoints carry and are carried to: {'; '.join(bad)}")
    if name not in read_json(source / MARKER)["files"]:
        allowed = ", ".join(read_json(source / MARKER)["files"])
        raise ValueError(f"{source.name} has no file {name}; it has {allowed}")
    partial = target.parent / PARTIAL / target.name
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(target, partial, copy_function=os.link)
    for changed in (name, MARKER):
        (partial / changed).unlink(missing_ok=True)
    shutil.copy2(source / name, partial / name)
    return publish(partial, read_json(target / MARKER)["step"])


def retained(steps: Iterable[int], losses: Mapping[int, float], keep: Snapshots, promoted: Iterable[int]) -> set[int]:
    """Which of the whole checkpoints at `steps` stay: the last, every n-th, the best by validation loss where the step
    was evaluated (`losses`; one that is not a number is never best), what was promoted, and what a job can't do
    without: the newest before any fault that the recovery ladder can still go back from."""
    have = sorted(steps)
    if not have:
        return set()
    # an update after have[-1] ends a fault, which began up to MAX_CONSECUTIVE_SKIPS - 1 steps before it
    sound = [step for step in have if step <= have[-1] + 1 - MAX_CONSECUTIVE_SKIPS]
    near = have[len(sound) :]
    ranked = sorted((loss, -step) for step, loss in losses.items() if step in have and loss == loss)
    stay = {*have[-keep.keep_last :], *sound[-1:], *near, *(-step for _, step in ranked[: keep.keep_best])}
    stay |= {step for step in have if keep.keep_every and step % keep.keep_every == 0}
    return stay | (set(promoted) & set(have))


def prune(home: Path, keep: Snapshots) -> list[int]:
    """Delete the checkpoints that `retained` lets go, for rank 0; their steps. A name goes first, then the files."""
    have = {step: path for step, path in listed(home).items() if (path / MARKER).exists()}
    told = {step: _read(path / MANIFEST) for step, path in have.items() if (path / MANIFEST).exists()}
    losses = {
        step: float(about["validation_loss"])
        for step, about in told.items()
        if about.get("validation_loss") is not None
    }
    gone = sorted(have.keys() - retained(have, losses, keep, promoted(home)))
    for step in gone:
        hidden = home / PARTIAL / f"{have[step].name}.deleted"
        hidden.parent.mkdir(exist_ok=True)
        have[step].rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    return gone
