"""The ncnn backend: conformance, what it refuses, and that nothing of ncnn's and pnnx's laxness gets through."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.cli import edgekd
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edgekd.artifacts.metadata import read_student
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.ncnn import NcnnBackend, _sixteen_bit_float
from edgekd.compiler.build import compile_engine
from edgekd.errors import BackendError
from edgekd.testing import check_backend

pytest.importorskip("ncnn", reason="ncnn is not installed: pip install 'edgekd[ncnn]'")
if importlib.util.find_spec("pnnx") is None:
    pytest.skip("pnnx is not installed: pip install 'edgekd[ncnn]'", allow_module_level=True)

NCNN = NcnnBackend()
FP32, FP16 = Recipe("fp32"), Recipe("fp16")
SHAPE = (3, 8, 8)


def convolution(output: str = "exit_0", *, channels: int = 4, groups: int = 1) -> tuple[onnx.NodeProto, np.ndarray]:
    weight = np.random.default_rng(1).normal(size=(channels, 3 // groups, 3, 3)).astype(np.float32)
    node = helper.make_node("Conv", ["images", "w"], [output], name="/stem/Conv", pads=[1] * 4, group=groups)
    return node, weight


def network(*nodes: onnx.NodeProto, **weights: np.ndarray) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", *SHAPE])],
        [helper.make_tensor_value_info("exit_0", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def test_conformance(tmp_path: Path) -> None:
    assert check_backend(NCNN, tmp_path) == {"fp32": "", "fp16": ""}


def test_sixteen_bits_are_read_back_and_not_inferred_from_the_recipe(tmp_path: Path) -> None:
    node, w = convolution()
    NCNN.build(network(node, w=w), tmp_path / "m.param", recipe=FP16)
    assert NCNN.precisions(tmp_path / "m.param", recipe=FP16) == {_sixteen_bit_float(): 1}
    assert NCNN.precisions(tmp_path / "m.param", recipe=FP32) == {"fp32": 1}


@pytest.mark.parametrize("recipe", [FP32, FP16], ids=lambda r: r.name)
def test_compile_and_predict(recipe: Recipe, two_maps_onnx: Path, tmp_path: Path) -> None:
    engine, picture = tmp_path / "s.engine", tmp_path / "cell.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    words = ["--backend", "ncnn", "--recipe", recipe.name, "--set", "batch_sizes=[1]", "--out", engine]
    assert f"recipe {recipe.name}, runs " in edgekd("compile", two_maps_onnx, *words)
    (expected,), (found,) = (json.loads(edgekd("predict", path, picture, "--json")) for path in (two_maps_onnx, engine))
    tolerance = 1e-5 if recipe is FP32 else 0.01
    assert found["probabilities"] == pytest.approx(expected["probabilities"], abs=tolerance)
    file = engine / "stage_0.bin"
    file.write_bytes(file.read_bytes()[:-4])
    assert "stage_0.bin" in edgekd("predict", engine, picture, code=1)


def test_an_engine_of_the_other_16_bit_float_is_refused(two_maps_onnx: Path, tmp_path: Path) -> None:
    """As on a board with the other one: the accuracy was checked in the float that the manifest names."""
    recipe = Recipe("fp16", batch_sizes=(1,))
    manifest, _ = compile_engine(
        read_student(two_maps_onnx), tmp_path / "e", recipe=recipe, backend="ncnn", validation=None
    )
    assert NCNN.incompatibility(manifest) == ""
    other = "bf16" if _sixteen_bit_float() == "fp16" else "fp16"
    assert f"runs in {other}" in NCNN.incompatibility(dataclasses.replace(manifest, precision={other: 1.0}))


def test_int8_is_refused_with_the_backends_that_have_it() -> None:
    with pytest.raises(BackendError, match="ncnn has no int8 kernels") as caught:
        NCNN.check_supports(Recipe("int8"))
    assert "--backend onnxruntime" in caught.value.fix


@pytest.mark.parametrize("op", ["Hardmax", "IsNaN", "NonZero"])
def test_unknown_layers_are_named(op: str, tmp_path: Path) -> None:
    """pnnx succeeds with them."""
    node, w = convolution("c")
    made = "exit_0" if op == "Hardmax" else "o"
    cast = [] if op == "Hardmax" else [helper.make_node("Cast", ["o"], ["exit_0"], to=1)]
    model = network(node, helper.make_node(op, ["c"], [made], name="/head/odd"), *cast, w=w)
    with pytest.raises(BackendError, match=rf"{op} \(/head/odd\)"):
        NCNN.build(model, tmp_path / "m.param", recipe=FP32)
    assert not list(tmp_path.iterdir())


def test_a_crash_of_pnnx_is_an_error(tmp_path: Path) -> None:
    node, w = convolution("c")
    top = helper.make_node("TopK", ["c", "k"], ["exit_0", "i"], axis=1)
    with pytest.raises(BackendError, match="pnnx cannot convert the network"):
        NCNN.build(network(node, top, w=w, k=np.array([2])), tmp_path / "m.param", recipe=FP32)
    assert not list(tmp_path.iterdir())


def test_without_pnnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    node, w = convolution()
    with pytest.raises(BackendError, match="pnnx, which converts") as caught:
        NCNN.build(network(node, w=w), tmp_path / "m.param", recipe=FP32)
    assert "edgekd[ncnn]" in caught.value.fix


@pytest.mark.skipif(platform.machine() != "x86_64", reason="a fault of ncnn's x86 kernels")
def test_grouped_convolutions_in_16_bits_are_refused(tmp_path: Path) -> None:
    """They give garbage. Depthwise ones have kernels of their own."""
    node, w = convolution(channels=6, groups=3)
    NCNN.build(network(node, w=w), tmp_path / "m.param", recipe=FP32)
    with pytest.raises(BackendError, match="grouped convolutions such as /stem/Conv"):
        NCNN.build(network(node, w=w), tmp_path / "h.param", recipe=FP16)
    node, w = convolution(channels=3, groups=3)
    NCNN.build(network(node, w=w), tmp_path / "d.param", recipe=FP16)


def test_a_wrong_amount_of_weights_is_an_error(tmp_path: Path) -> None:
    """ncnn's own reader of memory reads beyond the end."""
    node, w = convolution()
    param, weights = tmp_path / "m.param", tmp_path / "m.bin"
    NCNN.build(network(node, w=w), param, recipe=FP32)
    whole = weights.read_bytes()
    for data in (whole[:-4], whole + b"1234"):
        weights.write_bytes(data)
        with pytest.raises(BackendError, match="ncnn cannot load"):
            NCNN.load(param, recipe=FP32, threads=1)


def test_rows_of_another_shape_are_refused(tmp_path: Path) -> None:
    """ncnn reads beyond their end."""
    node, w = convolution()
    NCNN.build(network(node, w=w), tmp_path / "m.param", recipe=FP32)
    runner = NCNN.load(tmp_path / "m.param", recipe=FP32, threads=1)
    for shape in ((1, 3, 4, 4), (1, 2, 8, 8), SHAPE):
        with pytest.raises(BackendError, match=r"takes rows of \[\(3, 8, 8\)\]"):
            runner(np.zeros(shape, np.float32))


def test_layers_that_work_in_place_leave_the_input_alone(tmp_path: Path) -> None:
    NCNN.build(network(helper.make_node("Relu", ["images"], ["exit_0"])), tmp_path / "m.param", recipe=FP32)
    x = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    before = x.copy()
    (output,) = NCNN.load(tmp_path / "m.param", recipe=FP32, threads=1)(x)
    assert np.array_equal(x, before)
    assert np.array_equal(output, np.maximum(before, 0))


def test_ncnn_is_imported_without_torch_and_the_environment_stays() -> None:
    """In a process of its own: a build, after which neither torch nor pnnx is imported and OMP_WAIT_POLICY is unset."""
    code = (
        "import os, sys; from pathlib import Path; from edgekd.backends.ncnn import NcnnBackend\n"
        "from edgekd.runtime.doctor import _try; assert _try(NcnnBackend())[1]\n"
        "print('ncnn' in sys.modules, {'torch', 'pnnx'} & sys.modules.keys(), 'OMP_WAIT_POLICY' in os.environ)"
    )
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "set()", "False"]
