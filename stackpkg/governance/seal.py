"""Seal a run, sign it by role, verify both with ssh-keygen alone, and what the pipeline does when a run has ended."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from stackpkg import params, runs
from stackpkg.governance import runlog, statements, terms
from stackpkg.governance.statements import DEMONSTRATION, ROLES, Trust, keygen
from stackpkg.governance.tree import SUMS, differences, seal
from stackpkg.schema import allowed

__all__ = [
    "DECISIONS",
    "DEMONSTRATION",
    "LOUD",
    "ROLES",
    "demonstration_keys",
    "finish",
    "prepare",
    "seal",
    "sign",
    "signers",
    "trust_for",
    "verify",
]
DECISIONS = ("approve", "approve-with-conditions", "reject")
LOUD = "DEMONSTRATION KEYS: not an approval"
POLICY = "approval/policy.yaml"
_OTHER_POLICY = f"{POLICY}: not the policy to verify with; seal the run anew under it, or give the folder of its day"
_SLOT = re.compile(rf"({'|'.join(ROLES)})(-[2-9])?\.json(\.sig)?")


def _slot(folder: Path, role: str, said: dict[str, Any], digest: str) -> Path:
    """The file of this reviewer: their own, one whose statement no longer counts, or the first that is free."""
    for name in (f"{role}.json", *(f"{role}-{n}.json" for n in range(2, 10))):
        path = folder / "signoffs" / name
        try:
            there = statements.read(path, statements.SIGNOFF)
        except (OSError, ValueError):
            return path
        counts = there["signed"] == digest and there["demonstration"] == said["demonstration"]
        if not counts or there["reviewer"] == said["reviewer"]:
            return path
    raise ValueError(f"nine reviewers have signed for {role} already")


def sign(
    folder: Path, role: str, key: Path, reviewer: str, decision: str = "approve", asked: terms.Terms | None = None
) -> Path:
    """Write `signoffs/<role>.json` and its detached SSH signature under the role's own namespace; enter it in the log.

    `reviewer` is the principal of `allowed_signers`; a second reviewer of a role gets `<role>-2.json`. Raises
    `ValueError` when the tree is not what the manifest says, or the sealed list of conditions is not true.
    """
    asked = asked or terms.Terms()
    for what, given, known in (("role", role, ROLES), ("decision", decision, DECISIONS)):
        if given not in known:
            raise ValueError(f"unknown {what} {given!r}; {allowed(given, known)}")
    if not statements.REVIEWER.fullmatch(reviewer):
        raise ValueError(f"reviewer {reviewer!r} must be name@domain, as in governance/allowed_signers")
    if bool(asked.conditions) != (decision == DECISIONS[1]):
        raise ValueError(
            f"decision {decision!r} with {len(asked.conditions)} condition(s): {DECISIONS[1]} has some, no other"
        )
    if problems := differences(folder):
        raise ValueError("seal the run before signing it:\n" + "\n".join(problems))
    digest, demonstration = runs.digest(folder / SUMS), reviewer.endswith(DEMONSTRATION)
    place = demonstration_keys(folder) if demonstration else runs.root() / "governance"
    wrong = [_OTHER_POLICY] * (not _under(folder, place)) + terms.untrue(folder, Trust.read(place))
    if wrong:
        raise ValueError("set governance.demonstration_keys and run the profile again:\n" + "\n".join(wrong))
    said: dict[str, Any] = {"role": role, "reviewer": reviewer, "decision": decision, "demonstration": demonstration}
    said |= {"run": folder.resolve().name, "at": runs.now(), "conditions": asked.model_dump(mode="json")["conditions"]}
    said["waivers"] = [waiver | {"signer": reviewer} for waiver in asked.model_dump(mode="json")["waivers"]]
    path, text = _slot(folder, role, said, digest), statements.layout(SUMS, digest, statements.SIGNOFF, said)
    statements.write(path, text, key, role)
    runlog.enter(folder.resolve(), f"signoffs/{path.name}", runs.digest(path))
    return path


def _under(folder: Path, place: Path) -> bool:
    """True when the run was sealed under the policy of `place`."""
    mine, theirs = folder / POLICY, place / "policy.yaml"
    return mine.is_file() and theirs.is_file() and mine.read_bytes() == theirs.read_bytes()


def _judged(path: Path, role: str, folder: Path, trust: Trust) -> tuple[str, list[str]]:
    """The fingerprint of the key that signed a statement, and everything for which it does not count."""
    name = f"signoffs/{path.name}"
    if missing := [f"{each}: missing" for each in (name, f"{name}.sig") if not (folder / each).is_file()]:
        return "", missing
    try:
        said = statements.read(path, statements.SIGNOFF)
        late = terms.overdue(said)
    except (ValueError, KeyError, TypeError):
        return "", [f"{name}: not a statement in the form that signing writes"]
    reviewer = said["reviewer"]
    key, why = statements.signer(path, role, reviewer, trust)
    if why:
        return "", [f"{name}: {why}"]
    wanted = {"demonstration": reviewer.endswith(DEMONSTRATION), "role": role, "run": folder.resolve().name}
    problems = [f"{k} is {said.get(k)!r}, not {want!r}" for k, want in wanted.items() if said.get(k) != want]
    if said.get("decision") not in DECISIONS[:2]:
        problems.append(f"{reviewer} decided: {said.get('decision')}")
    problems += late
    if said["signed"] != runs.digest(folder / SUMS):
        problems.append(f"signed a different manifest, another {SUMS} than this")
    if key in trust.authors:
        problems.append(f"signed with an author's key, {key}; whoever makes a run does not approve it")
    return key, [f"{name}: {problem}" for problem in problems]


def _against_signatures(folder: Path, trust: Trust) -> tuple[list[str], list[Path]]:
    """What is wrong with the sign-offs, and those that count."""
    names = sorted(path.name for path in (folder / "signoffs").glob("*"))
    problems = [f"signoffs/{n}: not a sign-off of {', '.join(ROLES)}" for n in names if not _SLOT.fullmatch(n)]
    used, counted = set[str](), list[Path]()
    for role in ROLES:
        mine = [found for n in names if (found := _SLOT.fullmatch(n)) and found[1] == role]
        approvals = 0
        for name in dict.fromkeys(found[0].removesuffix(".sig") for found in mine):
            key, wrong = _judged(folder / "signoffs" / name, role, folder, trust)
            if key in used:
                wrong.append(f"signoffs/{name}: signed with a key that has signed before, {key}")
            used |= {key} - {""}
            approvals += not wrong
            counted += [folder / "signoffs" / name] * (not wrong)
            problems += wrong
        if approvals < trust.quorum[role]:
            problems.append(f"signoffs/{role}.json: {approvals} of {trust.quorum[role]} approvals by {role}")
    return problems, counted


def verify(folder: Path, trusted: Path) -> list[str]:
    """Every problem as `file: reason`; empty when tree, manifest, log with its git tags, policy and the approval of
    every role hold.

    `trusted`: a folder outside the run with `allowed_signers` (each line binds a key to roles by `namespaces=`),
    `policy.yaml` and `revoked_keys`; an archive can not bring its own judges.
    """
    trust, folder = Trust.read(trusted), folder.resolve()
    if not trust.quorum:
        return list(trust.problems)
    problems = [*trust.problems, *differences(folder), *runlog.problems(folder), *runlog.rewritten(folder, trusted)]
    problems += [_OTHER_POLICY] * (not _under(folder, trusted))
    told = (folder / terms.CONDITIONS).read_text(errors="replace") if (folder / terms.CONDITIONS).is_file() else ""
    late = [day for day in re.findall(r'^  "open_until": "([0-9-]{10})",?$', told, re.MULTILINE) if day < terms.today()]
    problems += [f"{terms.CONDITIONS}: a condition that was due {day} is open" for day in late]
    if (folder / SUMS).is_file():
        problems += _against_signatures(folder, trust)[0]
    return problems


def signers(folder: Path, trusted: Path) -> list[dict[str, Any]]:
    """Whose sign-off counts for the manifest that lies there: role, reviewer, decision, when, and the key's digest."""
    trust, folder = Trust.read(trusted), folder.resolve()
    if not trust.quorum or not (folder / SUMS).is_file():
        return []
    said = [(path, statements.read(path, statements.SIGNOFF)) for path in _against_signatures(folder, trust)[1]]
    return [
        {name: each[name] for name in ("role", "reviewer", "decision", "at", "demonstration")}
        | {"key": statements.signer(path, each["role"], each["reviewer"], trust)[0]}
        for path, each in said
    ]


def demonstration_keys(folder: Path) -> Path:
    """Throw-away keys, one per role and one of an author, with their policy, beside the archive in
    `.demonstration/<run>/`; returns that folder."""
    place = folder.parent / ".demonstration" / folder.name
    if not all((place / name).exists() for name in statements.TRUSTED):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True, mode=0o700)
        for name in (*ROLES, "author"):
            keygen("-q", "-t", "ed25519", "-N", "", "-C", "", "-f", place / name).check_returncode()
        public = {name: (place / f"{name}.pub").read_text().strip() for name in (*ROLES, "author")}
        lines = [f'{role}{DEMONSTRATION} namespaces="stackpkg-readiness-{role}" {public[role]}\n' for role in ROLES]
        quorum = "".join(f"  {role}: 1\n" for role in ROLES)
        runs.write_text(place / "revoked_keys", f"# {LOUD}\n")
        runs.write_text(place / "policy.yaml", f"# {LOUD}\nquorum:\n{quorum}authors:\n- {public['author']}\n")
        runs.write_text(place / "allowed_signers", "".join([f"# {LOUD}\n", *lines]))
    return place


def trust_for(folder: Path) -> tuple[Path, bool]:
    """The folder to verify a run with, and whether its sign-offs, or its seal, are only demonstrations."""
    texts = [path.read_text(errors="replace") for path in (folder / "signoffs").glob("*.json")]
    sealed = folder / POLICY
    if texts:
        demonstration = all('"demonstration": true' in text for text in texts)
    else:
        demonstration = sealed.is_file() and LOUD in sealed.read_text(errors="replace")
    place = folder.parent / ".demonstration" / folder.name
    return (place, True) if demonstration else (runs.root() / "governance", False)


def prepare(folder: Path, place: Path, demonstration: bool) -> None:
    """Put into a run, before its seal, the policy of `place` and the conditions that it is under."""
    if not (place / "policy.yaml").is_file():
        raise ValueError(f"{place} has no policy.yaml: governance/README.md tells what it says")
    runs.write_text(folder / POLICY, (place / "policy.yaml").read_text(encoding="utf-8"))
    terms.write(folder, Trust.read(place), demonstration)


def finish(folder: runs.RunFolder, p: params.Params) -> dict[str, Any]:
    """Seal a finished run; where the profile asks for it sign with demonstration keys, never over a real sign-off.

    A seal that holds stays as it is. Raises `ValueError` for what can't be sealed.
    """
    signed = any((folder.path / "signoffs").glob("*"))
    demonstration = p.governance.demonstration_keys and (not signed or trust_for(folder.path)[1])
    place = demonstration_keys(folder.path) if demonstration else runs.root() / "governance"
    if not _under(folder.path, place) or differences(folder.path):
        prepare(folder.path, place, demonstration)
    digest = seal(folder.path)
    problems = verify(folder.path, place)
    if problems and demonstration:
        for role in ROLES:
            sign(folder.path, role, place / role, role + DEMONSTRATION)
        problems = verify(folder.path, place)
    notice = LOUD if demonstration else ""
    return {"manifest_sha256": digest, "demonstration": demonstration, "notice": notice, "problems": problems}
