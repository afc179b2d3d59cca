"""ONNX classifiers of every kind become one interface with the same answers; what is not one is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from scipy.special import softmax

from edgekd.artifacts import onnx_checks
from edgekd.conversion.preprocessing import PreprocessOptions
from edgekd.conversion.source import TrainedClassifier, read_classifier
from edgekd.errors import ArtifactError, ConfigError
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


RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.normal(size=(8, 3, 3, 3)).astype(np.float32),
    "fc": RNG.normal(size=(5, 8)).astype(np.float32),
    "bias": RNG.normal(size=5).astype(np.float32),
    "shape": np.array([1, 8], np.int64),
}
TRUNK = [
    helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
    helper.make_node("Relu", ["c"], ["r"]),
    helper.make_node("GlobalAveragePool", ["r"], ["pool"]),
]
FLATTEN = helper.make_node("Flatten", ["pool"], ["flat"])
HEAD = helper.make_node("Gemm", ["flat", "fc", "bias"], ["y"], transB=1)
IMAGE = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3, 16, 16])
LOGITS = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)


def network(
    path: Path,
    nodes: list[onnx.NodeProto],
    *,
    inputs: list[onnx.ValueInfoProto] | None = None,
    outputs: list[onnx.ValueInfoProto] | None = None,
    weights: dict[str, np.ndarray] | None = None,
    opset: int = 17,
    domains: tuple[str, ...] = (),
    functions: list[onnx.FunctionProto] | None = None,
) -> Path:
    tensors = [numpy_helper.from_array(value, name) for name, value in (WEIGHTS | (weights or {})).items()]
    graph = helper.make_graph(nodes, "g", inputs or [IMAGE], outputs or [LOGITS], tensors)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=8), str(path))
    return path


def logits_by_hand(images: np.ndarray) -> np.ndarray:
    """The trunk and head above, in NumPy."""
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    maps = np.maximum(np.einsum("nchwij,ocij->nohw", windows, WEIGHTS["w"]), 0)
    return maps.mean(axis=(2, 3)) @ WEIGHTS["fc"].T + WEIGHTS["bias"]


def answers(path: Path, **options: object) -> TrainedClassifier:
    """Read a network and check its answers to two images, of which no reader has seen any."""
    found = read_classifier(path, **options)  # type: ignore[arg-type]
    images = np.random.default_rng(5).normal(size=(2, 3, 16, 16)).astype(np.float32)
    assert np.abs(found.logits(images)[:, -5:] - logits_by_hand(images)).max() < 2e-2
    return found


@pytest.mark.parametrize("opset", [11, 13, 17, onnx.defs.onnx_opset_version() - 3])
@pytest.mark.parametrize("final", ["", "Softmax", "LogSoftmax"])
def test_every_opset_and_a_final_softmax(opset: int, final: str, tmp_path: Path) -> None:
    head = helper.make_node("Gemm", ["flat", "fc", "bias"], ["z" if final else "y"], transB=1)
    last = [helper.make_node(final, ["z"], ["y"], axis=1)] if final else []
    found = answers(network(tmp_path / "n.onnx", [*TRUNK, FLATTEN, head, *last], opset=opset))
    assert found.difference == 0
    assert found.model.opset_import[0].version == max(17, opset)
    assert any(final in note for note in found.notes) or not final


def test_a_batch_size_held_by_a_reshape_is_freed(tmp_path: Path) -> None:
    one = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])
    reshape = helper.make_node("Reshape", ["pool", "shape"], ["flat"])
    found = answers(network(tmp_path / "n.onnx", [*TRUNK, reshape, HEAD], inputs=[one]))
    assert found.difference == 0
    assert any("held the batch size 1" in note for note in found.notes)


def test_a_class_token_is_repeated_for_each_image(tmp_path: Path) -> None:
    one = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])
    nodes = [
        *TRUNK[:2],
        helper.make_node("Reshape", ["r", "tokens"], ["t"]),  # (1, 8, 256)
        helper.make_node("Concat", ["token", "t"], ["joined"], axis=2),
        helper.make_node("Slice", ["joined", "one", "end", "two"], ["rest"]),
        helper.make_node("ReduceMean", ["rest"], ["flat"], axes=[2], keepdims=0),
        HEAD,
    ]
    numbers = {k: np.array([v], np.int64) for k, v in {"one": 1, "end": 257, "two": 2}.items()}
    more = {"tokens": np.array([1, 8, -1]), "token": np.zeros((1, 8, 1), np.float32), **numbers}
    assert answers(network(tmp_path / "n.onnx", nodes, inputs=[one], weights=more)).difference == 0


def test_shapes_and_conditions_are_computed_once(tmp_path: Path) -> None:
    """As the exporter of PyTorch writes `x.view(x.shape[0], -1)` and a branch on a rank."""
    out = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("a", "b")]
    branches = [
        helper.make_graph([helper.make_node("Reshape", ["pool", "s"], ["a"])], "then", [], out[:1]),
        helper.make_graph([helper.make_node("Neg", ["pool"], ["b"])], "else", [], out[1:]),
    ]
    nodes = [
        *TRUNK,
        helper.make_node("Shape", ["x"], ["dims"]),
        helper.make_node("Gather", ["dims", "zero"], ["n"]),
        helper.make_node("Concat", ["n", "minus"], ["s"], axis=0),
        helper.make_node("Size", ["dims"], ["rank"]),
        helper.make_node("Equal", ["rank", "four"], ["is_four"]),
        helper.make_node("If", ["is_four"], ["flat"], then_branch=branches[0], else_branch=branches[1]),
        HEAD,
    ]
    more = {"zero": np.array([0]), "minus": np.array([-1]), "four": np.array(4)}
    found = answers(network(tmp_path / "n.onnx", nodes, weights=more))
    assert found.difference == 0
    assert [n.op_type for n in found.model.graph.node] == [
        "Conv", "Relu", "GlobalAveragePool", "Reshape", "Gemm", "Flatten",
    ]  # fmt: skip


def test_a_float16_network_is_widened(tmp_path: Path) -> None:
    half = {k: v.astype(np.float16) for k, v in WEIGHTS.items() if k != "shape"}
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["b", 3, 16, 16])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)
    path = network(tmp_path / "n.onnx", [*TRUNK, FLATTEN, HEAD], inputs=[image], outputs=[out], weights=half)
    found = answers(path)
    assert 0 < found.difference < 0.02
    assert any("instead of float16" in n or "those in float16" in n for n in found.notes)


def test_functions_and_initializers_among_the_inputs(tmp_path: Path) -> None:
    double = helper.make_function(
        "mine", "Same", ["a"], ["o"], [helper.make_node("Identity", ["a"], ["o"])], [helper.make_opsetid("", 17)]
    )
    call = helper.make_node("Same", ["pool"], ["same"], domain="mine")
    nodes = [*TRUNK, call, helper.make_node("Flatten", ["same"], ["flat"]), HEAD]
    inputs = [IMAGE, helper.make_tensor_value_info("w", TensorProto.FLOAT, [8, 3, 3, 3])]
    assert answers(
        network(tmp_path / "n.onnx", nodes, inputs=inputs, domains=("mine",), functions=[double])
    ).difference == 0  # fmt: skip


def test_external_data_is_read_from_the_folder_alone(tmp_path: Path) -> None:
    model = onnx.load(str(network(tmp_path / "n.onnx", [*TRUNK, FLATTEN, HEAD])))
    path = tmp_path / "external.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="data.bin", size_threshold=0)
    found = answers(path)
    assert b"data.bin" not in found.model.SerializeToString()
    (tmp_path / "data.bin").rename(tmp_path / "other.bin")
    with pytest.raises(ArtifactError, match=r"keeps its weights in data\.bin, which is missing"):
        read_classifier(path)
    path.write_bytes(path.read_bytes().replace(b"data.bin", b"../d.bin"))
    with pytest.raises(ArtifactError, match=r"data outside its folder: \.\./d\.bin"):
        read_classifier(path)


def test_one_sigmoid_becomes_two_classes(tmp_path: Path) -> None:
    more = {"fc": WEIGHTS["fc"][:1], "bias": WEIGHTS["bias"][:1]}
    nodes = [*TRUNK, FLATTEN, helper.make_node("Gemm", ["flat", "fc", "bias"], ["z"], transB=1)]
    sigmoid = [*nodes, helper.make_node("Sigmoid", ["z"], ["y"])]
    path = network(tmp_path / "n.onnx", sigmoid, weights=more)
    found = read_classifier(path, classes=["benign", "malignant"])
    images = np.random.default_rng(1).normal(size=(4, 3, 16, 16)).astype(np.float32)
    expected = InferenceSession(str(path)).run(None, {"x": images})[0]
    assert softmax(found.logits(images), axis=1)[:, 1:] == pytest.approx(expected, abs=1e-6)
    out = [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    plain = network(tmp_path / "plain.onnx", nodes, weights=more, outputs=out)
    with pytest.raises(ConfigError, match="one output: a regression, or the logit"):
        read_classifier(plain)
    assert read_classifier(plain, classes=["benign", "malignant"]).difference == 0


def test_grey_images_and_averaged_probabilities(tmp_path: Path) -> None:
    grey = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 1, 16, 16])
    nodes = [
        *TRUNK,
        FLATTEN,
        helper.make_node("Gemm", ["flat", "fc", "bias"], ["z"], transB=1),
        helper.make_node("Softmax", ["z"], ["p"]),
        helper.make_node("Mean", ["p", "p"], ["y"]),
    ]
    path = network(tmp_path / "n.onnx", nodes, inputs=[grey], weights={"w": WEIGHTS["w"][:, :1]})
    found = read_classifier(path, preprocess=PreprocessOptions(mean=(0.1,), std=(0.3,)))
    assert found.preprocess.channels == "grey"
    assert found.difference < 1e-5
    images = np.random.default_rng(1).normal(size=(4, 3, 16, 16)).astype(np.float32)
    expected = InferenceSession(str(path)).run(None, {"x": images[:, :1]})[0]
    assert softmax(found.logits(images), axis=1) == pytest.approx(expected, abs=1e-6)


def test_a_quantised_network_stays_quantised(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("Conv", ["d", "w"], ["c"], pads=[1] * 4),
        *TRUNK[1:],
        FLATTEN,
        HEAD,
    ]
    more = {"scale": np.array(0.02, np.float32), "zero": np.array(128, np.uint8)}
    found = read_classifier(network(tmp_path / "n.onnx", nodes, weights=more))
    assert found.difference == 0
    assert "QuantizeLinear" in {n.op_type for n in found.model.graph.node}


def test_the_size_in_ultralytics_metadata_is_taken(tmp_path: Path) -> None:
    path = network(tmp_path / "n.onnx", PLAIN, inputs=[float_value("x", ["b", 3, "h", "w"])])
    model = onnx.load(str(path))
    helper.set_model_props(model, {"author": "Ultralytics", "imgsz": "[24, 24]"})
    onnx.save(model, str(path))
    found = read_classifier(path)
    assert found.image_size == 24
    assert any("24 pixels" in note for note in found.notes)
    assert read_classifier(path, preprocess=PreprocessOptions(image_size=16)).image_size == 16


def float_value(name: str, shape: list[object] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


PLAIN = [*TRUNK, FLATTEN, HEAD]
BAD: dict[str, tuple[dict[str, object], str]] = {
    "two inputs": ({"nodes": [*PLAIN, helper.make_node("Add", ["age", "age"], ["o"])],
                    "inputs": [IMAGE, float_value("age", ["b", 1])]}, r"2 inputs: x float \(b, 3, 16, 16\), age"),
    "text": ({"nodes": [helper.make_node("Cast", ["x"], ["y"], to=1)],
              "inputs": [helper.make_tensor_value_info("x", TensorProto.INT64, ["b", "tokens"])]}, "takes text"),
    "detector": ({"nodes": [*TRUNK[:2], helper.make_node("Reshape", ["r", "boxes"], ["y"])],
                  "weights": {"boxes": np.array([0, 8, 256])}}, r"\('n', 8, 256\).* a detector"),
    "image to image": ({"nodes": [TRUNK[0], helper.make_node("Relu", ["c"], ["y"])]}, "from image to image"),
    "several outputs": ({"nodes": PLAIN, "outputs": [LOGITS, float_value("flat", None)]}, "2 outputs: y float"),
    "sequence": ({"nodes": [*PLAIN, helper.make_node("SequenceConstruct", ["y"], ["s"])],
                  "outputs": [helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None)]},
                 "s is sequence, not a tensor"),
    "foreign": ({"nodes": [*TRUNK, FLATTEN, helper.make_node("FusedGemm", ["flat", "fc", "bias"], ["y"],
                           domain="com.microsoft", transB=1)], "domains": ("com.microsoft",)}, "FusedGemm"),
    "unknown operator": ({"nodes": [*PLAIN[:-1], helper.make_node("Gemmm", ["flat", "fc"], ["y"])]}, "Gemmm"),
    "not square": ({"nodes": PLAIN, "inputs": [float_value("x", ["b", 3, 16, 24])]}, "16 x 24 pixels"),
    "any size": ({"nodes": PLAIN, "inputs": [float_value("x", ["b", 3, "h", "w"])]}, "images of any size"),
    "four planes": ({"nodes": PLAIN, "inputs": [float_value("x", ["b", 4, 16, 16])]}, "neither 1 nor 3 channels"),
    "several labels": ({"nodes": [*TRUNK, FLATTEN, helper.make_node("Gemm", ["flat", "fc", "bias"], ["z"], transB=1),
                                  helper.make_node("Sigmoid", ["z"], ["y"])]}, "several may apply"),
    "over the batch": ({"nodes": [*PLAIN[:-1], helper.make_node("Gemm", ["flat", "fc", "bias"], ["z"], transB=1),
                                  helper.make_node("ReduceMean", ["z"], ["m"], axes=[0]),
                                  helper.make_node("Sub", ["z", "m"], ["y"])]}, "three images at once"),
    "random": ({"nodes": [*PLAIN[:-1], helper.make_node("Gemm", ["flat", "fc", "bias"], ["z"], transB=1),
                          helper.make_node("RandomNormalLike", ["z"], ["e"]),
                          helper.make_node("Add", ["z", "e"], ["y"])]}, "draws random numbers"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_image_classifier_is_named(kind: str, tmp_path: Path) -> None:
    settings, match = BAD[kind]
    path = network(tmp_path / "n.onnx", **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=match) as error:
        read_classifier(path)
    assert str(path) in error.value.what
    assert error.value.fix


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "cat\ndog\nfish\nbird\ncow\n"),
        ("classes.json", '["cat", "dog", "fish", "bird", "cow"]'),
        ("labels.json", '{"4": "cow", "3": "bird", "2": "fish", "1": "dog", "0": "cat"}'),
        ("config.json", '{"id2label": {"0": "cat", "1": "dog", "2": "fish", "3": "bird", "4": "cow"}}'),
    ],
)
def test_class_names_from_files(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    path = network(tmp_path / "n.onnx", PLAIN)
    assert read_classifier(path, classes=tmp_path / name).classes == ("cat", "dog", "fish", "bird", "cow")


def test_class_names_of_the_network_and_wrong_ones(tmp_path: Path) -> None:
    path = network(tmp_path / "n.onnx", PLAIN)
    model = onnx.load(str(path))
    model.metadata_props.add(key="names", value="{0: 'crane', 1: 'crane', 2: 'c', 3: 'd', 4: 'e'}")
    model.metadata_props.add(key="author", value="Ultralytics")
    onnx.save(model, str(path))
    found = read_classifier(path)
    assert found.classes == ("crane (0)", "crane (1)", "c", "d", "e")
    assert any("'ultralytics' is assumed" in note for note in found.notes)
    with pytest.raises(ConfigError, match="has 4 class names, the network 5 classes; a class for the background"):
        read_classifier(path, classes=list("abcd"))
    (tmp_path / "bad.json").write_text('{"a": "b"}')
    with pytest.raises(ConfigError, match=r"bad\.json holds no class names: its keys are not the indices"):
        read_classifier(path, classes=tmp_path / "bad.json")


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no ONNX file at"):
        read_classifier(tmp_path / "none.onnx")
    path = network(tmp_path / "n.onnx", PLAIN)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match="not a complete ONNX file"):
        read_classifier(path)
