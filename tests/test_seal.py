"""Every attack on a sealed run must be found, by the package and by the shell script, and name the same files."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from attacks import ATTACKS, ROOT, SAFETY, SCRIPT, TABLE, VERIFIERS, make, script, sign_all, verdicts

from stackpkg import params, runs
from stackpkg.governance import seal, statements

pytestmark = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="ssh-keygen is not installed")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("outbox"))


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / original.name


def keys(folder: Path) -> Path:
    return seal.demonstration_keys(folder)


def named(folder: Path, trust: Path | None = None) -> set[str]:
    """Files that verification complains about; the package and the script must name the same ones."""
    ours, theirs = ({line.split(": ")[0] for line in lines} for lines in verdicts(folder, trust or keys(folder)))
    assert ours == theirs
    return ours


@pytest.mark.parametrize("what", ATTACKS)
def test_an_attack_is_refused_by_both_verifiers_with_its_cause(run: Path, what: str) -> None:
    how, file, cause = ATTACKS[what]
    how(run, keys(run))
    ours, theirs = verdicts(run, keys(run))
    for told in (ours, theirs):
        assert any(line.startswith(file) and re.search(cause, line) for line in told), told
    assert {line.split(": ")[0] for line in ours} == {line.split(": ")[0] for line in theirs}


def test_the_table_of_attacks_that_the_notebook_shows_is_of_these_attacks() -> None:
    """Made anew by `python tests/attacks.py`."""
    rows, made_with = (runs.read_json(TABLE)[key] for key in ("rows", "verifiers"))
    assert made_with == {name: runs.digest(ROOT / name) for name in VERIFIERS}, "run python tests/attacks.py"
    assert [row["attack"] for row in rows] == list(ATTACKS)
    for row in rows:
        _, file, cause = ATTACKS[row["attack"]]
        for told in (row["package"], row["script"]):
            assert told.startswith(file) and re.search(cause, told)


def test_an_untouched_run_verifies_and_says_that_its_keys_are_demonstrations(run: Path) -> None:
    assert named(run) == set()
    done = subprocess.run(["sh", SCRIPT, run, keys(run)], capture_output=True, text=True, check=True, cwd=run.parent)
    assert seal.LOUD in done.stderr
    assert seal.trust_for(run) == (keys(run), True)


def test_the_script_needs_no_git_and_says_that_it_did_not_look_at_tags(run: Path) -> None:
    done = script(run, keys(run))
    assert done.returncode == 0 and "git's tags were not looked at" in done.stderr, done.stderr
    assert "not found" not in done.stderr, "a tool that its header does not name"
    ATTACKS["write the log anew, which git's tags tell"][0](run, keys(run))
    assert script(run, keys(run)).returncode == 0, "only git could tell"
    assert "not looked at" not in script(run, keys(run), "git").stderr


def test_tags_are_those_around_the_keys_else_around_the_log(
    run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ATTACKS["write the log anew, which git's tags tell"][0](run, keys(run))
    away = shutil.copytree(keys(run), tmp_path_factory.mktemp("away") / "trust")
    assert named(run, Path(away)) == {"LOG.jsonl"}
    subprocess.run(["git", "init", "-q", away], check=True)
    assert named(run, Path(away)) == set(), "this repository has no tag of the run"


def test_sealing_again_changes_nothing(run: Path) -> None:
    before, log = (run / "SHA256SUMS").stat(), (run.parent / "LOG.jsonl").read_text()
    digest = seal.seal(run)
    assert (run / "SHA256SUMS").stat().st_mtime_ns == before.st_mtime_ns
    assert (run.parent / "LOG.jsonl").read_text() == log
    assert digest == runs.digest(run / "SHA256SUMS")


def test_coreutils_read_the_manifest(run: Path) -> None:
    subprocess.run(["sha256sum", "--quiet", "--strict", "-c", "SHA256SUMS"], cwd=run, check=True)


def test_one_byte_anywhere_is_found_and_its_file_named(run: Path) -> None:
    for path in runs.files_below(run):
        name, content = path.relative_to(run).as_posix(), path.read_bytes()
        for position in {0, len(content) - 1}:
            path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
            found = {line.split(": ")[0] for line in seal.verify(run, keys(run))}
            told = "LOG.jsonl" if name == "SHA256SUMS" else name.removesuffix(".sig")
            assert told in found, (name, position, found)
        assert told in named(run)
        path.write_bytes(content)
    assert named(run) == set()


def test_every_byte_of_a_signature_counts(run: Path) -> None:
    """ssh-keygen itself accepts other line breaks and an older version number; we do not."""
    path = run / f"{SAFETY}.sig"
    content = path.read_bytes()
    for position in range(0, len(content), 29):
        path.write_bytes(content[:position] + bytes([content[position] ^ 3]) + content[position + 1 :])
        assert seal.verify(run, keys(run)), position
    head, body, tail = content.decode().partition("U1NIU0lHAAAAAQ")
    for looser in (head + "U1NIU0lHAAAAAA" + tail, content.decode() + "\n"):
        assert body
        path.write_bytes(looser.encode())
        assert named(run) == {SAFETY}


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (lambda run: runs.write_text(run / "a b: c", "x"), {"a b"}),
        (lambda run: (run / "SHA256SUMS").unlink(), {"SHA256SUMS", "LOG.jsonl"}),
        (lambda run: (run / "SHA256SUMS").write_text(""), None),
        (lambda run: (run / SAFETY).unlink(), {SAFETY}),
        (lambda run: (run / f"{SAFETY}.sig").unlink(), {SAFETY, f"{SAFETY}.sig"}),
        (lambda run: runs.write_text(run / "signoffs/legal.json", "{}"), {"signoffs/legal.json"}),
        (lambda run: (run / SAFETY).write_bytes(b"\xff{"), {SAFETY}),
        (lambda run: (run.parent / "LOG.jsonl").unlink(), {"LOG.jsonl"}),
        (lambda run: (run.parent / "LOG.jsonl").write_text(""), {"LOG.jsonl"}),
        (lambda run: (keys(run) / "policy.yaml").write_text("quorum: {safety: 0}\n"), {"policy.yaml"}),
        (lambda run: (keys(run) / "allowed_signers").write_text("a@b.org ssh-ed25519 AAAA\n"), None),
    ],
)
def test_what_is_not_there_or_not_in_order(run: Path, attack, expected: set[str] | None) -> None:
    attack(run)
    found = named(run)
    assert found == expected if expected else len(found) > 2


@pytest.mark.parametrize("file", statements.TRUSTED)
def test_nothing_is_trusted_without_keys_policy_and_revocations(run: Path, tmp_path: Path, file: str) -> None:
    trust = Path(shutil.copytree(keys(run), tmp_path / "trust"))
    (trust / file).unlink()
    assert named(run, trust) == {file}


def test_a_policy_without_an_author_can_not_tell_authors_from_reviewers(run: Path, tmp_path: Path) -> None:
    trust = Path(shutil.copytree(keys(run), tmp_path / "trust"))
    text = (trust / "policy.yaml").read_text().split("- ssh")[0]
    for authors in ("", "- ssh-ed25519 AAAAnokey\n"):
        (trust / "policy.yaml").write_text(text + authors)
        shutil.copy(trust / "policy.yaml", run / "approval/policy.yaml")
        assert "policy.yaml" in named(run, trust)


def test_the_policy_is_plain_yaml_and_says_what_is_read(run: Path) -> None:
    policy = keys(run) / "policy.yaml"
    said, trust = yaml.safe_load(policy.read_text()), statements.Trust.read(keys(run))
    assert said["quorum"] == trust.quorum == dict.fromkeys(seal.ROLES, 1)
    assert len(said["authors"]) == len(trust.authors) == 1
    shipped = yaml.safe_load((ROOT / "governance/policy.yaml").read_text())
    assert shipped == {"quorum": dict.fromkeys(seal.ROLES, 1), "authors": None}
    assert statements.Trust.read(ROOT / "governance").problems == (
        "policy.yaml: names no author's key, or one that ssh-keygen can't read",
    )


def test_a_second_reviewer_fills_a_quorum_of_two(run: Path) -> None:
    place, policy = keys(run), keys(run) / "policy.yaml"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / "second"], check=True)
    line = f'second@demonstration.invalid namespaces="stackpkg-readiness-safety" {(place / "second.pub").read_text()}'
    (place / "allowed_signers").write_text((place / "allowed_signers").read_text() + line)
    policy.write_text(policy.read_text().replace("safety: 1", "safety: 2"))
    sign_all(run)
    assert named(run) == {SAFETY}
    written = seal.sign(run, "safety", place / "second", "second@demonstration.invalid")
    assert written.name == "safety-2.json" and named(run) == set()
    assert seal.sign(run, "safety", place / "second", "second@demonstration.invalid") == written
    seal.sign(run, "safety", place / "second", "second@demonstration.invalid", "reject")
    assert named(run) == {SAFETY, "signoffs/safety-2.json"}


@pytest.mark.parametrize("target", ["/etc/hostname", "config", "eval/epoch 1.json", "nowhere"])
def test_links_are_refused(run: Path, target: str) -> None:
    (run / "link").symlink_to(target)
    assert named(run) == {"link"}
    with pytest.raises(ValueError, match="link: a link or special file"):
        seal.seal(run)


@pytest.mark.parametrize("name", ["two\nlines", "back\\slash", "bell\a", "\u0435vidence"])
def test_names_that_can_deceive_are_refused(run: Path, name: str) -> None:
    (run / name).write_text("x")
    with pytest.raises(ValueError, match="rename it"):
        seal.seal(run)
    assert all(verdicts(run, keys(run)))


def test_a_statement_signed_for_another_role_inside(run: Path) -> None:
    """A reviewer of safety signs, in the namespace of safety, a statement that says architecture."""
    text = (run / SAFETY).read_text().replace('"role": "safety"', '"role": "architecture"')
    statements.write(run / SAFETY, text, keys(run) / "safety", "safety")
    assert named(run) == {SAFETY}


def test_a_demonstration_can_not_pass_as_an_approval(run: Path, tmp_path: Path) -> None:
    assert {line.split(": ")[0] for line in seal.verify(run, ROOT / "governance")} == {
        "policy.yaml", "approval/policy.yaml", *(f"signoffs/{role}.json" for role in seal.ROLES)
    }  # fmt: skip
    real = Path(shutil.copytree(keys(run), tmp_path / "real"))
    text = (real / "allowed_signers").read_text().replace("@demonstration.invalid", "@example.org")
    (real / "allowed_signers").write_text(text)
    assert named(run, real) == {f"signoffs/{role}.json" for role in seal.ROLES}


def real_trust(run: Path, root: Path) -> Path:
    """Keys of reviewers and a policy in `root`/governance, whose private halves are those of the demonstration."""
    place, trust = keys(run), root / "governance"
    text = (place / "allowed_signers").read_text()
    runs.write_text(trust / "allowed_signers", text.replace("@demonstration.invalid", "@example.org"))
    runs.write_text(trust / "policy.yaml", (place / "policy.yaml").read_text().replace(seal.LOUD, "ours"))
    runs.write_text(trust / "revoked_keys", "# none\n")
    return trust


def test_reviewers_sign_a_run_that_was_sealed_under_their_policy(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    trust = real_trust(run, tmp_path)
    with pytest.raises(ValueError, match=r"demonstration_keys.*\n.*not the policy to verify with"):
        seal.sign(run, "safety", keys(run) / "safety", "safety@example.org")
    seal.prepare(run, trust, False)
    seal.seal(run)
    for role in seal.ROLES:
        assert seal.sign(run, role, keys(run) / role, f"{role}@example.org").name == f"{role}.json"
    assert named(run, trust) == set() and seal.trust_for(run) == (trust, False)
    assert json.loads((run / SAFETY).read_text())["predicate"]["demonstration"] is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"role": "safty"},
            "unknown role 'safty'; did you mean 'safety'\\? allowed: architecture, infrastructure, safety",
        ),
        ({"reviewer": "nobody"}, "name@domain"),
        ({"reviewer": 'x@y"\n'}, "name@domain"),
        ({"decision": "approved"}, "unknown decision 'approved'; did you mean 'approve'\\?"),
        ({"decision": "approve-with-conditions"}, "with 0 condition"),
        ({"key": Path("missing")}, "could not sign"),
    ],
)
def test_signing_refuses(run: Path, change: dict[str, object], message: str) -> None:
    given = {"role": "safety", "key": keys(run) / "safety", "reviewer": "safety@demonstration.invalid"} | change
    with pytest.raises(ValueError, match=message):
        seal.sign(run, **given)


def test_signing_refuses_a_tree_that_changed_since_the_seal(run: Path) -> None:
    runs.write_text(run / "late.txt", "late")
    with pytest.raises(ValueError, match=r"late\.txt: added"):
        seal.sign(run, "safety", keys(run) / "safety", "safety@demonstration.invalid")


def test_private_keys_stay_outside_the_archive_and_private(run: Path) -> None:
    assert not keys(run).is_relative_to(run)
    assert {(keys(run) / role).stat().st_mode & 0o077 for role in seal.ROLES} == {0}


def test_signature_layout_is_the_one_we_insist_on(run: Path) -> None:
    text = (run / f"{SAFETY}.sig").read_text()
    blob = base64.b64decode("".join(text.splitlines()[1:-1]))
    assert blob.startswith(b"SSHSIG\x00\x00\x00\x01")
    assert b"stackpkg-readiness-safety" in blob


def test_finish_seals_signs_once_and_again_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    folder = runs.RunFolder("drill")
    runs.write_text(folder / "evidence/10.json", "{}")
    p = params.validate({"run": "drill", "governance": {"demonstration_keys": True}})
    first = seal.finish(folder, p)
    assert first["problems"] == [] and first["notice"] == seal.LOUD
    signed = (folder / "signoffs/safety.json.sig").stat().st_mtime_ns
    assert seal.finish(folder, p) == first
    assert (folder / "signoffs/safety.json.sig").stat().st_mtime_ns == signed
    runs.write_text(folder / "evidence/10.json", '{"documents": 1}')
    second = seal.finish(folder, p)
    assert second["problems"] == [] and second["manifest_sha256"] != first["manifest_sha256"]
    shutil.rmtree(tmp_path / "outbox/.demonstration")
    assert seal.finish(folder, p)["problems"] == []


def test_finish_never_replaces_a_real_sign_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    folder = runs.RunFolder("real")
    runs.write_text(folder / "evidence/10.json", "{}")
    trust = real_trust(folder.path, tmp_path)
    seal.prepare(folder.path, trust, False)
    seal.seal(folder.path)
    for role in seal.ROLES:
        seal.sign(folder.path, role, keys(folder.path) / role, f"{role}@example.org")
    p = params.validate({"run": "real", "governance": {"demonstration_keys": True}})
    assert seal.finish(folder, p) | {"manifest_sha256": ""} == {
        "manifest_sha256": "",
        "demonstration": False,
        "notice": "",
        "problems": [],
    }
    runs.write_text(folder / "evidence/10.json", "[]")
    kept = (folder / "signoffs/safety.json").read_text()
    assert len(seal.finish(folder, p)["problems"]) == 6, "a file and a quorum for each role"
    assert (folder / "signoffs/safety.json").read_text() == kept


def test_finish_without_demonstration_keys_leaves_the_run_unsigned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    folder = runs.RunFolder("plain")
    runs.write_text(folder / "evidence/10.json", "{}")
    with pytest.raises(ValueError, match=r"has no policy\.yaml"):
        seal.finish(folder, params.validate({"run": "plain"}))
    for name in statements.TRUSTED:
        runs.write_text(tmp_path / f"governance/{name}", (ROOT / f"governance/{name}").read_text())
    done = seal.finish(folder, params.validate({"run": "plain"}))
    assert len(done["problems"]) == 4 and not (folder.path / "signoffs").exists()
    assert (folder / "approval/policy.yaml").read_text() == (ROOT / "governance/policy.yaml").read_text()
