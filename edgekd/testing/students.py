"""A small multi-exit network for tests, made without a training framework."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from edgekd.artifacts.metadata import Exit, ModelMetadata, put_metadata
from edgekd.data.preprocess import Preprocess
from edgekd.policy import Policy
from edgekd.types import Array

IMAGE_SIZE = 16
CLASSES = tuple("abcde")


def small_student(path: Path, *, seed: int = 0) -> Path:
    """Write a student.onnx with three exits, residual additions, and a boundary of two tensors.

    Args:
        path: File to write.
        seed: Seed of the random weights.

    Returns:
        `path`.
    """
    network = _Network(seed)
    nodes = [
        network.conv("stem", "images", "s", channels=(3, 16), stride=2),
        helper.make_node("Relu", ["s"], ["stage_0"], name="relu0"),
        *network.head(0, "stage_0", channels=16),
        network.conv("left", "stage_0", "c", channels=(16, 16)),
        helper.make_node("Add", ["c", "stage_0"], ["d"], name="add"),
        helper.make_node("Relu", ["d"], ["stage_1_0"], name="relu1"),
        network.conv("down", "stage_1_0", "e", channels=(16, 32), stride=2),
        helper.make_node("Relu", ["e"], ["stage_1_1"], name="relu2"),
        *network.head(1, "stage_1_1", channels=32),
        network.conv("last", "stage_1_0", "f", channels=(16, 32), stride=2),
        helper.make_node("Add", ["f", "stage_1_1"], ["g"], name="add2"),
        helper.make_node("Relu", ["g"], ["stage_2"], name="relu3"),
        *network.head(2, "stage_2", channels=32),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, IMAGE_SIZE, IMAGE_SIZE])],
        [helper.make_tensor_value_info(f"exit_{k}", TensorProto.FLOAT, ["n", len(CLASSES)]) for k in range(3)],
        [numpy_helper.from_array(value, name) for name, value in network.weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    boundaries = (("stage_0",), ("stage_1_0", "stage_1_1"), ("stage_2",))
    exits = tuple(Exit(f"exit_{k}", boundary) for k, boundary in enumerate(boundaries))
    put_metadata(model, ModelMetadata("small", CLASSES, Preprocess(IMAGE_SIZE), exits, Policy((1.0,) * 3, (0.26, 0.3))))
    onnx.save(model, str(path))
    return path


class _Network:
    """Nodes with random weights."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.weights: dict[str, Array] = {}

    def conv(self, name: str, x: str, y: str, *, channels: tuple[int, int], stride: int = 1) -> NodeProto:
        before, after = channels
        weight = self._rng.normal(size=(after, before, 3, 3), scale=(2 / (9 * before)) ** 0.5)
        self.weights[f"{name}_w"] = weight.astype(np.float32)
        self.weights[f"{name}_b"] = self._rng.normal(size=after, scale=0.1).astype(np.float32)
        inputs, strides = [x, f"{name}_w", f"{name}_b"], [stride] * 2
        return helper.make_node("Conv", inputs, [y], name=name, kernel_shape=[3, 3], pads=[1] * 4, strides=strides)

    def head(self, k: int, x: str, *, channels: int) -> list[NodeProto]:
        self.weights[f"fc{k}_w"] = self._rng.normal(size=(len(CLASSES), channels)).astype(np.float32)
        self.weights[f"fc{k}_b"] = np.zeros(len(CLASSES), np.float32)
        inputs = [f"flat{k}", f"fc{k}_w", f"fc{k}_b"]
        return [
            helper.make_node("GlobalAveragePool", [x], [f"pool{k}"], name=f"pool{k}"),
            helper.make_node("Flatten", [f"pool{k}"], [f"flat{k}"], name=f"flat{k}"),
            helper.make_node("Gemm", inputs, [f"exit_{k}"], name=f"fc{k}", transB=1),
        ]
