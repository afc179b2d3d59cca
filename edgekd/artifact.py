"""The artefacts on disk: student.onnx, student.engine/ and split.json, and their checked reading."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import onnx

from edgekd.errors import ArtifactError, ConfigError
from edgekd.files import atomic_write, recover, sha256, to_json
from edgekd.runtime.policy import Policy
from edgekd.runtime.preprocess import Preprocess
from edgekd.specs import from_dict

SCHEMA = 1
MANIFEST = "manifest.json"
Part = Literal["train", "val", "test"]
T = TypeVar("T")


def read_json(path: Path, cls: type[T], *, what: str) -> T:
    """Read a dataclass from JSON.

    Raises:
        ArtifactError: missing, not JSON, another schema, or not a `what`.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"no {what} at {path}", fix="check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is no {what}: {error}", fix="make it again") from None
    return _parse(cls, table, where=f"{path} is no {what} that this edgekd reads")


def _parse(cls: type[T], table: Any, *, where: str) -> T:
    if isinstance(table, dict) and table.get("schema", SCHEMA) != SCHEMA:
        raise ArtifactError(f"{where}: schema {table['schema']}, known: {SCHEMA}", fix="use the edgekd that wrote it")
    try:
        return from_dict(cls, table, where=where)
    except ConfigError as error:
        raise ArtifactError(error.what, fix="make it again, or use the edgekd version that wrote it") from None


@dataclass(frozen=True)
class Item:
    """One image: path relative to the data folder, class index, and the picture it was cut from."""

    path: str
    label: int
    group: str = ""


@dataclass(frozen=True)
class Split:
    """Which image is where. `leaking` counts groups with images in more than one part."""

    classes: tuple[str, ...]
    parts: dict[str, tuple[Item, ...]]
    method: str
    seed: int
    group: str
    groups: int
    leaking: int
    fingerprint: str
    left_out: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def part(self, name: Part) -> tuple[Item, ...]:
        """The images of one part.

        Raises:
            ArtifactError: the part is empty or missing.
        """
        if not self.parts.get(name):
            raise ArtifactError(f"the split has no {name} images", fix="make another with --split ratio:3,1,1")
        return self.parts[name]


def read_split(path: Path) -> Split:
    """Read split.json, or the one in a run folder."""
    return read_json(path / "split.json" if path.is_dir() else path, Split, what="split")


@dataclass(frozen=True)
class Exit:
    """Names of tensors in student.onnx: the exit's logits, and what its stage hands to its head and the next stage.

    A network with one exit is not cut and may have an empty boundary.
    """

    output: str
    boundary: tuple[str, ...]


@dataclass(frozen=True)
class Card:
    """What student.onnx says of itself, in metadata_props["edgekd"]; exits run from shallow to deep."""

    network: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    exits: tuple[Exit, ...]
    policy: Policy
    provenance: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if len(self.exits) > 1 and not all(e.boundary for e in self.exits):
            raise ValueError("exits: where there are several, each needs a boundary to cut the network at")

    @cached_property
    def outputs(self) -> list[str]:
        return [e.output for e in self.exits]


def put_card(model: onnx.ModelProto, card: Card) -> None:
    """Write the card into the model's metadata."""
    for prop in list(model.metadata_props):
        if prop.key == "edgekd":
            model.metadata_props.remove(prop)
    model.metadata_props.add(key="edgekd", value=to_json(card).decode())


def read_onnx(path: Path) -> tuple[onnx.ModelProto, Card]:
    """Read student.onnx and its card.

    Raises:
        ArtifactError: missing, cut short, not ONNX, or not made by `edgekd export`.
    """
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except FileNotFoundError:
        raise ArtifactError(f"no ONNX file at {path}", fix="make one with edgekd export") from None
    except Exception as error:  # protobuf and the checker raise many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"{path} is not a whole ONNX file ({reason})", fix="export it again") from None
    text = next((p.value for p in model.metadata_props if p.key == "edgekd"), None)
    if text is None:
        raise ArtifactError(f"{path} was not made by edgekd", fix="export the run folder with edgekd export")
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path}: its edgekd metadata is damaged ({error})", fix="export it again") from None
    return model, _parse(Card, table, where=f"{path}: its edgekd metadata")


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

    card: Card
    backend: str
    backend_version: str
    recipe: dict[str, Any]
    precision: dict[str, float]
    host: dict[str, Any]
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


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(to_json(dataclasses.replace(manifest, digest=""))).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json with its own digest."""
    atomic_write(folder / MANIFEST, to_json(dataclasses.replace(manifest, digest=_digest(manifest))))


def read_card(path: Path) -> Card:
    """The card of student.onnx or student.engine/, whose other files are not looked at.

    Raises:
        ArtifactError: see `read_onnx` and `read_manifest`.
    """
    recover(path)
    return _manifest(path).card if path.is_dir() else read_onnx(path)[1]


def read_manifest(folder: Path) -> Manifest:
    """Read an engine's manifest and check every file against its hash.

    Raises:
        ArtifactError: no engine, or a file that is missing, cut short or edited; it is named.
    """
    recover(folder)
    manifest = _manifest(folder)
    for name, file in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing", fix="compile again")
        if path.stat().st_size != file.bytes or sha256(path) != file.sha256:
            raise ArtifactError(f"{path} is not the file that was built (cut short or edited)", fix="compile again")
    return manifest


def _manifest(folder: Path) -> Manifest:
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{folder} is no engine: it has no {MANIFEST}", fix="make one with edgekd compile")
    manifest = read_json(folder / MANIFEST, Manifest, what="engine manifest")
    if manifest.digest != _digest(manifest):
        raise ArtifactError(
            f"{folder / MANIFEST} was edited", fix="change thresholds with edgekd tune, or compile again"
        )
    return manifest
