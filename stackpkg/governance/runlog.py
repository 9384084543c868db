"""The log of runs, `LOG.jsonl` beside them: one line for each seal and each sign-off, chained by digest; and git tags.

Whoever can write the log can write it anew from the start: a git tag per sign-off, which names the log's last line,
and copies kept elsewhere make that visible.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import subprocess
from pathlib import Path

from stackpkg import runs

LOG, START = "LOG.jsonl", "0" * 64
_LINE = re.compile(
    r'\{"at": "[0-9T:+-]+", "file": "(SHA256SUMS|signoffs/[a-z]+(-[2-9])?\.json)", "previous": "[0-9a-f]{64}", '
    r'"run": "[A-Za-z0-9._-]+", "sha256": "[0-9a-f]{64}"\}'
)


def _read(place: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The entries as far as the chain holds, and where it breaks."""
    path, previous, entries = place / LOG, START, list[dict[str, str]]()
    if not path.is_file():
        return [], [f"{LOG}: missing; it lies beside the run, one line for each seal"]
    for number, line in enumerate(path.read_text(errors="replace").removesuffix("\n").split("\n"), 1):
        if not _LINE.fullmatch(line) or json.loads(line)["previous"] != previous:
            return entries, [f"{LOG}: line {number} breaks the chain"]
        entries.append(json.loads(line))
        previous = hashlib.sha256(f"{line}\n".encode()).hexdigest()
    return entries, []


def entries(place: Path) -> list[dict[str, str]]:
    """Every entry, oldest first: `at`, `run`, `file`, its `sha256`, and `previous`, the digest of the line before.

    Raises `ValueError` where the chain is broken; a log that is not there has no entries.
    """
    found, problems = _read(place)
    if problems and (place / LOG).exists():
        raise ValueError(f"{problems[0]}; bring back a copy of {LOG} whose chain holds")
    return found


def sealed(folder: Path) -> str:
    """The digest of the manifest that was entered last for this run; empty when none was."""
    seals = [e["sha256"] for e in entries(folder.parent) if e["run"] == folder.name and e["file"] == "SHA256SUMS"]
    return seals[-1] if seals else ""


def enter(folder: Path, file: str, digest: str) -> None:
    """Add a line for a file of the run. Two processes at once wait for each other; the log is written whole."""
    place = folder.parent
    with (place / f".{LOG}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries(place)  # a broken chain is not continued
        text = (place / LOG).read_text() if (place / LOG).exists() else ""
        entry = {"at": runs.now(), "run": folder.name, "file": file, "sha256": digest, "previous": _head(text)}
        runs.write_text(place / LOG, f"{text}{json.dumps(entry, sort_keys=True)}\n")


def _head(text: str) -> str:
    """The digest of the last line, line break included; zeros before the first."""
    return hashlib.sha256(text.splitlines(keepends=True)[-1].encode()).hexdigest() if text else START


def problems(folder: Path) -> list[str]:
    """Where the chain breaks, and in what the run differs from what was last entered for it."""
    found, broken = _read(folder.parent)
    if broken:
        return broken
    mine = [entry for entry in found if entry["run"] == folder.name]
    seals = [n for n, entry in enumerate(mine) if entry["file"] == "SHA256SUMS"]
    last = {entry["file"]: entry["sha256"] for entry in mine[seals[-1] :]} if seals else {"SHA256SUMS": ""}
    wrong = [f for f, sha in sorted(last.items()) if not (folder / f).is_file() or runs.digest(folder / f) != sha]
    return [
        f"{LOG}: the last seal entered for {folder.name} is another"
        if file == "SHA256SUMS"
        else f"{file}: not what was entered in {LOG} when it was signed"
        for file in wrong
    ]


def until(folder: Path) -> str:
    """The log as far as the last line about this run, which stays the same while other runs are sealed."""
    lines = (folder.parent / LOG).read_text().splitlines(keepends=True)
    return "".join(lines[: max(n for n, line in enumerate(lines, 1) if json.loads(line)["run"] == folder.name)])


def _git(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(place), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", "git is not installed")


def rewritten(folder: Path, trusted: Path) -> list[str]:
    """Git tags of this run's sign-offs that name a line which the log has no more: then it was written anew.

    The tags are those of the repository that the keys lie in, else of the one that the log lies in; without git or
    a repository there is nothing to say.
    """
    query = ("tag", "--list", f"signoff/{folder.name}/*", "--format=%(refname:short) %(contents:body)")
    told = _git(trusted, *query)
    if told.returncode:
        told = _git(folder.parent, *query)
    tags = re.findall(r"^(signoff/\S+) manifest [0-9a-f]+\nlog ([0-9a-f]+)$", told.stdout, re.MULTILINE)
    text = (folder.parent / LOG).read_bytes() if tags and (folder.parent / LOG).is_file() else b""
    lines = {hashlib.sha256(line + b"\n").hexdigest() for line in text.split(b"\n")}
    return [f"{LOG}: the line that git's tag {name} names is gone" for name, line in tags if line not in lines]


def tag(folder: Path, role: str, reviewer: str) -> str:
    """An annotated git tag for a sign-off, `signoff/<run>/<role>-<log>`, that says manifest and log; a line to print.

    Nothing is pushed. A signature counts without it: where it can't be made, the line says why.
    """
    head = _head((folder.parent / LOG).read_text())
    name = f"signoff/{folder.name}/{role}-{head[:12]}"
    text = f"{role} of {folder.name}\n\nmanifest {runs.digest(folder / 'SHA256SUMS')}\nlog {head}\n"
    who = ["-c", f"user.name={reviewer}", "-c", f"user.email={reviewer}"]
    done = _git(runs.root(), *who, "tag", "--annotate", "--no-sign", "--message", text, name)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["git gave no reason"])[-1]
        return f"no git tag: {why}"
    return f"tagged {name}; push it yourself, if others should see it: git push REMOTE {name}"
