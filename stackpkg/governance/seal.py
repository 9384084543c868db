"""Seal a run (SHA256SUMS), sign it by role (in-toto statements, SSH signatures), verify both with ssh-keygen alone."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import stat
import subprocess
import textwrap
from pathlib import Path
from typing import Any

from stackpkg import params, runs
from stackpkg.schema import allowed

ROLES = ("architecture", "infrastructure", "safety")
DECISIONS = ("approve", "approve-with-conditions", "reject")
LOUD = "DEMONSTRATION KEYS: not an approval"
_DEMONSTRATION = "@demonstration.invalid"  # RFC 2606: a name under .invalid belongs to nobody
_REVIEWER = re.compile(r"[A-Za-z0-9._+-]+@[A-Za-z0-9.-]+")
_HEAD, _TAIL = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"
_MAGIC = b"SSHSIG\x00\x00\x00\x01"  # PROTOCOL.sshsig: preamble and version, which the signature itself does not cover


def _tree(folder: Path) -> tuple[str, list[str]]:
    """The manifest of what lies below `folder` now, and what a manifest can not hold."""
    digests, problems = {}, []
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent) / name for name in [*folders, *files]):
            name, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                problems.append(f"{name}: a link or special file can not be sealed; put the file itself there")
            elif not name.isprintable() or "\\" in name:
                problems.append(f"{name!r}: rename it without a backslash or control character")
            elif stat.S_ISREG(mode) and name != "SHA256SUMS" and not name.startswith("signoffs/"):
                digests[name] = runs.digest(path)
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)), problems


def seal(folder: Path) -> str:
    """Write `SHA256SUMS` (coreutils format) over every file but itself and `signoffs/`; returns its SHA-256.

    Any change voids the signatures, no change keeps them. Raises `ValueError` for links and names coreutils escape.
    """
    manifest, problems = _tree(folder)
    if problems:
        raise ValueError("this run can not be sealed:\n" + "\n".join(problems))
    path = folder / "SHA256SUMS"
    if not path.exists() or path.read_bytes() != manifest.encode():
        runs.write_text(path, manifest)
    return runs.digest(path)


def _against_manifest(folder: Path) -> list[str]:
    """One line per file in which the tree and its manifest differ."""
    if not (folder / "SHA256SUMS").is_file():
        return ["SHA256SUMS: missing; this run is not sealed"]
    manifest, problems = _tree(folder)
    raw = (folder / "SHA256SUMS").read_bytes()
    if problems or raw == manifest.encode():
        return problems
    now, sealed = set(manifest.split("\n")), set(raw.decode(errors="replace").split("\n"))
    names = sorted({line[66:] for line in now ^ sealed} - {""})
    return [f"{name}: added, missing or changed since the seal" for name in names] or ["SHA256SUMS: lines reordered"]


def _keygen(*arguments: str, text: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    if not shutil.which("ssh-keygen"):
        raise RuntimeError("ssh-keygen is not installed: install openssh-client (Debian) or openssh")
    return subprocess.run(["ssh-keygen", *arguments], input=text, capture_output=True, check=False)


def _statement(digest: str, predicate: dict[str, Any]) -> str:
    """in-toto Statement v1 in one fixed layout, so that `governance/verify.sh` can read it line by line."""
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "SHA256SUMS", "digest": {"sha256": digest}}],
        "predicateType": "urn:stackpkg:readiness-signoff:v1",
        "predicate": predicate,
    }
    return json.dumps(statement, indent=1, sort_keys=True) + "\n"


def sign(
    folder: Path, role: str, key: Path, reviewer: str, decision: str = "approve", conditions: tuple[str, ...] = ()
) -> Path:
    """Write `signoffs/<role>.json` and its detached SSH signature under the role's own namespace.

    `reviewer` is the principal of `allowed_signers`. Raises `ValueError` when the tree is not what the manifest says.
    """
    for what, given, known in (("role", role, ROLES), ("decision", decision, DECISIONS)):
        if given not in known:
            raise ValueError(f"unknown {what} {given!r}; {allowed(given, known)}")
    if not _REVIEWER.fullmatch(reviewer):
        raise ValueError(f"reviewer {reviewer!r} must be name@domain, as in governance/allowed_signers")
    if bool(conditions) != (decision == DECISIONS[1]):
        raise ValueError(
            f"decision {decision!r} with {len(conditions)} condition(s): {DECISIONS[1]} has some, no other"
        )
    if problems := _against_manifest(folder):
        raise ValueError("seal the run before signing it:\n" + "\n".join(problems))
    said: dict[str, Any] = {"role": role, "reviewer": reviewer, "decision": decision, "conditions": list(conditions)}
    said |= {"run": folder.resolve().name, "at": runs.now(), "demonstration": reviewer.endswith(_DEMONSTRATION)}
    text = _statement(runs.digest(folder / "SHA256SUMS"), said)
    done = _keygen("-Y", "sign", "-f", str(key), "-n", f"stackpkg-readiness-{role}", text=text.encode())
    if done.returncode:
        raise ValueError(f"ssh-keygen could not sign with {key}: {done.stderr.decode(errors='replace').strip()}")
    runs.write_text(folder / f"signoffs/{role}.json.sig", done.stdout.decode())
    return runs.write_text(folder / f"signoffs/{role}.json", text)


def _armoured(raw: bytes) -> bool:
    """True for exactly the bytes ssh-keygen writes; it also reads looser forms, in which a changed byte would pass."""
    lines = raw.decode(errors="replace").split("\n")
    try:
        blob = base64.b64decode("".join(lines[1:-2]), validate=True)
    except ValueError:
        return False
    again = [_HEAD, *textwrap.wrap(base64.b64encode(blob).decode(), 70), _TAIL, ""]
    return lines == again and blob.startswith(_MAGIC)


def _against_signature(folder: Path, role: str, signers: Path) -> list[str]:
    name, digest = f"signoffs/{role}.json", runs.digest(folder / "SHA256SUMS")
    paths = [folder / name, folder / f"{name}.sig"]
    if missing := [f"signoffs/{path.name}: missing" for path in paths if not path.is_file()]:
        return missing
    raw = paths[0].read_bytes()
    try:
        statement = json.loads(raw)
        said, signed = statement["predicate"], statement["subject"][0]["digest"]["sha256"]
        reviewer = said["reviewer"]
        fixed = raw == _statement(signed, said).encode() and _REVIEWER.fullmatch(reviewer) is not None
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return [f"{name}: not a statement in the form that signing writes"]
    arguments = ("-f", str(signers), "-I", reviewer, "-n", f"stackpkg-readiness-{role}", "-s", str(paths[1]))
    if not (fixed and _armoured(paths[1].read_bytes())) or _keygen("-Y", "verify", *arguments, text=raw).returncode:
        return [f"{name}: {name}.sig is not {reviewer}'s signature of it for the role {role}"]
    wanted = {"decision": "approve", "demonstration": reviewer.endswith(_DEMONSTRATION), "role": role}
    wanted |= {"run": folder.resolve().name}
    wrong = [
        f"{name}: {key} is {said.get(key)!r}, not {want!r}" for key, want in wanted.items() if said.get(key) != want
    ]
    return wrong + [f"SHA256SUMS: {name} signed a different manifest"] * (signed != digest)


def verify(folder: Path, signers: Path) -> list[str]:
    """Every problem as `file: reason`; empty when tree, manifest and the approval of every role hold together.

    `signers`: an OpenSSH `allowed_signers` file kept outside the run; each line binds a key to roles by `namespaces=`.
    """
    if not signers.is_file():
        return [f"{signers.name}: missing, so no signature can be checked"]
    lines = [line for line in signers.read_text().splitlines() if line.strip() and not line.startswith("#")]
    problems = [f"{signers.name}: a line without namespaces=" for line in lines if "namespaces=" not in line]
    problems += _against_manifest(folder)
    extra = {f.name for f in (folder / "signoffs").glob("*")} - {f"{r}.json{s}" for r in ROLES for s in ("", ".sig")}
    problems += [f"signoffs/{name}: not a sign-off of {', '.join(ROLES)}" for name in sorted(extra)]
    if (folder / "SHA256SUMS").is_file():
        problems += [problem for role in ROLES for problem in _against_signature(folder, role, signers)]
    return problems


def demonstration_keys(folder: Path) -> Path:
    """Throw-away key pairs, one per role, beside the archive in `.demonstration/<run>/`; returns that folder."""
    place = folder.parent / ".demonstration" / folder.name
    if not (place / "allowed_signers").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True, mode=0o700)
        lines = [f"# {LOUD}\n"]
        for role in ROLES:
            _keygen("-q", "-t", "ed25519", "-N", "", "-C", "demonstration", "-f", str(place / role)).check_returncode()
            public = (place / f"{role}.pub").read_text()
            lines.append(f'{role}{_DEMONSTRATION} namespaces="stackpkg-readiness-{role}" {public}')
        runs.write_text(place / "allowed_signers", "".join(lines))
    return place


def signers_for(folder: Path) -> tuple[Path, bool]:
    """The `allowed_signers` to verify a run with, and whether its sign-offs are only demonstrations."""
    texts = [path.read_text(errors="replace") for path in (folder / "signoffs").glob("*.json")]
    if texts and all('"demonstration": true' in text for text in texts):
        return folder.parent / ".demonstration" / folder.name / "allowed_signers", True
    return runs.root() / "governance" / "allowed_signers", False


def finish(folder: runs.RunFolder, p: params.Params) -> dict[str, Any]:
    """Seal a finished run; where the profile asks for it sign with demonstration keys, never over a real sign-off."""
    digest, (signers, demonstration) = seal(folder.path), signers_for(folder.path)
    problems, unsigned = verify(folder.path, signers), not any((folder.path / "signoffs").glob("*"))
    if problems and (demonstration or unsigned) and p.governance.demonstration_keys:
        place, demonstration = demonstration_keys(folder.path), True
        for role in ROLES:
            sign(folder.path, role, place / role, role + _DEMONSTRATION)
        problems = verify(folder.path, place / "allowed_signers")
    notice = LOUD if demonstration else ""
    return {"manifest_sha256": digest, "demonstration": demonstration, "notice": notice, "problems": problems}
