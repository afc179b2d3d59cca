"""A test run of one backend: `python -m edgekd.runtime.self_test NAME FILE`, which `edgekd doctor` starts."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import AnyBackend, get_backend
from edgekd.child import end_with_parent
from edgekd.errors import EdgekdError
from edgekd.files import temporary_folder
from edgekd.types import Array

Precision: TypeAlias = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
"""In the order in which they are tried."""
_SIZES = (1, 2)
_WALKS = {
    "a batch of 2": (2, None),
    "a batch of 1 after it": (1, None),
    "a batch of 2 whose second image goes on": (2, [1]),
    "a batch of 2 again": (2, None),
}
"""Name to the batch size of the first stage and the rows that go on to the second. Every batch size of an engine has
kernels, a context and a CUDA graph of its own, which may disturb each other."""
_TOLERANCE = {"fp32": 1e-2, "fp16": 3e-2, "int8": 6e-2}
"""Largest error that is right, as a fraction of the largest logit: fp32 may be TF32."""
_CHANNELS, _SIDE, _CLASSES = 16, 16, 5
_INPUT_SCALE, _KERNEL_SCALE = 4 / 127, 0.25 / 127


def self_test(
    backend: AnyBackend, precisions: Sequence[Precision], *, step: Callable[[str], None] = lambda name: None
) -> tuple[str, bool]:
    """Build two stages for two batch sizes, run batches of changing size through them, and compare the logits.

    Args:
        backend: The backend, installed.
        precisions: Those to try, the first of which it must have.
        step: Called with what is done next.

    Returns:
        A line about it, and False if the backend does not work.
    """
    works, wrong, remarks = [], [], []
    for precision in precisions:
        try:
            found = _wrong(backend, precision, step)
        except EdgekdError as error:
            text = str(error).replace("\n", " ")
            if precision == precisions[0]:
                return text, False
            remarks.append(f"no {precision}: {text}")
            continue
        if found:
            wrong.append(f"{precision}: {found}")
        else:
            works.append(precision)
    facts = ", ".join(f"{key} {value}" for key, value in backend.host_facts().items())
    line = f"{backend.version()} {'gives wrong results' if wrong else 'works'}{f' on {facts}' if facts else ''}"
    more = [*wrong, *([f"right in {', '.join(works)}"] if works and len(precisions) > 1 else []), *remarks]
    return "; ".join([line, *more]), not wrong


def _wrong(backend: AnyBackend, precision: Precision, step: Callable[[str], None]) -> str:
    """Return what is wrong in this precision; empty if nothing is."""
    recipe, stages = Recipe(precision, batch_sizes=_SIZES), graphs(quantised=precision == "int8")
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, _SIDE, _SIDE)).astype(np.float32)
    want = _expected(images, quantised=precision == "int8")
    with temporary_folder("doctor") as folder:
        paths = [folder / f"stage_{k}{backend.suffix}" for k in range(len(stages))]
        for graph, path in zip(stages, paths):
            step(f"{precision}: build {path.stem}")
            backend.build(graph, path, recipe=recipe)
        step(f"{precision}: load the stages")
        start = backend.staged_runner([backend.load(path, recipe=recipe, threads=1) for path in paths])
        for name, (count, rows) in _WALKS.items():
            step(f"{precision}: {name}")
            with start(images[:count]) as run:
                got = [run.run_stage()[:count]]
                if rows:
                    run.compact(np.array(rows), len(rows))
                got.append(run.run_stage()[: len(rows or range(count))])
            for k, (logits, right) in enumerate(zip(got, (want[0][:count], want[1][rows or range(count)]))):
                off = float(np.abs(logits - right).max()) / float(np.abs(right).max())
                if not off <= _TOLERANCE[precision]:
                    return f"{name}, exit {k}: off by {100 * off:.2g} % of the largest logit"
    return ""


def _expected(images: npt.NDArray[np.float32], *, quantised: bool) -> list[Array]:
    """Return the logits of each stage."""
    logits, features = [], images
    for exit, channels in enumerate((3, _CHANNELS)):
        kernel, bias, weight = _constants(exit, channels)
        if quantised:
            features, kernel = _rounded(features, _INPUT_SCALE), _rounded(kernel, _KERNEL_SCALE)
        padded = np.pad(features, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        sums = np.einsum("nchwij,ocij->nohw", windows, kernel) + bias[:, None, None]
        features = np.maximum(sums, 0).astype(np.float32)
        logits.append(features.mean(axis=(2, 3)) @ weight)
    return logits


def _rounded(values: npt.NDArray[np.float32], scale: float) -> npt.NDArray[np.float32]:
    levels: npt.NDArray[np.float32] = np.clip(np.rint(values / np.float32(scale)), -128, 127).astype(np.float32)
    levels *= np.float32(scale)
    return levels


def _constants(exit: int, channels: int) -> list[npt.NDArray[np.float32]]:
    """Return kernel and bias of a stage's convolution, and the weights of its classifier."""
    rng = np.random.default_rng(exit + 1)
    shapes = {0.25: (_CHANNELS, channels, 3, 3), 1.0: (_CHANNELS,), 0.5: (_CHANNELS, _CLASSES)}
    return [rng.uniform(-most, most, shape).astype(np.float32) for most, shape in shapes.items()]


def graphs(*, quantised: bool) -> list[onnx.ModelProto]:
    """Return two stages: a convolution and an exit each; `quantised` with Q/DQ pairs around the convolutions."""
    return [_stage("images", 3, 0, quantised, is_last=False), _stage("stage_0", _CHANNELS, 1, quantised, is_last=True)]


def _stage(source: str, channels: int, exit: int, quantised: bool, *, is_last: bool) -> onnx.ModelProto:
    constants = zip(("kernel", "bias", "weight"), _constants(exit, channels))
    initializers = [numpy_helper.from_array(value, name) for name, value in constants]
    nodes, inputs = [], [source, "kernel"]
    if quantised:
        initializers.append(numpy_helper.from_array(np.array(0, np.int8), "zero"))
        for name, scale in ((source, _INPUT_SCALE), ("kernel", _KERNEL_SCALE)):
            initializers.append(numpy_helper.from_array(np.array(scale, np.float32), f"{name}_scale"))
            parts = (f"{name}_scale", "zero")
            nodes += [
                helper.make_node("QuantizeLinear", [name, *parts], [f"{name}_q"], name=f"{name}_q"),
                helper.make_node("DequantizeLinear", [f"{name}_q", *parts], [f"{name}_dq"], name=f"{name}_dq"),
            ]
        inputs = [f"{source}_dq", "kernel_dq"]
    features = f"stage_{exit}"
    nodes += [
        helper.make_node("Conv", [*inputs, "bias"], ["conv"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], [features], name="relu"),
        helper.make_node("GlobalAveragePool", [features], ["pool"], name="pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], name="flat"),
        helper.make_node("MatMul", ["flat", "weight"], [f"exit_{exit}"], name="classifier"),
    ]
    outputs = [helper.make_tensor_value_info(f"exit_{exit}", TensorProto.FLOAT, ["n", _CLASSES])]
    if not is_last:
        shape: list[int | str | None] = ["n", _CHANNELS, _SIDE, _SIDE]
        outputs.append(helper.make_tensor_value_info(features, TensorProto.FLOAT, shape))
    given = helper.make_tensor_value_info(source, TensorProto.FLOAT, ["n", channels, _SIDE, _SIDE])
    graph = helper.make_graph(nodes, f"stage_{exit}", [given], outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def main() -> int:
    """Test the backend named on the command line; append each step, then the result, to the file named there."""
    end_with_parent()
    name, out = sys.argv[1], Path(sys.argv[2])
    logging.basicConfig(level=logging.DEBUG, format="%(message)s")  # on stderr: what TensorRT says before a crash
    warned = _Warnings()
    logging.getLogger("edgekd").addHandler(warned)

    def tell(**row: object) -> None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    backend = get_backend(name)
    precisions = [p for p in PRECISIONS if p in backend.supported_precisions]
    line, works = self_test(backend, precisions, step=lambda step: tell(step=step))
    tell(line="; ".join([line, *dict.fromkeys(warned.texts)]), works=works)
    return 0


if __name__ == "__main__":
    sys.exit(main())
