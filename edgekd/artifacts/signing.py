"""Signatures of engines and student.onnx with the user's own Ed25519 key, by the `cryptography` package.

The SHA-256 inside a file detects accidental changes only: a deliberate change can replace it. A signature proves that a
file is the one that the holder of a private key signed. It is kept beside the signed file: manifest.sig in an engine's
folder covers the manifest and, through its hashes, every file; student.onnx.sig covers student.onnx.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from edgekd.artifacts.manifest import MANIFEST, read_manifest
from edgekd.artifacts.metadata import read_onnx
from edgekd.errors import ArtifactError, ConfigError
from edgekd.files import atomic_write
from edgekd.serialization import read_bytes

KEYS = "openssl genpkey -algorithm ed25519 -out private.pem; openssl pkey -in private.pem -pubout -out public.pem"


def sign(target: Path, key: Path) -> Path:
    """Sign student.engine/ or student.onnx, which is read and checked first.

    Args:
        target: Engine folder or ONNX file.
        key: PEM file with an Ed25519 private key.

    Returns:
        The path of the signature.

    Raises:
        ArtifactError: The target is missing, damaged or something else.
        ConfigError: There is no such key, or `cryptography` is not installed.
    """
    signed, path = _signed(target)
    atomic_write(path, base64.b64encode(_key(key, private=True).sign(signed)) + b"\n")
    return path


def verify(target: Path, key: Path) -> None:
    """Check student.engine/ or student.onnx, all its files, and its signature.

    Args:
        target: Engine folder or ONNX file.
        key: PEM file with the signer's Ed25519 public key.

    Raises:
        ArtifactError: The target is damaged, not signed, changed since it was signed, or signed with another key.
        ConfigError: There is no such key, or `cryptography` is not installed.
    """
    public = _key(key, private=False)
    signed, path = _signed(target)
    text = read_bytes(path, what="signature", fix="sign it with edgekd sign")
    try:
        public.verify(base64.b64decode(text.strip(), validate=True), signed)
    except Exception:  # no base64, or cryptography's InvalidSignature
        what = f"{path} is not a signature of {target} by this key: it was changed since, or signed with another key"
        raise ArtifactError(what, fix="sign it again if you changed it yourself (edgekd tune does)") from None


def _signed(target: Path) -> tuple[bytes, Path]:
    """Check the target; return the bytes to sign and the path of the signature."""
    if not target.is_dir():
        read_onnx(target)
        return read_bytes(target, what="ONNX file"), target.with_name(f"{target.name}.sig")
    read_manifest(target)
    return read_bytes(target / MANIFEST, what="manifest"), target / "manifest.sig"


def _key(path: Path, *, private: bool) -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise ConfigError("signatures need cryptography", fix="pip install 'edgekd[sign]'") from None
    kind = "private" if private else "public"
    data = read_bytes(path, what=f"{kind} key", fix=f"make a pair of keys: {KEYS}")
    try:
        found = serialization.load_pem_private_key(data, None) if private else serialization.load_pem_public_key(data)
    except Exception as error:  # not PEM, encrypted, of an unknown kind
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"{path} does not contain an unencrypted {kind} key ({reason})", fix=f"make a pair of keys: {KEYS}"
        ) from None
    if not isinstance(found, ed25519.Ed25519PrivateKey if private else ed25519.Ed25519PublicKey):
        raise ConfigError(f"{path} is not an Ed25519 key", fix=f"make a pair of keys: {KEYS}")
    return found
