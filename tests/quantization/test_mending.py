"""What brings a quantised network nearer to the float one: equalised channels, corrected biases, blocks in float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgekd.artifacts.metadata import ModelMetadata, read_onnx
from edgekd.backends.onnxruntime import open_graph
from edgekd.quantization import QUANTIZERS, quantize
from edgekd.quantization.bias_correction import correct_biases
from edgekd.quantization.blocks import blocks
from edgekd.quantization.calibration import run_tensors
from edgekd.quantization.equalization import HEADROOM, equalize
from edgekd.testing.students import small_student

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(16, 3, 16, 16)).astype(np.float32)


@pytest.fixture
def student(tmp_path: Path) -> tuple[onnx.ModelProto, ModelMetadata]:
    return read_onnx(small_student(tmp_path / "student.onnx"))


def uneven(activation: str) -> onnx.ModelProto:
    """A convolution whose channels differ by a factor of 1,000, a depthwise one, and a pointwise one."""
    channels, c = 16, helper.make_node
    scale = np.logspace(-3, 0, channels, dtype=np.float32)
    weights = {
        "w0": RNG.normal(size=(channels, 3, 3, 3)).astype(np.float32) * scale[:, None, None, None],
        "b0": (scale * 0.1).astype(np.float32),
        "w1": RNG.normal(size=(channels, 1, 3, 3)).astype(np.float32),
        "b1": np.zeros(channels, np.float32),
        "w2": (RNG.normal(size=(5, channels, 1, 1)) / scale[:, None, None]).astype(np.float32),
        "low": np.float32(0),
        "high": np.float32(6),
    }
    limits = ["low", "high"] if activation == "Clip" else []
    nodes = [
        c("Conv", ["images", "w0", "b0"], ["x0"], kernel_shape=[3, 3]),
        c(activation, ["x0", *limits], ["y0"]),
        c("Conv", ["y0", "w1", "b1"], ["x1"], kernel_shape=[3, 3], group=channels),
        c(activation, ["x1", *limits], ["y1"]),
        c("Conv", ["y1", "w2"], ["x2"], kernel_shape=[1, 1]),
        c("GlobalAveragePool", ["x2"], ["p"]),
        c("Flatten", ["p"], ["exit_0"]),
    ]
    images = helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["n", 3, 16, 16])
    logits = helper.make_tensor_value_info("exit_0", onnx.TensorProto.FLOAT, ["n", 5])
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "uneven", [images], [logits], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def largest(model: onnx.ModelProto, tensor: str) -> np.ndarray:
    return np.max([batch[tensor].max(axis=(0, 2, 3)) for batch in run_tensors(model, [tensor], IMAGES)], axis=0)


def logits(model: onnx.ModelProto) -> np.ndarray:
    return np.stack(open_graph(model.SerializeToString(), threads=1)(IMAGES))


def test_equalised_channels_compute_the_same() -> None:
    model = uneven("Relu")
    equalized = equalize(model, IMAGES)
    assert np.allclose(logits(equalized), logits(model), rtol=1e-3, atol=1e-4)
    before, after = (largest(m, "y0") for m in (model, equalized))
    assert before.max() / before.min() > 100
    assert after.max() / after.min() < 10
    assert after.max() == pytest.approx(before.max(), rel=1e-3)


def test_a_relu6_clips_what_it_clipped() -> None:
    model = uneven("Clip")
    equalized = equalize(model, IMAGES)
    assert np.allclose(logits(equalized), logits(model), rtol=1e-3, atol=1e-3)
    before, after = (largest(m, "y0") for m in (model, equalized))
    clipped = before * HEADROOM >= 6
    assert clipped.any()
    assert np.array_equal(after[clipped], before[clipped])
    assert (after[~clipped] <= 6 / HEADROOM * 1.001).all()
    assert after.min() > 10 * before.min()


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_corrected_biases_have_no_mean_error(student: tuple[onnx.ModelProto, ModelMetadata], target: str) -> None:
    model, metadata = student
    quantised = quantize(model, metadata, IMAGES, target=target, heads=False)  # pairs in heads add errors of their own
    corrected = correct_biases(model, quantised, IMAGES)
    want = logits(model)
    before, after = (np.abs((logits(m) - want).mean(axis=1)).max() for m in (quantised, corrected))
    assert after < 0.5 * before


@pytest.mark.parametrize("target", QUANTIZERS)
def test_blocks_stay_float(student: tuple[onnx.ModelProto, ModelMetadata], target: str) -> None:
    """Each convolution is in one block; left in float, its weights and what it reads have no pair of their own."""
    model, metadata = student
    found = blocks(model, metadata)
    convolutions = {node.output[0] for node in model.graph.node if node.op_type == "Conv"}
    in_blocks = [name for block in found for name in block.outputs if name in convolutions]
    assert sorted(in_blocks) == sorted(convolutions)
    for block in found:
        quantised = quantize(model, metadata, IMAGES, target=target, heads=True, floats=block.outputs)
        floats = {constant.name for constant in model.graph.initializer}
        unpaired = {n.name for n in quantised.graph.node if n.op_type == "Conv" and n.input[1] in floats}
        ours = {n.name for n in model.graph.node if n.op_type == "Conv" and n.output[0] in block.outputs}
        assert ours <= unpaired


def test_a_layer_in_float_between_others_runs_in_float(student: tuple[onnx.ModelProto, ModelMetadata]) -> None:
    """ONNX Runtime would quantise its weights by itself, with one scale for all channels."""
    model, metadata = student
    name = next(node.output[0] for node in model.graph.node if node.name == "left")
    quantised = quantize(model, metadata, IMAGES, target="cpu", heads=True, floats={name})
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    exact = onnxruntime.InferenceSession(quantised.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert np.abs(np.stack(exact.run(None, {"images": IMAGES})) - logits(quantised)).max() < 1e-3
