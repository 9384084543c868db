"""Weights signed with a key of one's own by model-signing; every change of a file is found and named."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from stackpkg import runs
from stackpkg.governance import weights
from stackpkg.training import promotion

needs_library = pytest.mark.skipif(
    not importlib.util.find_spec("model_signing"), reason="the extra `signing` is missing"
)


def keys(place: Path) -> tuple[Path, Path]:
    """A private and a public key, PEM."""
    place.mkdir(parents=True)
    made = ec.generate_private_key(ec.SECP256R1())
    plain = serialization.NoEncryption()
    private = made.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public = made.public_key().public_bytes(serialization.Encoding.PEM, form)
    (place / "key.pem").write_bytes(private)
    (place / "public.pem").write_bytes(public)
    return place / "key.pem", place / "public.pem"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> runs.RunFolder:
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    folder = runs.RunFolder("demo")
    for name in ("model.safetensors", "config.json", "tokenizer/vocab.json"):
        runs.write_text(folder / f"artifacts/v1.0.0/{name}", name)
    runs.write_json(folder / "artifacts/registry.json", {"current": "v1.0.0", "history": []})
    assert promotion.registry(folder.path / "artifacts")["current"] == "v1.0.0"
    return folder


@needs_library
def test_signed_weights_verify_and_every_change_is_named(run: runs.RunFolder, tmp_path: Path) -> None:
    private, public = keys(tmp_path / "keys")
    before = runs.digest(run.path)
    signature = weights.sign(run, private)
    assert signature.name == "demo-v1.0.0.sig" and runs.digest(run.path) == before, "the seal of the run stays"
    version = weights.verify(run, public)
    file = version / "model.safetensors"
    for text, told in (("modeL.safetensors", "Hash mismatch for 'model.safetensors'"), ("", "Hash mismatch")):
        file.write_text(text)
        with pytest.raises(ValueError, match=told):
            weights.verify(run, public)
    file.rename(version / "moved")
    with pytest.raises(ValueError, match=r"Extra files.*moved.*Missing files.*model\.safetensors"):
        weights.verify(run, public)
    (version / "moved").rename(file)
    file.write_text("model.safetensors")
    weights.verify(run, public)
    (version / "link").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="is not what was signed"):
        weights.verify(run, public)


@needs_library
def test_another_key_and_a_changed_signature_are_refused(run: runs.RunFolder, tmp_path: Path) -> None:
    private, public = keys(tmp_path / "keys")
    signature = weights.sign(run, private)
    with pytest.raises(ValueError, match="is not what was signed"):
        weights.verify(run, keys(tmp_path / "others")[1])
    text = signature.read_text()
    signature.write_text(text.replace('"payload"', '"payloaf"'))
    with pytest.raises(ValueError, match="is not what was signed"):
        weights.verify(run, public)
    signature.unlink()
    with pytest.raises(ValueError, match="sign the weights first"):
        weights.verify(run, public)
    (tmp_path / "no.pem").write_text("no key")
    with pytest.raises(ValueError, match=r"can't sign.*openssl ecparam"):
        weights.sign(run, tmp_path / "no.pem")
    assert not signature.exists()


@needs_library
def test_the_library_s_own_command_reads_the_signature(run: runs.RunFolder, tmp_path: Path) -> None:
    private, public = keys(tmp_path / "keys")
    signature = weights.sign(run, private)
    command = [sys.executable, "-m", "model_signing", "verify", "key", "--signature", signature]
    done = subprocess.run(
        [*command, "--public_key", public, run.path / "artifacts/v1.0.0"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_missing_is_said(run: runs.RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(ValueError, match=r"pip install 'stackpkg\[signing\]'"):
        weights.sign(run, tmp_path / "key.pem")
    (run / "artifacts/registry.json").unlink()
    with pytest.raises(ValueError, match="nothing of outbox/demo is promoted"):
        weights.sign(run, tmp_path / "key.pem")
