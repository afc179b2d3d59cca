"""student.engine/: its manifest and the checked reading of its files."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekd.artifacts.metadata import ModelMetadata, read_onnx
from edgekd.artifacts.recipe import Recipe
from edgekd.errors import ArtifactError
from edgekd.files import atomic_write, recover, sha256
from edgekd.host import HostInfo
from edgekd.serialization import SCHEMA, read_bytes, read_json, to_json

MANIFEST = "manifest.json"
MAX_MS = 1e12
"""Milliseconds (30 years) that no measured time exceeds."""


@dataclass(frozen=True)
class EngineFile:
    """One file of an engine: which graph it belongs to (`stage_0`, …, `monolithic`, `final`), hash and size."""

    graph: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """manifest.json of student.engine/: what was built, for what, how exact it was at build time.

    stage_ms: batch size (as text) to the measured time of each stage in milliseconds.
    curve: the trade-off curve of `edgekd tune`.
    """

    metadata: ModelMetadata
    backend: str
    backend_version: str
    recipe: Recipe
    precision: dict[str, float]
    host: HostInfo
    files: dict[str, EngineFile]
    source_sha256: str
    calibration: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    stage_ms: dict[str, tuple[float, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    curve: tuple[dict[str, Any], ...] = ()
    tuned: dict[str, Any] = field(default_factory=dict)
    edgekd: str = ""
    digest: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        for size, times in self.stage_ms.items():
            if not (size.isascii() and size.isdecimal() and int(size) > 0 and size == str(int(size))):
                raise ValueError(f"stage_ms: {size} is no batch size")
            if len(times) != len(self.metadata.exits) or not all(0 <= t <= MAX_MS for t in times):
                raise ValueError(f"stage_ms.{size}: one time for each exit")
        check_curve(self.curve)


def check_curve(curve: tuple[dict[str, Any], ...]) -> None:
    """Whether each point of a trade-off curve has an accuracy (0..1) and a latency (ms).

    Raises:
        ValueError: one has not.
    """
    for point in curve:
        ms, accuracy = point.get("latency_ms"), point.get("accuracy")
        if not (isinstance(ms, (int, float)) and 0 <= ms <= MAX_MS):
            raise ValueError("curve: a point without latency_ms")
        if not (isinstance(accuracy, (int, float)) and 0 <= accuracy <= 1):
            raise ValueError("curve: a point without an accuracy from 0 to 1")


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(to_json(dataclasses.replace(manifest, digest=""))).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json with its own digest."""
    atomic_write(folder / MANIFEST, to_json(dataclasses.replace(manifest, digest=_digest(manifest))))


def read_metadata(path: Path) -> ModelMetadata:
    """The metadata of student.onnx or student.engine/, whose other files are not looked at.

    Raises:
        ArtifactError: see `read_onnx` and `read_manifest`.
    """
    recover(path)
    return _manifest(path).metadata if path.is_dir() else read_onnx(path)[1]


def read_manifest(folder: Path) -> Manifest:
    """Read an engine's manifest and check every file against its hash.

    Raises:
        ArtifactError: no engine, or a file that is missing, cut short or edited; it is named.
    """
    recover(folder)
    manifest = _manifest(folder)
    for name in manifest.files:
        path = folder / name
        if _listed(path, manifest) != sha256(path):
            raise _edited(path)
    return manifest


def read_file(path: Path, manifest: Manifest) -> bytes:
    """The content of an engine's file, which is what its manifest says.

    Raises:
        ArtifactError: it is not, whatever has become of the folder since the manifest was read.
    """
    listed, data = _listed(path, manifest), read_bytes(path, what="engine file")
    if listed != hashlib.sha256(data).hexdigest():
        raise _edited(path)
    return data


def _listed(path: Path, manifest: Manifest) -> str:
    """The SHA-256 that a file has to have, which is there and as long as it should be."""
    file = manifest.files.get(path.name)
    if file is None:
        raise ArtifactError(f"{path} is no file of this engine", fix="compile again")
    if not path.is_file():
        raise ArtifactError(f"{path} is missing", fix="compile again")
    if path.stat().st_size != file.bytes:
        raise _edited(path)
    return file.sha256


def _edited(path: Path) -> ArtifactError:
    return ArtifactError(f"{path} is not the file that was built (cut short or edited)", fix="compile again")


def _manifest(folder: Path) -> Manifest:
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{folder} is no engine: it has no {MANIFEST}", fix="make one with edgekd compile")
    manifest = read_json(folder / MANIFEST, Manifest, what="engine manifest")
    for name in manifest.files:
        if Path(name).name != name or name == MANIFEST:
            raise ArtifactError(f"{folder / MANIFEST}: '{name}' is no name of a file beside it", fix="compile again")
    if manifest.digest != _digest(manifest):
        raise ArtifactError(
            f"{folder / MANIFEST} was edited", fix="change thresholds with edgekd tune, or compile again"
        )
    return manifest
