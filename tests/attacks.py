"""Attacks on a sealed and signed run, and what both verifiers say of each.

python tests/attacks.py     # does every one, writes governance/attacks.json, which notebook 90 shows
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest import mock

from stackpkg import runs
from stackpkg.governance import runlog, seal, statements, terms

ROOT = Path(__file__).parents[1]
SCRIPT, TABLE = ROOT / "governance/verify.sh", ROOT / "governance/attacks.json"
VERIFIERS = (
    "governance/verify.sh",
    *(f"stackpkg/governance/{name}.py" for name in ("runlog", "seal", "statements", "terms", "tree")),
)
TOOLS = (  # coreutils, then findutils, grep, sed, diffutils and OpenSSH
    *("base64", "basename", "cat", "comm", "cut", "date", "expr", "head", "mktemp", "realpath", "rm", "sha256sum"),
    *("sort", "tail", "touch", "tr", "wc", "find", "grep", "sed", "cmp", "ssh-keygen"),
)
EVIDENCE, SAFETY = "evidence/40_evaluate.json", "signoffs/safety.json"
Attack = Callable[[Path, Path], object]  # the run's folder, and the folder of keys to verify with
ATTACKS: dict[str, tuple[Attack, str, str]] = {}  # what is done: how, the file named, the cause told


def make(place: Path, name: str = "demo", text: str = "0.25") -> Path:
    """A small run, sealed, and signed by three roles with demonstration keys."""
    folder = place / name
    for path, content in {
        EVIDENCE: f'{{"precision_at_k": {text}}}\n',
        "config/params.yaml": "seed: 17\n",
        "eval/epoch 1.json": "{}\n",
        "telemetry/train.parquet": "PAR1",
        ".hidden": "also sealed\n",
    }.items():
        runs.write_text(folder / path, content)
    sign_all(folder)
    return folder


def sign_all(folder: Path, **said: object) -> None:
    keys = seal.demonstration_keys(folder)
    seal.prepare(folder, keys, True)
    seal.seal(folder)
    for role in seal.ROLES:
        seal.sign(folder, role, keys / role, role + seal.DEMONSTRATION, **said)


@cache
def tools(*more: str) -> tempfile.TemporaryDirectory[str]:
    """A folder with links to the tools that the script says it needs, and nothing else but `more`."""
    place = tempfile.TemporaryDirectory()
    for name in (*TOOLS, *more):
        (Path(place.name) / name).symlink_to(shutil.which(name) or f"{name} is not installed")
    return place


def script(folder: Path, trust: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The script, where there are only the tools that it says it needs, and `more`."""
    command, env = [shutil.which("sh"), SCRIPT, folder, trust], {"PATH": tools(*more).name}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, errors="replace")


def verdicts(folder: Path, trust: Path) -> tuple[list[str], list[str]]:
    """What the package and what the script complains of."""
    ours = seal.verify(folder, trust)
    done = script(folder, trust, "git")
    *theirs, last = done.stdout.strip("\n").split("\n")
    assert (done.returncode == 1) == last.startswith("NOT VERIFIED") == bool(theirs), (done.stdout, done.stderr)
    return ours, theirs


def attack(what: str, file: str, cause: str) -> Callable[[Attack], Attack]:
    def enter(how: Attack) -> Attack:
        ATTACKS[what] = how, file, cause
        return how

    return enter


# --- the tree


@attack("edit a number of the evidence", EVIDENCE, "changed since the seal")
def _(run: Path, trust: Path) -> None:
    (run / EVIDENCE).write_text('{"precision_at_k": 0.95}\n')


@attack("add a file", "nb/added.ipynb", "added since the seal")
def _(run: Path, trust: Path) -> None:
    runs.write_text(run / "nb/added.ipynb", "{}")


@attack("remove a file", EVIDENCE, "missing, or renamed")
def _(run: Path, trust: Path) -> None:
    (run / EVIDENCE).unlink()


@attack("rename a file", "shown", "added since the seal")
def _(run: Path, trust: Path) -> None:
    (run / ".hidden").rename(run / "shown")


@attack("swap the contents of two files", ".hidden", "changed since the seal")
def _(run: Path, trust: Path) -> None:
    one, two = run / "config/params.yaml", run / ".hidden"
    first, second = one.read_text(), two.read_text()
    one.write_text(second)
    two.write_text(first)


@attack("put a link that leads out of the archive in a file's place", EVIDENCE, "a link or special file")
def _(run: Path, trust: Path) -> None:
    away = runs.write_text(run.parent / "elsewhere.json", (run / EVIDENCE).read_text())
    (run / EVIDENCE).unlink()
    (run / EVIDENCE).symlink_to(away)


@attack("list a path out of the archive in the manifest", "../../etc/passwd", "a path out of the archive")
def _(run: Path, trust: Path) -> None:
    line = f"{runs.digest(Path('/etc/passwd'))}  ../../etc/passwd\n"
    (run / "SHA256SUMS").write_text(line + (run / "SHA256SUMS").read_text())


@attack("give a file a look-alike name (Cyrillic e)", "", "outside printable ASCII can pass for another")
def _(run: Path, trust: Path) -> None:
    (run / "config").rename(run / "config".replace("o", "\N{CYRILLIC SMALL LETTER O}"))


@attack("reorder the manifest", "SHA256SUMS", "reordered")
def _(run: Path, trust: Path) -> None:
    lines = (run / "SHA256SUMS").read_text().splitlines(keepends=True)
    (run / "SHA256SUMS").write_text("".join(reversed(lines)))


# --- the seal and the log


@attack("edit a number and seal the run anew", SAFETY, "signed a different manifest")
def _(run: Path, trust: Path) -> None:
    (run / EVIDENCE).write_text('{"precision_at_k": 0.95}\n')
    seal.seal(run)


@attack("edit a number and its line in the manifest by hand", "LOG.jsonl", "the last seal entered for demo is another")
def _(run: Path, trust: Path) -> None:
    before = runs.digest(run / EVIDENCE)
    (run / EVIDENCE).write_text('{"precision_at_k": 0.95}\n')
    text = (run / "SHA256SUMS").read_text()
    (run / "SHA256SUMS").write_text(text.replace(before, runs.digest(run / EVIDENCE)))


@attack("bring back an earlier seal with its signatures", "LOG.jsonl", "the last seal entered for demo is another")
def _(run: Path, trust: Path) -> None:
    shutil.copytree(run, run.parent / "earlier")
    runs.write_text(run / EVIDENCE, "{}")
    seal.seal(run)
    shutil.rmtree(run)
    (run.parent / "earlier").rename(run)


@attack("take a line out of the log", "LOG.jsonl", "line 2 breaks the chain")
def _(run: Path, trust: Path) -> None:
    log = run.parent / "LOG.jsonl"
    first, _, *rest = log.read_text().splitlines(keepends=True)
    log.write_text("".join([first, *rest]))


@attack("change a line of the log", "LOG.jsonl", "breaks the chain")
def _(run: Path, trust: Path) -> None:
    log = run.parent / "LOG.jsonl"
    log.write_text(log.read_text().replace('"at": "20', '"at": "19', 1))


@attack("write the log anew, which git's tags tell", "LOG.jsonl", "the line that git's tag signoff/demo/safety-")
def _(run: Path, trust: Path) -> None:
    git = ["git", "-C", run.parent, "-c", "user.name=x", "-c", "user.email=x@y"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "--no-gpg-sign", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    with mock.patch.object(runs, "root", lambda: run.parent):
        assert runlog.tag(run, "safety", "safety@demonstration.invalid").startswith("tagged ")
    (run / EVIDENCE).write_text('{"precision_at_k": 0.95}\n')
    (run.parent / "LOG.jsonl").unlink()
    sign_all(run)


@attack("bring along a policy that asks for less", "approval/policy.yaml", "not the policy to verify with")
def _(run: Path, trust: Path) -> None:
    path = run / "approval/policy.yaml"
    path.write_text(path.read_text().replace("authors:\n- ", "authors:\n# - "))
    seal.seal(run)


# --- signatures


def _key(place: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place], check=True)
    return place


@attack("sign for a role with the key of another", SAFETY, "is not safety@demonstration.invalid's for the role safety")
def _(run: Path, trust: Path) -> None:
    seal.sign(run, "safety", trust / "architecture", "safety@demonstration.invalid")


@attack("pass the statement of one role off as another's", SAFETY, "no whole signature of it for the role safety")
def _(run: Path, trust: Path) -> None:
    for end in ("", ".sig"):
        shutil.copy(run / f"signoffs/architecture.json{end}", run / f"{SAFETY}{end}")


@attack("sign with a key that nobody knows", SAFETY, "is not safety@demonstration.invalid's for the role safety")
def _(run: Path, trust: Path) -> None:
    seal.sign(run, "safety", _key(run.parent / "unknown"), "safety@demonstration.invalid")


@attack("sign with a revoked key", SAFETY, "is revoked")
def _(run: Path, trust: Path) -> None:
    runs.write_text(trust / "revoked_keys", (trust / "safety.pub").read_text())


@attack("sign with a key revoked by a list of ssh-keygen -k", SAFETY, "is revoked")
def _(run: Path, trust: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-k", "-f", trust / "revoked_keys", trust / "safety.pub"], check=True)


def _limited(trust: Path, option: str) -> None:
    path = trust / "allowed_signers"
    path.write_text(path.read_text().replace('readiness-safety"', f'readiness-safety",{option}'))


@attack("sign with a key that has expired", SAFETY, "has expired")
def _(run: Path, trust: Path) -> None:
    _limited(trust, 'valid-before="20200101"')


@attack("sign with a key that is not valid yet", SAFETY, "is not valid yet")
def _(run: Path, trust: Path) -> None:
    _limited(trust, 'valid-after="20990101"')


@attack("replay a signature of another run", SAFETY, "run is 'other', not 'demo'|run is other, not demo")
def _(run: Path, trust: Path) -> None:
    shutil.copytree(trust, trust.with_name("other"))
    other = make(run.parent, "other")
    for end in ("", ".sig"):
        shutil.copy(other / f"{SAFETY}{end}", run / f"{SAFETY}{end}")


@attack("cut a signature short", SAFETY, "no whole signature")
def _(run: Path, trust: Path) -> None:
    path = run / f"{SAFETY}.sig"
    path.write_bytes(path.read_bytes()[:-40])


@attack("write a signature in a looser form that ssh-keygen takes", SAFETY, "no whole signature")
def _(run: Path, trust: Path) -> None:
    path = run / f"{SAFETY}.sig"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


@attack("let the author of the run approve it", SAFETY, "signed with an author's key")
def _(run: Path, trust: Path) -> None:
    policy, public = trust / "policy.yaml", " ".join((trust / "safety.pub").read_text().split()[:2])
    policy.write_text(f"{policy.read_text()}- {public}\n")
    sign_all(run)


@attack("let one key approve for two roles", SAFETY, "signed with a key that has signed before")
def _(run: Path, trust: Path) -> None:
    signers = trust / "allowed_signers"
    keys = {role: (trust / f"{role}.pub").read_text().strip() for role in ("safety", "architecture")}
    signers.write_text(signers.read_text().replace(keys["safety"], keys["architecture"]))
    seal.sign(run, "safety", trust / "architecture", "safety@demonstration.invalid")


@attack("ask for two approvals of a role and give one", SAFETY, "1 of 2 approvals")
def _(run: Path, trust: Path) -> None:
    policy = trust / "policy.yaml"
    policy.write_text(policy.read_text().replace("safety: 1", "safety: 2"))
    sign_all(run)


# --- decisions


@attack("count a rejection", SAFETY, "decided: reject")
def _(run: Path, trust: Path) -> None:
    seal.sign(run, "safety", trust / "safety", "safety@demonstration.invalid", "reject")


@attack("remove a rejection and put the approval before it back", SAFETY, "not what was entered in LOG.jsonl")
def _(run: Path, trust: Path) -> None:
    kept = {end: (run / f"{SAFETY}{end}").read_bytes() for end in ("", ".sig")}
    seal.sign(run, "safety", trust / "safety", "safety@demonstration.invalid", "reject")
    for end, content in kept.items():
        (run / f"{SAFETY}{end}").write_bytes(content)


@attack("edit what was decided", SAFETY, "no whole signature")
def _(run: Path, trust: Path) -> None:
    seal.sign(run, "safety", trust / "safety", "safety@demonstration.invalid", "reject")
    (run / SAFETY).write_text((run / SAFETY).read_text().replace('"reject"', '"approve"'))


def _asked(run: Path, trust: Path, asked: dict[str, object]) -> None:
    said = terms.Terms(**asked)
    decision = "approve-with-conditions" if said.conditions else "approve"
    seal.sign(run, "safety", trust / "safety", "safety@demonstration.invalid", decision, said)


@attack("count an approval whose condition is overdue", SAFETY, "was due 2020-01-31")
def _(run: Path, trust: Path) -> None:
    _asked(run, trust, {"conditions": [{"id": "C1", "text": "more data", "due": "2020-01-31"}]})


@attack("count an approval whose waiver has expired", SAFETY, "expired 2020-01-31")
def _(run: Path, trust: Path) -> None:
    _asked(run, trust, {"waivers": [{"item": "V3", "reason": "short run", "expires": "2020-01-31"}]})


@attack("seal anew over an overdue condition", "approval/conditions.json", "was due 2020-01-31 is open")
def _(run: Path, trust: Path) -> None:
    _asked(run, trust, {"conditions": [{"id": "C1", "text": "more data", "due": "2020-01-31"}]})
    runs.write_text(run / EVIDENCE, '{"precision_at_k": 0.3}\n')
    sign_all(run)


@attack(
    "add a sign-off under a look-alike name of a role",
    "signoffs/s\N{CYRILLIC SMALL LETTER A}fety.json",
    "not a sign-off",
)
def _(run: Path, trust: Path) -> None:
    shutil.copy(run / SAFETY, run / "signoffs/s\N{CYRILLIC SMALL LETTER A}fety.json")


@attack("sign in an order of lines that signing does not write", SAFETY, "not a statement in the form")
def _(run: Path, trust: Path) -> None:
    text = (run / SAFETY).read_text().replace('"decision": "approve"', '"decision": "reject",\n  "decision": "approve"')
    statements.write(run / SAFETY, text, trust / "safety", "safety")


def table() -> list[dict[str, list[str] | str]]:
    """Every attack, each on a copy of a sound run, with all that the verifiers complain of."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        make(Path(name) / "sound")
        for number, (what, (how, file, cause)) in enumerate(ATTACKS.items()):
            place = Path(shutil.copytree(Path(name) / "sound", Path(name) / str(number)))
            how(place / "demo", place / ".demonstration/demo")
            ours, theirs = verdicts(place / "demo", place / ".demonstration/demo")
            rows.append({"attack": what, "file": file, "cause": cause, "package": ours, "script": theirs})
    return rows


def shown(row: dict[str, list[str] | str]) -> dict[str, str]:
    """The row of the kept table: of each verifier the complaint that names the cause."""
    file, cause = str(row["file"]), str(row["cause"])
    told = {
        who: next(line for line in row[who] if line.startswith(file) and re.search(cause, line))
        for who in ("package", "script")
    }
    return {"attack": str(row["attack"]), **told}


if __name__ == "__main__":
    found = [shown(row) for row in table()]
    runs.write_json(TABLE, {"verifiers": {name: runs.digest(ROOT / name) for name in VERIFIERS}, "rows": found})
    sys.stdout.write(f"{len(found)} attacks, {TABLE.relative_to(ROOT)}\n")
