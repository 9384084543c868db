"""Every attack on a sealed run must be found, by the package and by the shell script, and name the same files."""

import base64
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from stackpkg import params, runs
from stackpkg.governance import seal

SCRIPT = Path(__file__).parents[1] / "governance" / "verify.sh"
pytestmark = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="ssh-keygen is not installed")


def make_run(place: Path, name: str = "demo", text: str = "0.25") -> Path:
    folder = place / name
    for path, content in {
        "config/parameters.yaml": "seed: 17\n",
        "eval/epoch 1.json": f'{{"precision_at_k": {text}}}\n',
        "telemetry/train.parquet": "PAR1",
        ".hidden": "also sealed\n",
    }.items():
        runs.write_text(folder / path, content)
    sign_all(folder)
    return folder


def sign_all(folder: Path, reviewer: str = "{}@demonstration.invalid", **said: object) -> None:
    seal.seal(folder)
    keys = seal.demonstration_keys(folder)
    for role in seal.ROLES:
        seal.sign(folder, role, keys / role, reviewer.format(role), **said)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("outbox"))


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    for name in (original.name, ".demonstration"):
        shutil.copytree(original.parent / name, tmp_path / name)
    return tmp_path / original.name


def named(folder: Path, signers: Path | None = None) -> set[str]:
    """Files that verification complains about; the package and the script must name the same ones."""
    signers = signers or seal.demonstration_keys(folder) / "allowed_signers"
    ours = {problem.split(": ")[0] for problem in seal.verify(folder, signers)}
    done = subprocess.run(["sh", SCRIPT, folder, signers], capture_output=True, text=True, check=False)
    lines = done.stdout.strip("\n").split("\n")
    theirs = {line.split(": ")[0] for line in lines if not line.startswith(("VERIFIED", "NOT VERIFIED"))}
    assert ours == theirs, (ours, done.stdout, done.stderr)
    assert (done.returncode == 0) == (not ours) and lines[-1].startswith("NOT" if ours else "VERIFIED")
    return ours


def test_an_untouched_run_verifies_and_says_that_its_keys_are_demonstrations(run: Path) -> None:
    assert named(run) == set()
    done = subprocess.run(
        ["sh", SCRIPT, run, seal.signers_for(run)[0]], capture_output=True, text=True, check=True, cwd=run.parent
    )
    assert seal.LOUD in done.stderr
    assert seal.signers_for(run)[1]


def test_sealing_again_changes_nothing(run: Path) -> None:
    before = (run / "SHA256SUMS").stat()
    digest = seal.seal(run)
    assert (run / "SHA256SUMS").stat().st_mtime_ns == before.st_mtime_ns
    assert digest == runs.digest(run / "SHA256SUMS")
    assert named(run) == set()


def test_coreutils_read_the_manifest(run: Path) -> None:
    subprocess.run(["sha256sum", "--quiet", "--strict", "-c", "SHA256SUMS"], cwd=run, check=True)


def files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in runs.files_below(folder)]


def test_one_byte_anywhere_is_found_and_its_file_named(run: Path) -> None:
    for name in files(run):
        content = (run / name).read_bytes()
        for position in {0, len(content) // 2, len(content) - 1}:
            (run / name).write_bytes(
                content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :],
            )
            found = named(run)
            assert name.removesuffix(".sig") in found, (name, position, found)
        (run / name).write_bytes(content)
    assert named(run) == set()


def test_every_byte_of_a_signature_counts(run: Path) -> None:
    """ssh-keygen itself accepts other line breaks and an older version number; we do not."""
    path, keys = run / "signoffs/safety.json.sig", seal.demonstration_keys(run) / "allowed_signers"
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 3]) + content[position + 1 :])
        assert seal.verify(run, keys), position
    head, body, tail = content.decode().partition("U1NIU0lHAAAAAQ")
    for looser in (head + "U1NIU0lHAAAAAA" + tail, content.decode().replace("\n", "\r\n"), content.decode() + "\n"):
        assert body
        path.write_bytes(looser.encode())
        assert named(run) == {"signoffs/safety.json"}


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (lambda run: runs.write_text(run / "nb/added.ipynb", "{}"), {"nb/added.ipynb"}),
        (lambda run: runs.write_text(run / "a b: c", "x"), {"a b"}),
        (lambda run: (run / "eval/epoch 1.json").unlink(), {"eval/epoch 1.json"}),
        (lambda run: (run / ".hidden").rename(run / "shown"), {".hidden", "shown"}),
        (lambda run: (run / "SHA256SUMS").unlink(), {"SHA256SUMS"}),
        (lambda run: (run / "SHA256SUMS").write_text(""), None),
        (lambda run: (run / "signoffs/safety.json").unlink(), {"signoffs/safety.json"}),
        (lambda run: (run / "signoffs/safety.json.sig").unlink(), {"signoffs/safety.json.sig"}),
        (lambda run: runs.write_text(run / "signoffs/legal.json", "{}"), {"signoffs/legal.json"}),
        (lambda run: (run / "signoffs/safety.json").write_bytes(b"\xff{"), {"signoffs/safety.json"}),
    ],
)
def test_files_added_removed_renamed(run: Path, attack, expected: set[str] | None) -> None:
    attack(run)
    found = named(run)
    assert found == expected if expected else {"eval/epoch 1.json", "SHA256SUMS"} <= found


def test_swapped_contents(run: Path) -> None:
    one, two = run / "config/parameters.yaml", run / ".hidden"
    one_text, two_text = one.read_text(), two.read_text()
    one.write_text(two_text)
    two.write_text(one_text)
    assert named(run) == {"config/parameters.yaml", ".hidden"}


def test_reordered_manifest(run: Path) -> None:
    lines = (run / "SHA256SUMS").read_text().splitlines(keepends=True)
    (run / "SHA256SUMS").write_text("".join(reversed(lines)))
    assert named(run) == {"SHA256SUMS"}


def test_a_new_seal_voids_the_old_signatures(run: Path) -> None:
    runs.write_text(run / "eval/epoch 1.json", '{"precision_at_k": 0.99}\n')
    seal.seal(run)
    assert named(run) == {"SHA256SUMS"}
    assert sum("signed a different manifest" in problem for problem in seal.verify(run, seal.signers_for(run)[0])) == 3


@pytest.mark.parametrize("target", ["/etc/hostname", "config", "eval/epoch 1.json", "nowhere"])
def test_links_are_refused(run: Path, target: str) -> None:
    (run / "link").symlink_to(target)
    assert named(run) == {"link"}
    with pytest.raises(ValueError, match="link: a link or special file"):
        seal.seal(run)


@pytest.mark.parametrize("name", ["two\nlines", "back\\slash", "bell\a"])
def test_names_coreutils_would_escape_are_refused(run: Path, name: str) -> None:
    (run / name).write_text("x")
    with pytest.raises(ValueError, match="rename it without"):
        seal.seal(run)
    signers = seal.demonstration_keys(run) / "allowed_signers"
    assert seal.verify(run, signers)
    assert subprocess.run(["sh", SCRIPT, run, signers], capture_output=True, check=False).returncode == 1


def test_a_key_signs_for_its_own_role_only(run: Path) -> None:
    keys = seal.demonstration_keys(run)
    seal.sign(run, "safety", keys / "architecture", "architecture@demonstration.invalid")
    assert named(run) == {"signoffs/safety.json"}
    seal.sign(run, "safety", keys / "architecture", "safety@demonstration.invalid")
    assert named(run) == {"signoffs/safety.json"}


def test_a_statement_for_one_role_does_not_serve_another(run: Path) -> None:
    for suffix in (".json", ".json.sig"):
        shutil.copy(run / f"signoffs/architecture{suffix}", run / f"signoffs/safety{suffix}")
    assert named(run) == {"signoffs/safety.json"}


def test_an_unknown_key(run: Path, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "k"], check=True)
    seal.sign(run, "safety", tmp_path / "k", "safety@demonstration.invalid")
    assert named(run) == {"signoffs/safety.json"}


def test_an_edited_statement(run: Path) -> None:
    path = run / "signoffs/safety.json"
    path.write_text(path.read_text().replace('"conditions": []', '"conditions": [\n   "none"\n  ]'))
    assert named(run) == {"signoffs/safety.json"}


def test_a_truncated_signature(run: Path) -> None:
    path = run / "signoffs/safety.json.sig"
    path.write_bytes(path.read_bytes()[:-40])
    assert named(run) == {"signoffs/safety.json"}


def test_a_signature_of_another_run_is_not_replayed(run: Path) -> None:
    other = run.parent / "other"
    shutil.copytree(run, other)
    shutil.copytree(seal.demonstration_keys(run), run.parent / ".demonstration" / "other")
    assert named(other) == {f"signoffs/{role}.json" for role in seal.ROLES}  # same bytes, another run
    runs.write_text(other / "eval/epoch 1.json", "{}")
    sign_all(other)
    assert named(other) == set()
    for suffix in (".json", ".json.sig"):
        shutil.copy(other / f"signoffs/safety{suffix}", run / f"signoffs/safety{suffix}")
    assert named(run) == {"SHA256SUMS", "signoffs/safety.json"}


@pytest.mark.parametrize(
    "said", [{"decision": "reject"}, {"decision": "approve-with-conditions", "conditions": ("fix it",)}]
)
def test_only_an_unconditional_approval_counts(run: Path, said: dict[str, object]) -> None:
    seal.sign(run, "safety", seal.demonstration_keys(run) / "safety", "safety@demonstration.invalid", **said)
    assert named(run) == {"signoffs/safety.json"}


def test_a_statement_signed_for_another_role_inside(run: Path) -> None:
    """A reviewer of safety signs, in the namespace of safety, a statement that says architecture."""
    path, key = run / "signoffs/safety.json", seal.demonstration_keys(run) / "safety"
    text = path.read_text().replace('"role": "safety"', '"role": "architecture"')
    command = ["ssh-keygen", "-Y", "sign", "-f", key, "-n", "stackpkg-readiness-safety"]
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=True)
    path.write_text(text)
    path.with_suffix(".json.sig").write_bytes(done.stdout)
    assert named(run) == {"signoffs/safety.json"}


def test_a_demonstration_can_not_pass_as_an_approval(run: Path, tmp_path: Path) -> None:
    real = tmp_path / "allowed_signers"
    real.write_text("# no reviewer yet\n")
    assert named(run, real) == {f"signoffs/{role}.json" for role in seal.ROLES}
    demonstration = (seal.demonstration_keys(run) / "allowed_signers").read_text()
    real.write_text(demonstration.replace("@demonstration.invalid", "@example.org"))
    assert named(run, real) == {f"signoffs/{role}.json" for role in seal.ROLES}
    sign_all(run, "{}@example.org")
    assert named(run, real) == set()
    assert not seal.signers_for(run)[1]
    path = run / "signoffs/safety.json"
    assert json.loads(path.read_text())["predicate"]["demonstration"] is False


def test_a_signer_without_a_namespace_is_refused(run: Path) -> None:
    signers = seal.demonstration_keys(run) / "allowed_signers"
    signers.write_text(signers.read_text().replace('namespaces="stackpkg-readiness-safety" ', ""))
    assert named(run) == {"allowed_signers"}


def test_missing_signers_is_a_problem_not_a_crash(run: Path) -> None:
    assert seal.verify(run, run / "none") == ["none: missing, so no signature can be checked"]


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
        ({"conditions": ("more data",)}, "'approve' with 1 condition"),
        ({"key": Path("missing")}, "could not sign"),
    ],
)
def test_signing_refuses(run: Path, change: dict[str, object], message: str) -> None:
    given = {"role": "safety", "key": seal.demonstration_keys(run) / "safety", "reviewer": "a@b.org"} | change
    with pytest.raises(ValueError, match=message):
        seal.sign(run, **given)


def test_signing_refuses_a_tree_that_changed_since_the_seal(run: Path) -> None:
    runs.write_text(run / "late.txt", "late")
    with pytest.raises(ValueError, match=r"late\.txt: added"):
        seal.sign(run, "safety", seal.demonstration_keys(run) / "safety", "safety@demonstration.invalid")


def test_private_keys_stay_outside_the_archive_and_private(run: Path) -> None:
    keys = seal.demonstration_keys(run)
    assert not keys.is_relative_to(run)
    assert {(keys / role).stat().st_mode & 0o077 for role in seal.ROLES} == {0}


def test_signature_layout_is_the_one_we_insist_on(run: Path) -> None:
    text = (run / "signoffs/safety.json.sig").read_text()
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
    sign_all(folder.path, "{}@example.org")
    keys = (seal.demonstration_keys(folder.path) / "allowed_signers").read_text()
    runs.write_text(tmp_path / "governance/allowed_signers", keys.replace("@demonstration.invalid", "@example.org"))
    p = params.validate({"run": "real", "governance": {"demonstration_keys": True}})
    assert seal.finish(folder, p) | {"manifest_sha256": ""} == {
        "manifest_sha256": "",
        "demonstration": False,
        "notice": "",
        "problems": [],
    }
    runs.write_text(folder / "evidence/10.json", "[]")
    kept = (folder / "signoffs/safety.json").read_text()
    assert len(seal.finish(folder, p)["problems"]) == 3
    assert (folder / "signoffs/safety.json").read_text() == kept


def test_finish_without_demonstration_keys_leaves_the_run_unsigned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    folder = runs.RunFolder("plain")
    runs.write_text(folder / "evidence/10.json", "{}")
    done = seal.finish(folder, params.validate({"run": "plain"}))
    assert done["problems"] and not (folder.path / "signoffs").exists()
