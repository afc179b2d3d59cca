"""Export of a trained network to student.onnx: one plain ONNX file, checked against the network in torch."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxsim
import torch
from torch import Tensor, nn

from edgekd.artifacts import onnx_checks
from edgekd.artifacts.metadata import ModelMetadata, put_metadata
from edgekd.artifacts.partition import graph, with_shapes
from edgekd.data.preprocess import Preprocess
from edgekd.errors import ArtifactError, ConfigError, GateError
from edgekd.files import NETWORK, atomic_write, refuse_other
from edgekd.models.base import MultiExitNetwork, Outputs, boundary_tensors, exits_of
from edgekd.policy import Policy
from edgekd.types import Array

OPSET = 17
"""TensorRT 8.6 (JetPack 6.0) reads no newer one."""
TOLERANCE = 1e-4
"""Largest difference of logits from torch: relative to an exit's largest logit, or absolute where all are below 1."""


def export(network: MultiExitNetwork, metadata: ModelMetadata, *, out: Path, images: Array, names: list[str]) -> float:
    """Write student.onnx.

    The file's metadata describe how to run it without edgekd: `input`, `image_size`, `resize` and `resize_size` (see
    `data.preprocess.Preprocess`), `interpolation`, `scale`, `mean`, `std` (of each plane, after scaling), `output`
    (logits) and `classes` (a JSON list). `edgekd` is `metadata`, with a SHA-256 of the file.

    Args:
        network: The trained network, on the CPU.
        metadata: Metadata of the network; see `model_metadata`.
        out: The file to write.
        images: Real images (N, 3, H, W), preprocessed, to compare both networks on.
        names: The images' names, for errors.

    Returns:
        The largest difference of logits from torch.

    Raises:
        ArtifactError: `out` exists and is another kind of file.
        ConfigError: The network cannot be cut at an exit; its name and place are given.
        GateError: An exit differs by more than `TOLERANCE` on an image, or weights are not finite. Nothing is written.
    """
    refuse_other(out, NETWORK)
    model = to_onnx(network, image_size=metadata.preprocess.image_size)
    _check_cuts(model, metadata, network)
    put_metadata(model, metadata)
    data = model.SerializeToString()
    try:
        onnx_checks.parse(data)
    except ValueError as error:
        raise GateError(f"the network is not exported: {error}", fix="train it anew") from None
    worst = check_parity(network, data, images, names=names)
    atomic_write(out, data)
    return worst


def model_metadata(
    name: str,
    classes: tuple[str, ...],
    preprocess: Preprocess,
    outputs: Outputs,
    *,
    provenance: Mapping[str, Any] | None = None,
) -> ModelMetadata:
    """Return the metadata of a network's student.onnx, with a policy that never exits early.

    Args:
        name: The network's name.
        classes: Names of the classes.
        preprocess: Preprocessing of the images.
        outputs: The network's outputs for any image.
        provenance: Where the weights come from.

    Raises:
        ConfigError: The network has several exits, but not a boundary for each of them.
    """
    policy = Policy((1.0,) * len(outputs.logits))
    return ModelMetadata(name, classes, preprocess, exits_of(outputs), policy, dict(provenance or {}))


def to_onnx(network: MultiExitNetwork, *, image_size: int) -> onnx.ModelProto:
    """Convert a network to ONNX: opset 17, dynamic batch `n`, simplified and checked.

    Boundary tensors keep their names as inner tensors. Torch's older exporter is used because the newer one writes
    opset 18 and cannot convert down to 17.

    Raises:
        ConfigError: The network has several exits, but not a boundary for each of them.
    """
    network.eval()
    example = torch.zeros(2, 3, image_size, image_size)
    with torch.no_grad():
        outputs: Outputs = network(example)
    exits = exits_of(outputs)
    names = [e.output for e in exits] + [name for e in exits for name in e.boundary]
    buffer = io.BytesIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Flat(network).eval(),  # the exporter restores the mode it found, also the network's
            (example,),
            buffer,  # type: ignore[arg-type]  # the older exporter accepts a stream
            input_names=["images"],
            output_names=names,
            dynamic_axes={name: {0: "n"} for name in ["images", *names]},
            opset_version=OPSET,
            dynamo=False,
        )
    model: onnx.ModelProto = onnxsim.simplify(onnx.load_from_string(buffer.getvalue()))[0]
    del model.graph.output[len(outputs.logits) :]
    onnx.checker.check_model(model, full_check=True)
    return model


class _Flat(nn.Module):
    """A network whose outputs are one flat tuple: every exit's logits, then the tensors of every boundary."""

    def __init__(self, network: MultiExitNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs: Outputs = self.network(x)
        return (*outputs.logits, *(t for boundary in outputs.maps for t in boundary_tensors(boundary)))


def _check_cuts(model: onnx.ModelProto, metadata: ModelMetadata, network: MultiExitNetwork) -> None:
    """Check that each stage can be extracted from the boundary before it alone."""
    shaped = with_shapes(model)
    for k in range(1, len(metadata.exits)):
        try:
            graph(shaped, metadata, name=f"stage_{k}")
        except ArtifactError as error:
            place = f"exit_{k - 1}" + (f" at {network.exit_at[k - 1]}" if network.exit_at else "")
            raise ConfigError(
                f"the network cannot be cut at {place}: {error.what}",
                fix="put this exit where nothing bypasses it: at the end of a block or stage",
            ) from None


def check_parity(network: MultiExitNetwork, model: bytes, images: Array, *, names: list[str]) -> float:
    """Compare logits of torch and ONNX Runtime, both FP32 on the CPU.

    Args:
        network: The network in torch.
        model: The serialized ONNX model.
        images: (N, 3, H, W), preprocessed.
        names: The images' names, for errors.

    Returns:
        The largest absolute difference.

    Raises:
        GateError: An exit differs by more than `TOLERANCE`.
    """
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    worst = 0.0
    for start in range(0, len(images), 32):
        batch = images[start : start + 32]
        with torch.no_grad():
            expected: Outputs = network(torch.from_numpy(batch))
        for k, (logits, reference) in enumerate(zip(session.run(None, {"images": batch}), expected.logits)):
            difference = np.abs(logits - reference.numpy()).max(axis=1)
            limit = TOLERANCE * max(1.0, float(reference.abs().max()))
            if not difference.max() <= limit:
                at = int(np.nanargmax(np.where(np.isfinite(difference), difference, np.inf)))
                raise GateError(
                    f"exit_{k} differs from torch by {difference[at]:.2e} on {names[start + at]} (limit {limit:.1e})",
                    fix="please report this network; nothing was written",
                )
            worst = max(worst, float(difference.max()))
    return worst
