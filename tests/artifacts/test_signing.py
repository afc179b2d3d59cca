"""Signatures: what is signed verifies; whatever changes afterwards, and any other key, does not."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import onnx
import pytest
from typer.testing import CliRunner

from edgekd.artifacts.manifest import read_manifest, write_manifest
from edgekd.artifacts.metadata import put_metadata, read_onnx, read_student
from edgekd.artifacts.recipe import Recipe
from edgekd.artifacts.signing import sign, verify
from edgekd.cli.main import app
from edgekd.compiler.build import compile_engine
from edgekd.errors import ArtifactError, ConfigError

pytest.importorskip("cryptography")


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private and a public key in PEM files."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_an_engine_and_a_student(student_onnx: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    engine, student = tmp_path / "e.engine", tmp_path / "student.onnx"
    shutil.copy(student_onnx, student)
    recipe = Recipe("fp32", batch_sizes=(1,))
    compile_engine(read_student(student), engine, recipe=recipe, backend="onnxruntime", validation=None)
    for target in (engine, student):
        with pytest.raises(ArtifactError, match="no signature at"):
            verify(target, keys[1])
        sign(target, keys[0])
        verify(target, keys[1])
    assert CliRunner().invoke(app, ["verify", str(engine), "--key", str(keys[1])]).exit_code == 0
    manifest = read_manifest(engine)
    write_manifest(engine, dataclasses.replace(manifest, notes=("changed, and its digest made anew",)))
    model, metadata = read_onnx(student)
    put_metadata(model, dataclasses.replace(metadata, classes=metadata.classes[::-1]))
    onnx.save(model, str(student))
    for target in (engine, student):
        with pytest.raises(ArtifactError, match="changed since, or signed with another key"):
            verify(target, keys[1])
    write_manifest(engine, manifest)
    verify(engine, keys[1])
    (engine / "stage_0.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"stage_0\.onnx is missing"):
        verify(engine, keys[1])


def test_other_keys_and_signatures(student_onnx: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key

    student, odd = tmp_path / "student.onnx", tmp_path / "odd.pem"
    shutil.copy(student_onnx, student)
    sign(student, keys[0]).write_bytes(b"c2lnbmVk\n")
    with pytest.raises(ArtifactError, match="not a signature of"):
        verify(student, keys[1])
    rsa = generate_private_key(65537, 2048)
    encrypted = rsa.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"secret"))
    open_ = rsa.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    for content, said in (
        (b"", "unencrypted private"),
        (encrypted, "unencrypted private"),
        (open_, "not an Ed25519 key"),
    ):
        odd.write_bytes(content)
        with pytest.raises(ConfigError, match=said):
            sign(student, odd)
    with pytest.raises(ConfigError, match="unencrypted public"):
        verify(student, keys[0])
