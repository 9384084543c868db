"""What a reviewer states (in-toto), how it is signed (`ssh-keygen -Y`), and whom a verifier trusts."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackpkg import runs

ROLES = ("architecture", "infrastructure", "safety")
SIGNOFF, MET = "urn:stackpkg:readiness-signoff:v1", "urn:stackpkg:condition-met:v1"
DEMONSTRATION = "@demonstration.invalid"  # RFC 2606: a name under .invalid belongs to nobody
TRUSTED = ("allowed_signers", "policy.yaml", "revoked_keys")
REVIEWER = re.compile(r"[A-Za-z0-9._+-]+@[A-Za-z0-9.-]+")
_KEY = r"[a-z0-9@.-]+ [A-Za-z0-9+/=]+"
_POLICY = re.compile("quorum:\n" + "".join(rf"  {role}: ([1-9])\n" for role in ROLES) + rf"authors:\n((?:- {_KEY}\n)*)")
_HEAD, _TAIL = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"
_MAGIC = b"SSHSIG\x00\x00\x00\x01"  # PROTOCOL.sshsig: preamble and version, which the signature itself does not cover


def keygen(*arguments: str | Path, text: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    if not shutil.which("ssh-keygen"):
        raise RuntimeError("ssh-keygen is not installed: install openssh-client (Debian) or openssh")
    return subprocess.run(["ssh-keygen", *map(str, arguments)], input=text, capture_output=True, check=False)


@dataclass(frozen=True)
class Trust:
    """A folder outside every run: reviewers' keys, revoked keys, and the policy, of which this is what it says."""

    folder: Path
    quorum: dict[str, int]  # approvals needed, by role
    authors: frozenset[str]  # fingerprints of keys that make runs, and so may not approve any
    problems: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> Trust:
        if missing := [
            f"{name}: missing, so nothing can be trusted" for name in TRUSTED if not (folder / name).is_file()
        ]:
            return cls(folder, {}, frozenset(), tuple(missing))
        signers, text = ((folder / name).read_text(errors="replace").split("\n") for name in TRUSTED[:2])
        told, policy = ([line for line in lines if line.strip() and line[0] != "#"] for lines in (signers, text))
        problems = (
            ["allowed_signers: a line without namespaces="] if any("namespaces=" not in line for line in told) else []
        )
        found = _POLICY.fullmatch("".join(f"{line}\n" for line in policy))
        if not found:
            return cls(folder, {}, frozenset(), (*problems, "policy.yaml: not in the form that its comments show"))
        *quorum, authors = found.groups()
        keys = re.findall(r"SHA256:\S+", keygen("-lf", "-", text=authors.replace("- ", "").encode()).stdout.decode())
        if not keys or len(keys) != authors.count("\n"):
            problems.append("policy.yaml: names no author's key, or one that ssh-keygen can't read")
        return cls(folder, dict(zip(ROLES, map(int, quorum), strict=True)), frozenset(keys), tuple(problems))


def layout(subject: str, digest: str, kind: str, predicate: dict[str, Any]) -> str:
    """in-toto Statement v1 in one fixed layout, so that `governance/verify.sh` can read it line by line."""
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": subject, "digest": {"sha256": digest}}],
        "predicateType": kind,
        "predicate": predicate,
    }
    return json.dumps(statement, indent=1, sort_keys=True) + "\n"


def write(path: Path, text: str, key: Path, role: str) -> Path:
    """Sign `text` under the role's own namespace; writes it and `<path>.sig`. Raises `ValueError` with ssh's words."""
    done = keygen("-Y", "sign", "-f", key, "-n", f"stackpkg-readiness-{role}", text=text.encode())
    if done.returncode:
        raise ValueError(f"ssh-keygen could not sign with {key}: {done.stderr.decode(errors='replace').strip()}")
    runs.write_text(path.with_name(f"{path.name}.sig"), done.stdout.decode())
    return runs.write_text(path, text)


def read(path: Path, kind: str) -> dict[str, Any]:
    """The predicate of a statement with `signed`, the digest of its subject. Raises `ValueError` for another form."""
    raw = path.read_bytes()
    try:
        found = json.loads(raw)
        said, subject = found["predicate"], found["subject"][0]
        signed = subject["digest"]["sha256"]
        fixed = raw == layout(subject["name"], signed, kind, said).encode() and REVIEWER.fullmatch(said["reviewer"])
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        fixed = None
    if not fixed:
        raise ValueError(f"{path.name}: not a statement in the form that signing writes")
    return said | {"signed": signed}


def _armoured(raw: bytes) -> bool:
    """True for exactly the bytes ssh-keygen writes; it also reads looser forms, in which a changed byte would pass."""
    lines = raw.decode(errors="replace").split("\n")
    try:
        blob = base64.b64decode("".join(lines[1:-2]), validate=True)
    except ValueError:
        return False
    again = [_HEAD, *textwrap.wrap(base64.b64encode(blob).decode(), 70), _TAIL, ""]
    return lines == again and blob.startswith(_MAGIC)


def signer(path: Path, role: str, reviewer: str, trust: Trust) -> tuple[str, str]:
    """The fingerprint of the key that signed `path`, and why its signature does not count ("" when it does)."""
    raw, signature = path.read_bytes(), path.with_name(f"{path.name}.sig")
    as_role = ("-n", f"stackpkg-readiness-{role}", "-s", signature)
    found = keygen("-Y", "check-novalidate", *as_role, text=raw) if _armoured(signature.read_bytes()) else None
    if found is None or found.returncode:
        return "", f"its .sig is no whole signature of it for the role {role}"
    key = found.stdout.decode().split()[-1]
    by = ("-Y", "verify", "-f", trust.folder / TRUSTED[0], "-I", reviewer, *as_role)
    if not keygen(*by, "-r", trust.folder / TRUSTED[2], text=raw).returncode:
        return key, ""
    told = keygen(*by, text=raw)
    why = told.stderr.decode(errors="replace")
    cause = (
        "is revoked" if not told.returncode
        else "has expired" if "key has expired" in why
        else "is not valid yet" if "not yet valid" in why
        else f"is not {reviewer}'s for the role {role}"
    )  # fmt: skip
    return key, f"the key {key} {cause}"
