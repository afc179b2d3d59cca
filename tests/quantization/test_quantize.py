"""Quantised graphs: same inputs, outputs and boundaries, close to the float network, right for a CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from edgekd.artifacts.metadata import Exit, ModelMetadata, read_onnx
from edgekd.artifacts.partition import backbone, graphs
from edgekd.artifacts.recipe import Recipe
from edgekd.backends import onnxruntime
from edgekd.backends.base import AnyBackend, find_backend
from edgekd.backends.runner import CompiledGraph
from edgekd.data.preprocess import Preprocess
from edgekd.errors import ConfigError
from edgekd.export import to_onnx
from edgekd.models.networks import SingleExit
from edgekd.policy import Policy
from edgekd.quantization import QUANTIZERS, quantize
from edgekd.runtime.engine import Engine, open_engine

IMAGES = np.random.default_rng(1).normal(size=(8, 3, 32, 32)).astype(np.float32)


def run(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    return onnxruntime.open_graph(model.SerializeToString(), threads=1)(x)


@pytest.fixture(scope="module")
def quantised(student_onnx: Path) -> dict[bool, onnx.ModelProto]:
    model, metadata = read_onnx(student_onnx)
    return {heads: quantize(model, metadata, IMAGES, target="cpu", heads=heads) for heads in (True, False)}


def quantised_convolutions(model: onnx.ModelProto) -> int:
    from_q = {o for n in model.graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    return sum(n.op_type == "Conv" and n.input[1] in from_q for n in model.graph.node)


def test_heads_are_quantised_or_float(student_onnx: Path, quantised: dict[bool, onnx.ModelProto]) -> None:
    model, metadata = read_onnx(student_onnx)
    in_backbone = Counter(n.op_type for n in backbone(model, metadata))["Conv"]
    assert in_backbone == 20  # ResNet18: a stem, 16 in blocks, 3 on shortcuts
    assert quantised_convolutions(quantised[False]) == in_backbone
    # 22 more: an attention in each of 4 heads, and 3 + 2 + 1 + 0 bottlenecks of 3
    assert quantised_convolutions(quantised[True]) == in_backbone + 4 + 18


@pytest.mark.parametrize("heads", [True, False])
def test_close_to_float(student_onnx: Path, quantised: dict[bool, onnx.ModelProto], heads: bool) -> None:
    model, _ = read_onnx(student_onnx)
    for have, want in zip(run(quantised[heads], IMAGES), run(model, IMAGES)):
        assert np.abs(have - want).max() <= 0.1 * np.abs(want).max()


def test_activations_uint8_weights_int8_per_channel(quantised: dict[bool, onnx.ModelProto]) -> None:
    graph = quantised[True].graph
    values = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    assert {values[n.input[2]].dtype for n in graph.node if n.op_type == "QuantizeLinear"} == {np.dtype(np.uint8)}
    weights = [
        n
        for n in graph.node
        if n.op_type == "DequantizeLinear" and values.get(n.input[0], IMAGES[0, 0]).ndim == 4 and n.input[0] in values
    ]
    assert len(weights) == 42
    for node in weights:
        assert values[node.input[0]].dtype == np.int8
        assert len(values[node.input[1]]) == len(values[node.input[0]])


def test_stages_pass_uint8_and_equal_the_whole_bit_for_bit(
    student_onnx: Path, quantised: dict[bool, onnx.ModelProto]
) -> None:
    _, metadata = read_onnx(student_onnx)
    parts = graphs(quantised[True], metadata)
    whole, x = run(parts["monolithic"], IMAGES), [IMAGES]
    for k in range(4):
        x = run(parts[f"stage_{k}"], x[-1])
        assert np.array_equal(x[0], whole[k])
        assert k == 3 or x[1].dtype == np.uint8
    assert np.array_equal(run(parts["final"], IMAGES)[0], whole[3])


def products() -> tuple[onnx.ModelProto, np.ndarray]:
    """A convolution of 32 channels whose sums of two products leave 16 bits, and what comes of a pixel of 255."""
    weight = np.array([[127, 127, -k, -k] * 8 for k in range(97, 127, 4)], np.int8)
    scales = [numpy_helper.from_array(np.float32(s), n) for n, s in (("a", 1.0), ("w", 2.0**-6), ("out", 2.0**4))]
    zero = [numpy_helper.from_array(np.uint8(z), n) for n, z in (("zero", 0), ("middle", 128))]
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "a", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "a", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["weight", "w"], ["v"]),
        helper.make_node("Conv", ["x", "v"], ["y"]),
        helper.make_node("QuantizeLinear", ["y", "out", "middle"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "out", "middle"], ["logits"]),
    ]
    images = helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["n", 32, 4, 4])
    logits = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", 8, 4, 4])
    constants = [*scales, *zero, numpy_helper.from_array(weight[:, :, None, None], "weight")]
    graph = helper.make_graph(nodes, "products", [images], [logits], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model, 16 * np.rint(255 * weight.sum(axis=1, dtype=np.float64) * 2.0**-10)


def test_sums_of_8_bit_products_are_exact() -> None:
    """On every CPU: without VNNI they would saturate but for a session entry."""
    model, want = products()
    assert np.array_equal(run(model, np.full((1, 32, 4, 4), 255, np.float32))[0][0, :, 1, 1], want)


@pytest.mark.usefixtures("without_vnni")
def test_without_vnni_weights_are_unsigned(tmp_path: Path) -> None:
    """Where kernels for unsigned numbers run, which do not saturate."""
    onnxruntime._session(products()[0].SerializeToString(), threads=1, optimised=tmp_path / "o.onnx")
    graph = onnx.load(tmp_path / "o.onnx").graph
    (node,) = (n for n in graph.node if n.op_type == "QLinearConv")
    assert next(i for i in graph.initializer if i.name == node.input[3]).data_type == onnx.TensorProto.UINT8


QUICK = ["multi-exit-shufflenet_v2_x1_0", "multi-exit-tf_mobilenetv3_small_100"]
"""Channel shuffle; squeeze-excite and hard swish."""
SLOW = [
    "multi-exit-mixnet_s",
    "multi-exit-ghostnet_100",
    "multi-exit-mobilenet_v2",
    "multi-exit-squeezenet1_1",
    "multi-exit-resnet18",
    "multi-exit-resnet50",
    "multi-exit-densenet121",
    "scan-resnet18",
    "msdnet",
]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_every_student_in_int8(name: str, exported: Callable[[str], Any], tmp_path: Path) -> None:
    """Stages and whole agree to the bit, and with the float network on most images. The deepest exit of a library's
    network is its own classifier, so that the plain network is in it."""
    path, _, cells = exported(name)
    model, metadata = read_onnx(path)
    want = open_engine(path, threads=1).logits(cells)
    recipe = Recipe("int8", options={"openvino": {"static_batch_sizes": (1,)}})
    for backend in (find_backend("onnxruntime"), find_backend("openvino")):
        reduced = backend.reduces_range()
        whole = quantize(model, metadata, cells[::4], target="cpu", heads=True, reduce_range=reduced)
        parts = graphs(whole, metadata)
        engine = Engine(metadata, loader(backend, recipe, parts, tmp_path), backend=backend, recipe=recipe, threads=1)
        have = engine.logits(cells, batch_size=1)
        assert np.array_equal(engine.staged_logits(cells[:5], batch_size=1), have[:, :5])
        same = [(of_image(a) == of_image(b)).mean() for a, b in zip(have, want)]
        assert min(same) >= 0.7, (backend.name, same)


def loader(
    backend: AnyBackend, recipe: Recipe, parts: dict[str, onnx.ModelProto], folder: Path
) -> Callable[[str], CompiledGraph]:
    def load(name: str) -> CompiledGraph:
        file = folder / f"{name}{backend.suffix}"
        backend.build(parts[name], file, recipe=recipe)
        return backend.load(file, recipe=recipe, threads=1)

    return load


def of_image(logits: np.ndarray) -> np.ndarray:
    """The class that an image (N, C) is nearest to; chance weights have one that leads on all images."""
    return (logits - logits.mean(axis=0)).argmax(axis=1)


def test_relu6_ends_the_range_of_what_it_clips() -> None:
    """Without it in the 8-bit graph, numbers far above 6 would stretch the steps between those that count."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ]
    nn.init.constant_(layers[0].bias, 60.0)
    model = to_onnx(SingleExit(nn.Sequential(*layers)), image_size=32)
    metadata = ModelMetadata("relu6", tuple("abcde"), Preprocess(32), (Exit("exit_0", ()),), Policy((1.0,)))
    clipped = quantize(model, metadata, IMAGES, target="cpu", heads=True)
    values = {i.name: onnx.numpy_helper.to_array(i) for i in clipped.graph.initializer}
    scales = [float(values[n.input[1]]) for n in clipped.graph.node if n.op_type == "QuantizeLinear"]
    assert not [n for n in clipped.graph.node if n.op_type == "Clip"]
    assert any(scale == pytest.approx(6 / 255) for scale in scales)
    assert max(scales) < 0.1


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_other_calibration_methods(student_onnx: Path, method: str) -> None:
    model, metadata = read_onnx(student_onnx)
    other = quantize(model, metadata, IMAGES[:2], target="cpu", heads=True, method=method)
    assert np.abs(run(other, IMAGES)[3] - run(model, IMAGES)[3]).max() <= 0.5 * np.abs(run(model, IMAGES)[3]).max()


def test_no_images_and_unknown_targets_and_methods_are_refused(student_onnx: Path) -> None:
    model, metadata = read_onnx(student_onnx)
    with pytest.raises(ConfigError, match="no calibration images"):
        quantize(model, metadata, IMAGES[:0], target="cpu", heads=True)
    with pytest.raises(ConfigError, match="Did you mean 'cpu'"):
        quantize(model, metadata, IMAGES, target="cpus", heads=True)
    for target in QUANTIZERS:
        with pytest.raises(ConfigError, match="Did you mean 'minmax'"):
            quantize(model, metadata, IMAGES, target=target, heads=True, method="minmx")
