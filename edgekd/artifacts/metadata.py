"""The metadata of student.onnx, and the checked reading of both."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

from edgekd.artifacts import onnx_checks
from edgekd.artifacts.training_images import TrainingImages
from edgekd.data.preprocess import Preprocess
from edgekd.data.split import check_classes
from edgekd.errors import ArtifactError
from edgekd.policy import Policy
from edgekd.schema import parse_json
from edgekd.serialization import BLANK, SCHEMA, check_seal, from_table, read_bytes, seal, to_json


@dataclass(frozen=True)
class Exit:
    """Names of the tensors of one exit in student.onnx.

    Attributes:
        output: The exit's logits: `exit_0`, `exit_1`, …
        boundary: Tensors that its stage passes to the exit head and to the next stage; a network with one exit is not
            partitioned, so its boundary may be empty.
    """

    output: str
    boundary: tuple[str, ...]


@dataclass(frozen=True)
class ModelMetadata:
    """Metadata of student.onnx, in metadata_props["edgekd"].

    Attributes:
        network: Name of the network.
        classes: Names of the classes, in the order of the logits.
        preprocess: Preprocessing of the images.
        exits: Exits, from shallow to deep.
        policy: Exit policy.
        provenance: How the network was trained.
        training_images: The images that weights were fitted to or chosen by, if they are known.
        sha256: SHA-256 of the file with `BLANK` in this place; `put_metadata` sets it.
        schema: Version of this format.
    """

    network: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    exits: tuple[Exit, ...]
    policy: Policy
    provenance: dict[str, Any] = field(default_factory=dict)
    training_images: TrainingImages | None = None
    sha256: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        check_classes(self.classes)
        if not self.exits:
            raise ValueError("exits: one or more")
        if len(self.exits) > 1 and self.outputs != [f"exit_{k}" for k in range(len(self.exits))]:
            raise ValueError("exits: their outputs are exit_0, exit_1, …")
        if len(self.exits) > 1 and not all(e.boundary for e in self.exits):
            raise ValueError("exits: where there are several, each needs a boundary")

    @cached_property
    def outputs(self) -> list[str]:
        return [e.output for e in self.exits]


def plain_metadata(metadata: ModelMetadata) -> dict[str, str]:
    """Return metadata keys and their text for running student.onnx without edgekd."""
    of = metadata.preprocess
    planes = {"rgb": "RGB planes", "bgr": "BGR planes", "grey": "luminance in all three planes"}[of.channels]
    small = {} if of.resize_size is None else {"resize_size": str(of.resize_size)}
    return {
        "input": f"images: float32 (n, 3, image_size, image_size), {planes}",
        "image_size": str(of.image_size),
        "resize": of.resize,
        **small,
        "interpolation": f"{of.interpolation}, {'antialiased' if of.antialias else 'not antialiased'} (Pillow)",
        "scale": "1/255" if of.scale == 1 / 255 else repr(of.scale),
        "mean": ",".join(map(str, of.mean)),
        "std": ",".join(map(str, of.std)),
        "output": "exit_0, exit_1, …: float32 (n, classes), logits before the softmax, shallow to deep",
        "classes": json.dumps(metadata.classes, ensure_ascii=False),
    }


def put_metadata(model: onnx.ModelProto, metadata: ModelMetadata) -> None:
    """Replace the model's metadata by `metadata` and `plain_metadata`; its SHA-256 is valid until the model changes."""
    del model.metadata_props[:]
    for key, value in plain_metadata(metadata).items():
        model.metadata_props.add(key=key, value=value)
    own = model.metadata_props.add(key="edgekd", value=to_json(dataclasses.replace(metadata, sha256=BLANK)).decode())
    own.value = own.value.replace(BLANK, seal(model.SerializeToString()))


@dataclass(frozen=True)
class StudentModel:
    """student.onnx, read and checked.

    Attributes:
        model: The ONNX model.
        metadata: Its metadata.
        sha256: SHA-256 of the file.
    """

    model: onnx.ModelProto
    metadata: ModelMetadata
    sha256: str


def read_onnx(path: Path) -> tuple[onnx.ModelProto, ModelMetadata]:
    """Return the model and the metadata of `read_student`."""
    student = read_student(path)
    return student.model, student.metadata


def read_student(path: Path) -> StudentModel:
    """Read student.onnx and its metadata.

    Raises:
        ArtifactError: The file is missing, cut short, changed, not ONNX or not made by `edgekd export`; its inputs and
            outputs differ from its metadata, or it has operators or data that no exported classifier has (see
            `onnx_checks`).
    """
    again = "export it again"
    data = read_bytes(path, what="ONNX file", fix="make one with edgekd export")
    try:
        model = onnx_checks.parse(data)
    except ValueError as error:
        raise ArtifactError(f"{path} is not a complete ONNX file written by edgekd: {error}", fix=again) from None
    text = next((p.value for p in model.metadata_props if p.key == "edgekd"), None)
    if text is None:
        raise ArtifactError(f"{path} was not made by edgekd", fix="export the run folder with edgekd export")
    try:
        table = parse_json(text)
    except ValueError as error:
        raise ArtifactError(f"{path}: its edgekd metadata is damaged ({error})", fix=again) from None
    metadata = from_table(ModelMetadata, table, where=f"{path}: its edgekd metadata")
    check_seal(data, metadata.sha256, path=path, fix=again)
    try:
        size, classes = metadata.preprocess.image_size, len(metadata.classes)
        onnx_checks.check_interface(model, image_size=size, outputs=metadata.outputs, classes=classes)
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker raises many kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ArtifactError(f"{path} does not match its metadata: {reason}", fix=again) from None
    return StudentModel(model, metadata, hashlib.sha256(data).hexdigest())
