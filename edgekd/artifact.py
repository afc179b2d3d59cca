"""The artefacts on disk: student.onnx, student.engine/ and split.json, and their checked reading."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar, get_args

import onnx

from edgekd import onnxcheck
from edgekd.errors import ArtifactError, ConfigError
from edgekd.files import atomic_write, recover, sha256, to_json
from edgekd.runtime.policy import Policy
from edgekd.runtime.preprocess import Preprocess
from edgekd.specs import from_dict, parse_json

SCHEMA = 1
MANIFEST = "manifest.json"
MAX_MS = 1e12
"""Milliseconds (30 years) that no measured time exceeds."""
Part = Literal["train", "val", "test"]
T = TypeVar("T")


def read_bytes(path: Path, *, what: str, fix: str = "check the path") -> bytes:
    """A file's content.

    Raises:
        ArtifactError: missing, a folder, or not to be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"no {what} at {path}", fix=fix) from None
    except OSError as error:
        what = f"{path} cannot be read: {error.strerror}"
        raise ArtifactError(what, fix="check the path and its rights") from None


def read_json(path: Path, cls: type[T], *, what: str) -> T:
    """Read a dataclass from JSON.

    Raises:
        ArtifactError: missing, not JSON, another schema, or not a `what`.
    """
    data = read_bytes(path, what=what)
    try:
        table = parse_json(data.decode())
    except ValueError as error:
        raise ArtifactError(f"{path} is no {what}: {error}", fix="make it again") from None
    return from_table(cls, table, where=f"{path} is no {what} that this edgekd reads")


def from_table(cls: type[T], table: Any, *, where: str) -> T:
    """A dataclass from parsed JSON of our schema.

    Raises:
        ArtifactError: another schema, or keys and values that do not fit.
    """
    if isinstance(table, dict) and table.get("schema", SCHEMA) != SCHEMA:
        found = reprlib.repr(table["schema"])
        raise ArtifactError(f"{where}: schema {found}, known: {SCHEMA}", fix="use the edgekd that wrote it")
    try:
        return from_dict(cls, table, where=where)
    except ConfigError as error:
        raise ArtifactError(error.what, fix="make it again, or use the edgekd version that wrote it") from None


BLANK = "edgekd-sha256".ljust(64, "_")
"""What stands for a file's SHA-256 while it is computed."""


def seal(data: bytes) -> str:
    """The SHA-256 of a serialised file that holds `BLANK` where it will be written."""
    return _digest_with_blank(data, BLANK)


def check_seal(data: bytes, digest: str, *, path: Path, fix: str) -> None:
    """Whether a file is, to the last bit, the one that its `digest` was written into.

    Raises:
        ArtifactError: it has none or was changed.
    """
    if not digest:
        raise ArtifactError(f"{path} carries no SHA-256: an earlier edgekd wrote it", fix=fix)
    if data.count(digest.encode()) != 1 or _digest_with_blank(data, digest) != digest:
        raise ArtifactError(f"{path} is not what was written: its SHA-256 differs", fix=fix)


def _digest_with_blank(data: bytes, written: str) -> str:
    at = data.index(written.encode())
    digest = hashlib.sha256(memoryview(data)[:at])
    digest.update(BLANK.encode())
    digest.update(memoryview(data)[at + len(written) :])
    return digest.hexdigest()


@dataclass(frozen=True)
class Item:
    """One image: posix path relative to the data folder, class index, and the picture it was cut from.

    digest: SHA-256 of the file; without one it is not checked when it is read.
    """

    path: str
    label: int
    group: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        check_relative(self.path)


def check_relative(path: str) -> None:
    """Whether this is the plain posix path of a file below some folder.

    Raises:
        ValueError: it is absolute, leads upwards or to the folder itself, is no Unicode, or could be written shorter.
    """
    parts = PurePosixPath(path).parts
    if not parts or path != "/".join(parts) or ".." in parts or "\0" in path:
        raise ValueError(f"path: {path!r} is no plain path below the data folder")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"path: {path!r} is not UTF-8") from None


@dataclass(frozen=True)
class Split:
    """Which image is where. `leaking` counts groups with images in more than one part.

    labels: name of the CSV file that gave the labels; empty if folders did.
    """

    classes: tuple[str, ...]
    parts: dict[str, tuple[Item, ...]]
    method: str
    seed: int
    group: str
    groups: int
    leaking: int
    fingerprint: str
    left_out: dict[str, str] = field(default_factory=dict)
    labels: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        check_classes(self.classes)
        if unknown := self.parts.keys() - set(get_args(Part)):
            raise ValueError(f"parts: {min(unknown)!r} is none of train, val, test")
        if not 0 <= self.leaking <= self.groups:
            raise ValueError(f"leaking: {self.leaking} of {self.groups} groups cannot be")
        seen: dict[str, str] = {}
        for part, items in self.parts.items():
            for item in items:
                if not 0 <= item.label < len(self.classes):
                    raise ValueError(f"parts.{part}: {item.path} has the label {item.label} of {len(self.classes)}")
                here = f"{part}: {item.path}"
                for picture in filter(None, (item.path, item.digest)):
                    if (other := seen.setdefault(picture, here)) is not here:
                        raise ValueError(f"parts: one picture is there twice, {other} and {here}")

    def part(self, name: Part) -> tuple[Item, ...]:
        """The images of one part.

        Raises:
            ArtifactError: the part is empty or missing.
        """
        if not self.parts.get(name):
            raise ArtifactError(f"the split has no {name} images", fix="make another with --split ratio:3,1,1")
        return self.parts[name]


def leaks(parts: Mapping[str, Sequence[Item]]) -> tuple[int, int]:
    """The number of groups, and of those with images in more than one part."""
    sides = Counter(key for items in parts.values() for key in {i.group for i in items} - {""})
    return len(sides), sum(n > 1 for n in sides.values())


def read_split(path: Path) -> Split:
    """Read split.json, or the one in a run folder.

    Raises:
        ArtifactError: no split; parts, labels, paths or classes that cannot be; an image twice or without SHA-256;
            other leaks than it says.
    """
    path = path / "split.json" if path.is_dir() else path
    split = read_json(path, Split, what="split")
    again = "make another split: train with --split ratio:3,1,1"
    if lacking := [i.path for items in split.parts.values() for i in items if not i.digest]:
        raise ArtifactError(f"{path} has no SHA-256 of {lacking[0]}: an earlier edgekd wrote it", fix=again)
    groups, leaking = leaks(split.parts)
    if (groups, leaking) != (split.groups, split.leaking):
        said = f"{split.leaking} of {split.groups} groups leak"
        raise ArtifactError(f"{path} was edited: it says that {said}, but {leaking} of {groups} do", fix=again)
    return split


@dataclass(frozen=True)
class Exit:
    """Names of tensors in student.onnx: the exit's logits (`exit_0`, `exit_1`, …), and what its stage hands to its head
    and the next stage.

    A network with one exit is not cut and may have an empty boundary.
    """

    output: str
    boundary: tuple[str, ...]


@dataclass(frozen=True)
class Card:
    """What student.onnx says of itself, in metadata_props["edgekd"]; exits run from shallow to deep.

    sha256: of the whole file, with `BLANK` in its place; `put_card` sets it.
    """

    network: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    exits: tuple[Exit, ...]
    policy: Policy
    provenance: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        check_classes(self.classes)
        if not self.exits:
            raise ValueError("exits: one or more")
        if len(self.exits) > 1 and self.outputs != [f"exit_{k}" for k in range(len(self.exits))]:
            raise ValueError("exits: their outputs are exit_0, exit_1, …")
        if len(self.exits) > 1 and not all(e.boundary for e in self.exits):
            raise ValueError("exits: where there are several, each needs a boundary to cut the network at")

    @cached_property
    def outputs(self) -> list[str]:
        return [e.output for e in self.exits]


def is_stray(path: str) -> bool:
    """Whether a path that should lie in a folder is none, or leads out of it."""
    parts = PurePosixPath(path).parts
    return not parts or path.startswith("/") or ".." in parts


def check_classes(classes: tuple[str, ...]) -> None:
    """Whether these can be the names of a classifier's classes.

    Raises:
        ValueError: fewer than two, one without a name, or one twice.
    """
    if len(classes) < 2 or not all(classes) or len(set(classes)) != len(classes):
        raise ValueError("classes: two or more names, none of them empty or there twice")


def plain_metadata(card: Card) -> dict[str, str]:
    """What somebody needs who runs student.onnx without edgekd, as metadata keys and their text."""
    of = card.preprocess
    return {
        "input": "images: float32 (n, 3, image_size, image_size), RGB planes",
        "image_size": str(of.image_size),
        "resize": of.resize,
        "interpolation": "bilinear, antialiased (Pillow)",
        "scale": "1/255",
        "mean": ",".join(map(str, of.mean)),
        "std": ",".join(map(str, of.std)),
        "output": "exit_0, exit_1, …: float32 (n, classes), logits before the softmax, shallow to deep",
        "classes": json.dumps(card.classes, ensure_ascii=False),
    }


def put_card(model: onnx.ModelProto, card: Card) -> None:
    """Make the card, with `plain_metadata` beside it, the model's only metadata; its SHA-256 holds as long as the model
    is not changed any more.
    """
    del model.metadata_props[:]
    for key, value in plain_metadata(card).items():
        model.metadata_props.add(key=key, value=value)
    own = model.metadata_props.add(key="edgekd", value=to_json(dataclasses.replace(card, sha256=BLANK)).decode())
    own.value = own.value.replace(BLANK, seal(model.SerializeToString()))


def read_onnx(path: Path) -> tuple[onnx.ModelProto, Card]:
    """Read student.onnx and its card.

    Raises:
        ArtifactError: missing, cut short, changed, not ONNX, not made by `edgekd export`; other inputs and outputs than
            its card says, operators or data that no exported classifier has (see `onnxcheck`).
    """
    again = "export it again"
    data = read_bytes(path, what="ONNX file", fix="make one with edgekd export")
    try:
        model = onnxcheck.parsed(data)
    except ValueError as error:
        raise ArtifactError(f"{path} is not a whole ONNX file of ours: {error}", fix=again) from None
    text = next((p.value for p in model.metadata_props if p.key == "edgekd"), None)
    if text is None:
        raise ArtifactError(f"{path} was not made by edgekd", fix="export the run folder with edgekd export")
    try:
        table = parse_json(text)
    except ValueError as error:
        raise ArtifactError(f"{path}: its edgekd metadata is damaged ({error})", fix=again) from None
    card = from_table(Card, table, where=f"{path}: its edgekd metadata")
    check_seal(data, card.sha256, path=path, fix=again)
    try:
        size, classes = card.preprocess.image_size, len(card.classes)
        onnxcheck.check_ends(model, image_size=size, outputs=card.outputs, classes=classes)
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker raises many kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ArtifactError(f"{path} is not what its card says: {reason}", fix=again) from None
    return model, card


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

    def __post_init__(self) -> None:
        for size, times in self.stage_ms.items():
            if not (size.isascii() and size.isdecimal() and int(size) > 0 and size == str(int(size))):
                raise ValueError(f"stage_ms: {size} is no batch size")
            if len(times) != len(self.card.exits) or not all(0 <= t <= MAX_MS for t in times):
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
