"""A trained network to student.onnx: one plain ONNX file that is checked against the network it came from."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxsim
import torch
from torch import Tensor, nn

from edgekd.artifact import Card, Exit, atomic_write, put_card
from edgekd.errors import GateError
from edgekd.models.multi_exit import Outputs
from edgekd.runtime.preprocess import Array

OPSET = 17
"""TensorRT 8.6 (JetPack 6.0) reads no newer one."""
TOLERANCE = 1e-4


class _Flat(nn.Module):
    """Outputs as a flat tuple: every exit's logits, then every boundary."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out: Outputs = self.network(x)
        return (*out.logits, *out.maps)


def exits_of(count: int, maps: int) -> tuple[Exit, ...]:
    """The tensor names of `count` exits; networks without maps have no boundary to cut at."""
    return tuple(Exit(f"exit_{k}", f"stage_{k}" if k < maps else "") for k in range(count))


def to_onnx(network: nn.Module, *, image_size: int) -> onnx.ModelProto:
    """Opset 17, dynamic batch `n`, simplified, checked. Boundaries keep their names as inner tensors.

    Torch's older exporter is used on purpose: the newer one writes opset 18 and cannot come down to 17.
    """
    network.eval()
    example = torch.zeros(2, 3, image_size, image_size)
    with torch.no_grad():
        out: Outputs = network(example)
    names = [name for e in exits_of(len(out.logits), len(out.maps)) for name in (e.output, e.boundary)]
    names = names[::2] + [n for n in names[1::2] if n]
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


def export(network: nn.Module, card: Card, *, out: Path, images: Array, names: list[str]) -> float:
    """Write student.onnx and return the largest difference of logits from torch on `images`.

    images: (N, 3, H, W), real ones; names: what to call each in an error.

    Raises:
        GateError: an exit differs by more than 1e-4 on an image; both are named and nothing is written.
    """
    model = to_onnx(network, image_size=card.preprocess.image_size)
    put_card(model, card)
    data = model.SerializeToString()
    worst = check_parity(network, data, images, names=names)
    atomic_write(out, data)
    return worst


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
            if not difference.max() <= TOLERANCE:
                at = int(np.nanargmax(np.where(np.isfinite(difference), difference, np.inf)))
                raise GateError(
                    f"exit_{k} differs from torch by {difference[at]:.2e} on {names[start + at]} (limit {TOLERANCE})",
                    fix="please report this network; nothing was written",
                )
            worst = max(worst, float(difference.max()))
    return worst
