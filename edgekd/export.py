"""A trained network to student.onnx: one plain ONNX file that is checked against the network it came from."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxsim
import torch
from torch import Tensor, nn

from edgekd.artifacts import onnx_checks
from edgekd.artifacts.metadata import ModelMetadata, put_metadata
from edgekd.artifacts.partition import graph, with_shapes
from edgekd.errors import ArtifactError, ConfigError, GateError
from edgekd.files import NETWORK, atomic_write, refuse_other
from edgekd.models.base import Outputs, _tensors, exits_of
from edgekd.types import Array

OPSET = 17
"""TensorRT 8.6 (JetPack 6.0) reads no newer one."""
TOLERANCE = 1e-4
"""Largest difference of logits from torch: of an exit's largest logit, or absolute where all are below 1."""


class _Flat(nn.Module):
    """Outputs as a flat tuple: every exit's logits, then every boundary's tensors."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out: Outputs = self.network(x)
        return (*out.logits, *(t for m in out.maps for t in _tensors(m)))


def to_onnx(network: nn.Module, *, image_size: int) -> onnx.ModelProto:
    """Opset 17, dynamic batch `n`, simplified, checked. Boundaries keep their names as inner tensors.

    Torch's older exporter is used on purpose: the newer one writes opset 18 and cannot come down to 17.
    """
    network.eval()
    example = torch.zeros(2, 3, image_size, image_size)
    with torch.no_grad():
        out: Outputs = network(example)
    exits = exits_of(out)
    names = [e.output for e in exits] + [name for e in exits for name in e.boundary]
    buffer = io.BytesIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Flat(network).eval(),  # the exporter puts back the mode it found, on the network too
            (example,),
            buffer,  # type: ignore[arg-type]  # a stream is taken by the older exporter
            input_names=["images"],
            output_names=names,
            dynamic_axes={name: {0: "n"} for name in ["images", *names]},
            opset_version=OPSET,
            dynamo=False,
        )
    model: onnx.ModelProto = onnxsim.simplify(onnx.load_from_string(buffer.getvalue()))[0]
    del model.graph.output[len(out.logits) :]
    onnx.checker.check_model(model, full_check=True)
    return model


def export(network: nn.Module, metadata: ModelMetadata, *, out: Path, images: Array, names: list[str]) -> float:
    """Write student.onnx and return the largest difference of logits from torch on `images`.

    images: (N, 3, H, W), real ones; names: what to call each in an error.

    The file's metadata say how to run it elsewhere: `input`, `image_size`, `resize` (stretch, or crop: keep the aspect
    ratio and cut the middle), `interpolation`, `scale`, `mean`, `std` (of R, G, B, after scaling to 0..1), `output`
    (logits) and `classes` (a JSON list). `edgekd` is the metadata, with a SHA-256 of the file.

    Raises:
        ArtifactError: `out` is something else than such a file.
        ConfigError: the network cannot be cut at an exit; its name and place are given.
        GateError: an exit differs by more than `TOLERANCE` on an image; both are named and nothing is written. Weights
            that are not finite.
    """
    refuse_other(out, NETWORK)
    model = to_onnx(network, image_size=metadata.preprocess.image_size)
    _check_cuts(model, metadata, at=getattr(network, "exit_at", ()))
    put_metadata(model, metadata)
    data = model.SerializeToString()
    try:
        onnx_checks.parsed(data)
    except ValueError as error:
        raise GateError(f"the network is not exported: {error}", fix="train it anew") from None
    worst = check_parity(network, data, images, names=names)
    atomic_write(out, data)
    return worst


def _check_cuts(model: onnx.ModelProto, metadata: ModelMetadata, *, at: Sequence[object]) -> None:
    """Whether each stage can be made of the boundary before it alone. at: where the exits are, if the network tells."""
    shaped = with_shapes(model)
    for k in range(1, len(metadata.exits)):
        try:
            graph(shaped, metadata, name=f"stage_{k}")
        except ArtifactError as error:
            place = f"exit_{k - 1}" + (f" at {at[k - 1]}" if at else "")
            raise ConfigError(
                f"the network cannot be cut at {place}: {error.what}",
                fix="put this exit where nothing leads around it: at the end of a block or stage",
            ) from None


def check_parity(network: nn.Module, model: bytes, images: Array, *, names: list[str]) -> float:
    """Largest absolute difference of logits between torch and ONNX Runtime, both FP32 on the CPU."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    worst = 0.0
    for start in range(0, len(images), 32):
        batch = images[start : start + 32]
        with torch.no_grad():
            expected = network(torch.from_numpy(batch)).logits
        for k, (have, want) in enumerate(zip(session.run(None, {"images": batch}), expected)):
            difference = np.abs(have - want.numpy()).max(axis=1)
            limit = TOLERANCE * max(1.0, float(want.abs().max()))
            if not difference.max() <= limit:
                at = int(np.nanargmax(np.where(np.isfinite(difference), difference, np.inf)))
                raise GateError(
                    f"exit_{k} differs from torch by {difference[at]:.2e} on {names[start + at]} (limit {limit:.1e})",
                    fix="please report this network; nothing was written",
                )
            worst = max(worst, float(difference.max()))
    return worst
