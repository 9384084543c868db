"""Weights signed by the OpenSSF's model-signing, with a key of one's own and no network, for whoever downloads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stackpkg import runs
from stackpkg.training import promotion


def _library() -> Any:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise ValueError(f"model-signing can't be loaded ({error}); pip install 'stackpkg[signing]'") from None
    return hashing.Config().use_file_serialization(hashing_algorithm="sha256", allow_symlinks=False), signing, verifying


def _promoted(folder: runs.RunFolder) -> tuple[Path, Path]:
    """The current version's folder, and its signature, beside the run: in it, it would break the seal."""
    artifacts = folder.path / "artifacts"
    version = promotion.registry(artifacts)["current"]
    if version is None:
        raise ValueError(f"nothing of outbox/{folder.name} is promoted; its notebook 32 tells what the gate missed")
    return artifacts / version, folder.path.with_name(f"{folder.name}-{version}.sig")


def sign(folder: runs.RunFolder, key: Path) -> Path:
    """Sign every file of the promoted version with a private key (PEM, elliptic curve P-256, P-384 or P-521).

    Writes a Sigstore bundle, which `model_signing verify key` of the library reads too. Raises `ValueError` without the
    library, a promoted version or a usable key.
    """
    (version, target), (hashing, signing, _) = _promoted(folder), _library()
    signer = signing.Config().set_hashing_config(hashing)
    with runs.replacing(target) as temporary:
        try:
            signer.use_elliptic_key_signer(private_key=key).sign(version, temporary)
        except (OSError, ValueError, TypeError) as error:  # TypeError: the key has a password
            raise ValueError(f"{key} can't sign: {error}; make one: openssl ecparam -name prime256v1 -genkey") from None
    return target


def verify(folder: runs.RunFolder, key: Path) -> Path:
    """Prove that the promoted version is what was signed with the private half of a public key (PEM).

    Returns the version's folder. Raises `ValueError` naming what differs.
    """
    (version, signature), (hashing, _, verifying) = _promoted(folder), _library()
    if not signature.is_file():
        raise ValueError(f"{signature.name} is missing: sign the weights first")
    verifier = verifying.Config().set_hashing_config(hashing)
    try:
        verifier.use_elliptic_key_verifier(public_key=key).verify(version, signature)
    except Exception as error:  # the library raises what its many parts raise
        raise ValueError(f"{version.name} is not what was signed: {type(error).__name__} {error}".rstrip()) from None
    return version
