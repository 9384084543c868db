"""The sealed tree of a run: `SHA256SUMS` over every file, and how what lies there differs from it."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from stackpkg import runs
from stackpkg.governance import runlog

SUMS = "SHA256SUMS"
_NAME = re.compile(r"[ -\[\]-~]+")  # printable ASCII without a backslash: no two names look alike
_AWAY = re.compile(r"^/|//|(^|/)\.{1,2}(/|$)")


def _tree(folder: Path) -> tuple[str, list[str]]:
    """The manifest of what lies below `folder` now, and what a manifest can not hold."""
    digests, problems = {}, []
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent) / name for name in [*folders, *files]):
            name, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                problems.append(f"{name}: a link or special file can not be sealed; put the file itself there")
            elif not _NAME.fullmatch(name):
                problems.append(f"{_shown(name)}: a name outside printable ASCII can pass for another; rename it")
            elif stat.S_ISREG(mode) and name != SUMS and not name.startswith("signoffs/"):
                digests[name] = runs.digest(path)
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)), problems


def _shown(name: str) -> str:
    """A name as one line of text."""
    return name if name.isprintable() else repr(name)


def seal(folder: Path) -> str:
    """Write `SHA256SUMS` (coreutils format) over every file but itself and `signoffs/`, and enter it in the log beside
    the run; returns its SHA-256.

    Any change voids the signatures, no change keeps them. Raises `ValueError` for links and names that can deceive.
    """
    manifest, problems = _tree(folder)
    if problems:
        raise ValueError("this run can not be sealed:\n" + "\n".join(problems))
    path = folder / SUMS
    if not path.exists() or path.read_bytes() != manifest.encode():
        runs.write_text(path, manifest)
    sealed = runs.digest(path)
    if runlog.sealed(folder) != sealed:
        runlog.enter(folder, SUMS, sealed)
    return sealed


def differences(folder: Path) -> list[str]:
    """One line per file in which the tree and its manifest differ, and how."""
    if not (folder / SUMS).is_file():
        return [f"{SUMS}: missing; this run is not sealed"]
    manifest, problems = _tree(folder)
    raw = (folder / SUMS).read_bytes()
    if raw == manifest.encode():
        return problems
    now, sealed = set(manifest.split("\n")), set(raw.decode(errors="backslashreplace").split("\n"))
    here, there = ({line[66:] for line in lines} - {""} for lines in (now, sealed))
    problems += [f"{name}: a path out of the archive, in {SUMS}" for name in sorted(there) if _AWAY.search(name)]
    changed = {line[66:] for line in now ^ sealed} & here & there
    for names, how in ((here - there, "added"), (there - here, "missing, or renamed,"), (changed, "changed")):
        problems += [f"{name}: {how} since the seal" for name in sorted(names)]
    return problems or [f"{SUMS}: lines reordered or repeated"]
