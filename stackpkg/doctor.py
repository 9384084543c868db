"""What this machine is, what it lacks, and how to mend it: behind `stackpkg doctor` and notebook 00."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from typing import NamedTuple

import typer

from stackpkg import runs
from stackpkg.console import AsJson

NEEDED = {
    "git": ("versions are recorded with it", "install git"),
    "ssh-keygen": ("sign-offs are made and verified with it", "install openssh-client (Debian) or openssh"),
}
USEFUL = {
    "promtool": ("alert rules are not tested without it", "install prometheus (Debian)"),
    "prometheus": ("alerts are not drilled through a server without it", "install prometheus (Debian)"),
    "prometheus-alertmanager": ("no alert reaches a receiver without it", "install prometheus-alertmanager (Debian)"),
    "chromium": ("the book is not tested in a browser without it", "install chromium"),
}
LEAST_GIB = 5  # of free disk, beside what the text of a profile needs


class Finding(NamedTuple):
    """One thing looked at. `mend` is empty where nothing is to be done; `needed`: no run goes without it."""

    name: str
    found: str
    mend: str = ""
    needed: bool = False


def locked() -> dict[str, tuple[str, str]]:
    """Package -> (version in the lock, version installed or `missing`), of those that differ."""
    lines = (runs.root() / "requirements.lock.txt").read_text(encoding="utf-8").splitlines()
    wanted = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    found = {name: _installed(name) for name in wanted}
    return {name: (wanted[name], found[name]) for name in wanted if wanted[name] != found[name]}


def _installed(name: str) -> str:
    try:
        return metadata.version(name).split("+")[0]  # torch adds +cpu or +cu, the build of the same version
    except metadata.PackageNotFoundError:
        return "missing"


def programs() -> dict[str, bool]:
    """Program that a run calls -> whether it is on the path."""
    return {name: shutil.which(name) is not None for name in (*NEEDED, *USEFUL)}


def accelerators() -> list[str]:
    """Names of the GPUs that the driver tells of; importing torch for it would take seconds."""
    if not shutil.which("nvidia-smi"):
        return []
    asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def examine() -> list[Finding]:
    """Everything at once, what a run needs first. Nothing is changed, nothing asked of a network."""
    at = f"{sys.version_info.major}.{sys.version_info.minor}"
    python = "" if at == "3.11" else "make the environment with Python 3.11: make clean env PYTHON=/path/to/python3.11"
    differing, there = locked(), programs()
    versions = ", ".join(f"{name} {here} instead of {wanted}" for name, (wanted, here) in [*differing.items()][:4])
    versions += ", ..." * (len(differing) > 4)
    free = shutil.disk_usage(runs.root()).free / 2**30
    room = "" if free >= LEAST_GIB else f"free {LEAST_GIB - free:.1f} GiB: old runs in outbox/ are plain folders"
    memory = runs.memory_gib()
    found = [
        Finding("Python", at, python, needed=True),
        Finding("packages", versions or "as locked", "make env" * bool(differing), needed=True),
        *(Finding(name, "there" if there[name] else f"missing: {why}", mend * (not there[name]), True)
          for name, (why, mend) in NEEDED.items()),
        Finding("disk", f"{free:.1f} GiB free", room, needed=True),
        Finding("cores", str(os.cpu_count())),
        Finding("memory", f"{memory:.1f} GiB", "" if memory >= 4 else "the dry run needs 4 GiB; the smoke run less"),
        Finding("GPUs", "; ".join(accelerators()) or "none: everything runs on the CPU, in fp32 or bf16"),
    ]  # fmt: skip
    for name, (why, mend) in USEFUL.items():
        found.append(Finding(name, "there" if there[name] else f"missing: {why}", mend * (not there[name])))
    return found


def doctor(as_json: AsJson = False) -> None:
    """What this machine is and lacks, and how to mend it. Ends with 1 where a run could not go."""
    found = examine()
    if as_json:
        typer.echo(json.dumps([finding._asdict() for finding in found], indent=1))
    for name, said, mend, needed in found * (not as_json):
        colour = "green" if not mend else "red" if needed else "yellow"
        typer.secho(f"{name:<24} {said}{f' -> {mend}' * bool(mend)}", fg=colour)
    if any(finding.needed and finding.mend for finding in found):
        raise typer.Exit(1)
