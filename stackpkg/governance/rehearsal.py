"""Drills of what an archive must survive, done to a copy of a run: a disk that is lost, a reviewer's key that is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from stackpkg import runs
from stackpkg.governance import cold, seal
from stackpkg.governance.statements import DEMONSTRATION, keygen


def _receipt(page: str, began: float, found: float, **seen: Any) -> dict[str, Any]:
    """A line of `runbooks/drills.json`, which the page of the runbooks shows as its last drill. Times in seconds."""
    seconds = {"detect_seconds": found - began, "recover_seconds": time.monotonic() - began}
    return {"page": page, "at": runs.now(), **seconds, **seen}


def lost_disk(copy: Path) -> dict[str, Any]:
    """Archive the sealed run `copy`, damage one byte of the archive, which must be refused, then restore the whole one
    into `copy`'s neighbour `restored`. `problems`: what verification of what came back finds."""
    packed = cold.archive(copy)
    whole = packed.read_bytes()
    began = time.monotonic()
    packed.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        cold.restore(packed, copy.parent / "damaged")
        refused = ""
    except ValueError as error:
        refused = str(error)
    found = time.monotonic()
    packed.write_bytes(whole)
    back, problems = cold.restore(packed, copy.parent / "restored")
    files = len([*runs.files_below(back)])
    return _receipt("ArchiveRestore", began, found, refused=refused, problems=problems, files=files, bytes=len(whole))


def lost_key(copy: Path, trust: Path, role: str) -> dict[str, Any]:
    """Revoke the demonstration key with which `role` signed the run `copy`: its sign-off must count no more
    (`refused`). Then give the role a new key and sign again. `problems`: what verification finds at the end."""
    began = time.monotonic()
    old, new = (trust / f"{role}.pub").read_text().strip(), trust / f"{role}-2"
    revoked, signers = trust / "revoked_keys", trust / "allowed_signers"
    runs.write_text(revoked, f"{revoked.read_text()}{old}\n")
    refused = seal.verify(copy, trust)
    found = time.monotonic()
    keygen("-q", "-t", "ed25519", "-N", "", "-C", "", "-f", new).check_returncode()
    runs.write_text(signers, signers.read_text().replace(old, new.with_suffix(".pub").read_text().strip()))
    seal.sign(copy, role, new, role + DEMONSTRATION)
    return _receipt("KeyLoss", began, found, refused="\n".join(refused), problems=seal.verify(copy, trust))
