"""The manifest of student.engine/, and the checked reading of its files."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekd.artifacts.certificate import Attempt, Certificate
from edgekd.artifacts.metadata import ModelMetadata, read_student
from edgekd.artifacts.recipe import Recipe
from edgekd.data.preprocess import Preprocess
from edgekd.errors import ArtifactError
from edgekd.files import atomic_write, recover, sha256
from edgekd.host import HostInfo
from edgekd.policy import Policy
from edgekd.serialization import SCHEMA, from_table, read_bytes, read_table, to_json

MANIFEST = "manifest.json"
NETWORK = "network"
"""`EngineFile.graph` of the network that the graphs were built from, kept so that exits can be removed."""
NETWORK_FILE = f"{NETWORK}.onnx"
STUDENT = "student"
STUDENT_FILE = f"{STUDENT}.onnx"
"""The network that was compiled, kept in a pending engine as the reference of its check."""
PENDING = ("parity", "accuracy", "stage_ms")
"""Fields of a manifest that are unknown until the engine has run."""
MAX_MS = 1e12
"""Milliseconds (30 years) that no measured time exceeds."""


@dataclass(frozen=True)
class EngineFile:
    """One file of an engine.

    Attributes:
        graph: The graph it belongs to: `stage_0`, …, `monolithic` or `final`; `network` and `student` are not run.
        sha256: SHA-256 of its content.
        bytes: Its size.
    """

    graph: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Calibration:
    """The calibration of an int8 engine.

    Attributes:
        images: Number of images of the training split.
        method: How the ends of activation ranges were chosen: `minmax`, `percentile` or `entropy`.
        sha256: SHA-256 of the preprocessed images.
    """

    images: int
    method: str
    sha256: str


@dataclass(frozen=True)
class BatchParity:
    """Parity of one batch size.

    Attributes:
        size: Batch size.
        max_abs_logit_difference: Largest difference from student.onnx, for each exit.
    """

    size: int
    max_abs_logit_difference: tuple[float, ...]


@dataclass(frozen=True)
class Parity:
    """Differences of logits on the validation images.

    Attributes:
        max_abs_logit_difference: Largest difference from student.onnx, for each exit.
        staged_to_monolithic: Largest difference between the stages in sequence and the monolithic graph; None without
            one.
        by_batch_size: For backends that build kernels for each batch size: every size, in the order of the runs.
    """

    max_abs_logit_difference: tuple[float, ...]
    staged_to_monolithic: float | None = None
    by_batch_size: tuple[BatchParity, ...] = ()


@dataclass(frozen=True)
class PredictionAccuracy:
    """Accuracy of one kind of prediction (`ensemble` or `final`) on the validation images.

    Attributes:
        reference: Accuracy of student.onnx, 0..1.
        engine: Accuracy of the engine, 0..1.
        images: Number of images.
        lost: Images that student.onnx classifies correctly and the engine does not.
        gained: Images that the engine classifies correctly and student.onnx does not.
    """

    reference: float
    engine: float
    images: int
    lost: int
    gained: int


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of an engine and of student.onnx on the validation images.

    Attributes:
        validation_images: Number of images.
        reference: Accuracy of each exit of student.onnx, 0..1.
        engine: Accuracy of each exit of the engine, 0..1.
        predictions: The kinds of prediction that the gate judges: `ensemble` and `final`.
    """

    validation_images: int
    reference: tuple[float, ...]
    engine: tuple[float, ...]
    predictions: dict[str, PredictionAccuracy]


@dataclass(frozen=True)
class CurvePoint:
    """A point of the trade-off curve of `edgekd tune`.

    Attributes:
        accuracy: Accuracy on the validation images, 0..1.
        latency_ms: Mean latency of an image at batch size 1, from the stages' times.
        thresholds: Threshold of each exit but the last.
        shares: Share of the images that take each exit, 0..1.
    """

    accuracy: float
    latency_ms: float
    thresholds: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.latency_ms <= MAX_MS:
            raise ValueError("latency_ms: from 0 on")
        if not 0 <= self.accuracy <= 1:
            raise ValueError("accuracy: from 0 to 1")


@dataclass(frozen=True)
class Tuning:
    """The choice of exit thresholds by `edgekd tune`.

    Attributes:
        accuracy: Accuracy of the cascade on the validation images, 0..1.
        accuracy_error: Standard error of its difference from `reference_accuracy`.
        ensemble_accuracy: Accuracy of the ensemble of all exits, 0..1.
        latency_ms: Mean latency of an image at batch size 1, from the stages' times.
        shares: Share of the images that take each exit, 0..1.
        goal: The requested bound: `max_accuracy_drop` (points) or `latency_ms`.
        images: Number of validation images.
        fingerprint: Fingerprint of the images.
        reference_accuracy: Accuracy without early exit, of the last exit or the ensemble, whichever is higher; None if
            an earlier edgekd tuned it, for which the ensemble was the reference.
    """

    accuracy: float
    accuracy_error: float
    ensemble_accuracy: float
    latency_ms: float
    shares: tuple[float, ...]
    goal: dict[str, float] = field(default_factory=dict)
    images: int = 0
    fingerprint: str = ""
    reference_accuracy: float | None = None


@dataclass(frozen=True)
class Manifest:
    """manifest.json of student.engine/: what was built, on which host, and how accurate it was at build time.

    Attributes:
        metadata: Metadata of student.onnx, with the tuned exit policy.
        backend: Name of the backend.
        backend_version: Its version.
        recipe: The recipe.
        precision: Precision to its fraction of the layers, as read back.
        host: The machine that built it.
        files: File name to its graph, hash and size.
        source_sha256: SHA-256 of student.onnx.
        calibration: Calibration; None unless int8.
        parity: Differences from student.onnx; None if unchecked.
        accuracy: Accuracy beside student.onnx's; None if unchecked.
        stage_ms: Batch size (as text) to the measured time of each stage in milliseconds.
        notes: Remarks for the user.
        curve: Trade-off curve of `edgekd tune`.
        tuning: How the exit policy was chosen; None until then.
        pending: Names of the fields that are unknown because the engine was built where it cannot run; nothing may use
            it until it is checked on the machine that runs it.
        certificate: What the exit policy keeps on new images; None if nothing is certified. It is void when the
            engine's files, its policy or its preprocessing change, so what changes them drops it.
        attempts: The searches for a certificate so far.
        edgekd: Version of edgekd that built it.
        digest: SHA-256 of the manifest without this field.
        schema: Version of this format.
    """

    metadata: ModelMetadata
    backend: str
    backend_version: str
    recipe: Recipe
    precision: dict[str, float]
    host: HostInfo
    files: dict[str, EngineFile]
    source_sha256: str
    calibration: Calibration | None = None
    parity: Parity | None = None
    accuracy: Accuracy | None = None
    stage_ms: dict[str, tuple[float, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    tuning: Tuning | None = None
    pending: tuple[str, ...] = ()
    certificate: Certificate | None = None
    attempts: tuple[Attempt, ...] = ()
    edgekd: str = ""
    digest: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        for size, times in self.stage_ms.items():
            if not (size.isascii() and size.isdecimal() and int(size) > 0 and size == str(int(size))):
                raise ValueError(f"stage_ms: {size} is not a batch size")
            if len(times) != len(self.metadata.exits) or not all(0 <= t <= MAX_MS for t in times):
                raise ValueError(f"stage_ms.{size}: one time for each exit")
        if self.pending and (self.pending != PENDING or self.parity or self.accuracy or self.stage_ms or self.tuning):
            raise ValueError(f"pending: {', '.join(PENDING)}, none of which is known")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json with its own digest."""
    table = dataclasses.asdict(manifest)
    atomic_write(folder / MANIFEST, to_json({**table, "digest": _digest(table)}))


def read_metadata(path: Path) -> ModelMetadata:
    """Read the metadata of student.onnx or student.engine/, whose other files are not checked.

    Raises:
        ArtifactError: See `read_student` and `read_manifest`.
    """
    recover(path)
    return _manifest(path).metadata if path.is_dir() else read_student(path).metadata


def read_manifest(folder: Path) -> Manifest:
    """Read an engine's manifest and check every file against its hash.

    Raises:
        ArtifactError: The folder is not an engine, or a file other than `NETWORK_FILE` is missing, or any is cut short
            or edited; it is named.
    """
    recover(folder)
    manifest = _manifest(folder)
    for name, file in manifest.files.items():
        path = folder / name
        if file.graph == NETWORK and not path.exists():  # no device needs it, so copies may leave it out
            continue
        if _listed(path, manifest) != sha256(path):
            raise _edited(path)
    return manifest


def read_file(path: Path, manifest: Manifest) -> bytes:
    """Read a file of an engine.

    Raises:
        ArtifactError: Its content differs from the manifest, even if the folder changed after the manifest was read.
    """
    listed, data = _listed(path, manifest), read_bytes(path, what="engine file")
    if listed != hashlib.sha256(data).hexdigest():
        raise _edited(path)
    return data


def _manifest(folder: Path) -> Manifest:
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{folder} is not an engine: it has no {MANIFEST}", fix="make one with edgekd compile")
    path = folder / MANIFEST
    table = read_table(path, what="engine manifest")
    manifest = from_table(Manifest, table, where=f"{path} is not an engine manifest that this edgekd can read")
    for name in manifest.files:
        if Path(name).name != name or name == MANIFEST:
            raise ArtifactError(
                f"{folder / MANIFEST}: '{name}' is not the name of a file beside it", fix="compile again"
            )
    if manifest.digest != _digest(table):
        raise ArtifactError(
            f"{folder / MANIFEST} was edited", fix="change thresholds with edgekd tune, or compile again"
        )
    return manifest


def _digest(table: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest as it was written, so that versions with further fields find the same."""
    return hashlib.sha256(to_json({**table, "digest": ""})).hexdigest()


def _listed(path: Path, manifest: Manifest) -> str:
    """Return the SHA-256 that a file must have; the file exists and has the listed size."""
    file = manifest.files.get(path.name)
    if file is None:
        raise ArtifactError(f"{path} is not a file of this engine", fix="compile again")
    if not path.is_file():
        raise ArtifactError(f"{path} is missing", fix="compile again")
    if path.stat().st_size != file.bytes:
        raise _edited(path)
    return file.sha256


def _edited(path: Path) -> ArtifactError:
    return ArtifactError(f"{path} is not the file that was built (cut short or edited)", fix="compile again")


def is_pending(folder: Path) -> bool:
    """Return True if a folder is a readable engine that was built where it cannot run, and not checked since."""
    try:
        return bool(_manifest(folder).pending)
    except ArtifactError:
        return False


def has_certificate(folder: Path) -> bool:
    """Return True if a folder is a readable engine with a certificate."""
    try:
        return _manifest(folder).certificate is not None
    except ArtifactError:
        return False


def engine_digest(manifest: Manifest) -> str:
    """Return a digest of the engine's files."""
    return _digest_of({name: file.sha256 for name, file in sorted(manifest.files.items())})


def policy_digest(policy: Policy) -> str:
    """Return a digest of an exit policy."""
    return _digest_of(_changed_fields(policy))


def preprocess_digest(manifest: Manifest) -> str:
    """Return a digest of the preprocessing."""
    return _digest_of(_changed_fields(manifest.metadata.preprocess))


def void_reason(manifest: Manifest) -> str:
    """Return why an engine's certificate is void, in words; empty if it is valid, or if there is none."""
    found = manifest.certificate
    if found is None:
        return ""
    parts = {
        "its files": (found.engine_sha256, engine_digest(manifest)),
        "its exit policy": (found.policy_sha256, policy_digest(manifest.metadata.policy)),
        "its preprocessing": (found.preprocess_sha256, preprocess_digest(manifest)),
    }
    changed = [name for name, (then, now) in parts.items() if then != now]
    return f"the certificate is void: {' and '.join(changed)} changed after the tests" if changed else ""


def _changed_fields(value: Policy | Preprocess) -> dict[str, Any]:
    """Return the fields that differ from their default, so that a field which a later version adds changes nothing."""
    found = {f.name: (getattr(value, f.name), f.default) for f in dataclasses.fields(value)}
    return {name: now for name, (now, default) in found.items() if now != default}


def _digest_of(value: dict[str, Any]) -> str:
    return hashlib.sha256(to_json(value)).hexdigest()
