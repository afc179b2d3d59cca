"""ONNX classifiers of every kind become one interface with the same answers; what is not one is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgekd.artifacts import onnx_checks
from edgekd.conversion.preprocessing import PreprocessOptions
from edgekd.conversion.source import read_classifier
from edgekd.errors import ConfigError
from edgekd.testing.students import IMAGE_SIZE, small_student


def test_the_interface_is_edgekds(tmp_path: Path) -> None:
    path = small_student(tmp_path / "three exits.onnx")
    with pytest.raises(ConfigError, match=r"3 outputs: exit_0 float \(n, 5\), exit_1") as error:
        read_classifier(path)
    assert "--output" in error.value.fix
    found = read_classifier(path, output="exit_2", classes=list("abcde"))
    assert (found.classes, found.image_size, found.difference) == (tuple("abcde"), IMAGE_SIZE, 0)
    onnx_checks.check_interface(found.model, image_size=IMAGE_SIZE, outputs=["logits"], classes=5)
    images = np.random.default_rng(0).normal(size=(4, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    assert found.logits(images).shape == (4, 5)


def test_nhwc_uint8_probabilities_of_one_image(tmp_path: Path) -> None:
    inner = onnx.load(str(small_student(tmp_path / "inner.onnx")))
    shape = [1, IMAGE_SIZE, IMAGE_SIZE, 3]
    before = [
        helper.make_node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["planes"], ["images"], to=TensorProto.FLOAT),
    ]
    after = [helper.make_node("Softmax", ["exit_2"], ["p"], axis=1)]
    graph = helper.make_graph(
        [*before, *inner.graph.node, *after],
        "g",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, [1, 5])],
        list(inner.graph.initializer),
    )
    path = tmp_path / "tf.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    found = read_classifier(path)
    assert found.difference == 0
    assert found.classes == tuple(f"class_{i}" for i in range(5))
    assert (found.preprocess.scale, found.preprocess.mean) == (1.0, (0.0, 0.0, 0.0))
    assert not {"Cast", "Transpose", "Softmax"} & {node.op_type for node in found.model.graph.node}
    with pytest.raises(ConfigError, match="takes pixels 0"):
        read_classifier(path, preprocess=PreprocessOptions(mean=(0.5,), std=(0.5,)))
