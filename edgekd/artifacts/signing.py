"""Signatures of engines and student.onnx with the user's own Ed25519 key, by the `cryptography` package.

A SHA-256 that lies in the file itself finds accidents: whoever changes a file on purpose writes a new one. A signature
tells that a file is what the holder of a private key signed. It is kept beside what it signs: manifest.sig in an
engine's folder, for the manifest and, through its hashes, for every file; student.onnx.sig for student.onnx.
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
    """Sign student.engine/ or student.onnx, which is read and checked first; returns the signature's path.

    key: a PEM file with an Ed25519 private key.

    Raises:
        ArtifactError: no engine or student.onnx, or a damaged one. ConfigError: no such key, or no `cryptography`.
    """
    signed, path = _signed(target)
    atomic_write(path, base64.b64encode(_key(key, private=True).sign(signed)) + b"\n")
    return path


def verify(target: Path, key: Path) -> None:
    """Check student.engine/ or student.onnx, all its files, and its signature.

    key: a PEM file with the Ed25519 public key of who signed it.

    Raises:
        ArtifactError: damaged, not signed, changed since it was signed, or signed with another key.
        ConfigError: no such key, or no `cryptography`.
    """
    public = _key(key, private=False)
    signed, path = _signed(target)
    text = read_bytes(path, what="signature", fix="sign it with edgekd sign")
    try:
        public.verify(base64.b64decode(text.strip(), validate=True), signed)
    except Exception:  # no base64, or cryptography's InvalidSignature
        what = f"{path} is no signature of {target} by this key: it was changed since, or signed with another key"
        raise ArtifactError(what, fix="sign it again if you changed it yourself (edgekd tune does)") from None


def _signed(target: Path) -> tuple[bytes, Path]:
    """The bytes that are signed, once they are known to be whole, and where the signature lies."""
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
        raise ConfigError(f"{path} holds no plain {kind} key ({reason})", fix=f"make a pair of keys: {KEYS}") from None
    if not isinstance(found, ed25519.Ed25519PrivateKey if private else ed25519.Ed25519PublicKey):
        raise ConfigError(f"{path} is no Ed25519 key", fix=f"make a pair of keys: {KEYS}")
    return found
