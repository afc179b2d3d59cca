"""Q/DQ for TensorRT: where the pairs are, by hand and by rule, for every student; numbers in ONNX Runtime."""

from __future__ import annotations

import functools
import lzma
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper
from PIL import Image

from edgekd.artifacts.metadata import Exit, ModelMetadata
from edgekd.artifacts.partition import backbone, graphs, with_shapes
from edgekd.backends import onnxruntime
from edgekd.data.images import load_batch
from edgekd.data.preprocess import Preprocess
from edgekd.errors import ConfigError
from edgekd.policy import Policy
from edgekd.quantization import quantize
from edgekd.quantization.fold_batchnorm import fold_batchnorm
from edgekd.quantization.qdq import MIN_SCALE
from edgekd.quantization.tensorrt import DATA_MOVEMENT_OPS, QdqPlacement, ScaleGroups, quantize_tensorrt

SIZE = 96
SINGLE = ["resnet18", "mixnet_s", "shufflenet_v2_x1_0", "ghostnet_100", "squeezenet1_1", "mobilenet_v2"]
STUDENTS = [*SINGLE, *(f"multi-exit-{name}" for name in SINGLE), "msdnet"]


def pictures(count: int, *, seed: int) -> np.ndarray:
    """Smooth coloured fields (N, 3, 96, 96), standardised: unlike noise, they differ from one another."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 5, 5, 3), np.uint8)
    large = [Image.fromarray(s).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for s in small]
    return Preprocess(SIZE).normalised(np.stack([np.asarray(image) for image in large]))


CALIBRATION, IMAGES = pictures(16, seed=1), pictures(24, seed=2)


def run(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    runner = onnxruntime.open_graph(model.SerializeToString(), threads=1)
    parts = [runner(x[i : i + 8]) for i in range(0, len(x), 8)]
    return [np.concatenate(rows) for rows in zip(*parts)]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@functools.cache
def student(name: str, exits: tuple[str, ...] = ()) -> tuple[onnx.ModelProto, ModelMetadata]:
    """Exported for 5 classes with the usual exits, or these; random weights, and batch norm that saw pictures."""
    import torch

    from edgekd.export import to_onnx
    from edgekd.models.base import FOUR_STAGES, exits_of
    from edgekd.models.networks import build

    torch.manual_seed(0)
    net = build(name, classes=5, image_size=SIZE, exits=exits or FOUR_STAGES)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            module.momentum = None
    with torch.no_grad():
        net.train()(torch.from_numpy(CALIBRATION))
        ends = exits_of(net.eval()(torch.from_numpy(CALIBRATION[:1])))
    metadata = ModelMetadata(name, tuple("abcde"), Preprocess(SIZE), ends, Policy((1.0,) * len(ends)))
    return to_onnx(net, image_size=SIZE), metadata


@functools.cache
def quantised(name: str, heads: bool = False, exits: tuple[str, ...] = ()) -> onnx.ModelProto:
    model, metadata = student(name, exits)
    return quantize(model, metadata, CALIBRATION, target="tensorrt", heads=heads)


class Seen:
    """A graph and who makes and reads what in it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.constant = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
        values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
        self.shape = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    def all(self, kind: str) -> list[NodeProto]:
        return [node for node in self.nodes if node.op_type == kind]

    def readers(self, name: str) -> list[NodeProto]:
        return [node for node in self.nodes if name in node.input]

    def is_made_by(self, name: str, kind: str) -> bool:
        return name in self.maker and self.maker[name].op_type == kind

    def is_int8(self, name: str) -> bool:
        """Dequantised, or moved from what is."""
        made = self.maker.get(name)
        if made is None or made.op_type == "DequantizeLinear":
            return made is not None
        inputs = made.input if made.op_type == "Concat" else made.input[:1]
        return made.op_type in DATA_MOVEMENT_OPS and all(self.is_int8(name) for name in inputs)

    def scale(self, name: str) -> float:
        return float(self.constant[self.maker[name].input[1]])

    def quantised(self) -> list[NodeProto]:
        return [node for node in self.all("Conv") if self.is_made_by(node.input[1], "DequantizeLinear")]


@pytest.mark.parametrize("name", STUDENTS)
def test_form_of_every_pair(name: str) -> None:
    """Symmetric int8, FP32 scales, per-channel weights that stay in the file as float, FP32 biases, opset 17."""
    model = quantised(name)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    seen = Seen(model)
    pairs = seen.all("QuantizeLinear") + seen.all("DequantizeLinear")
    for node in pairs:
        zero, scale = seen.constant[node.input[2]], seen.constant[node.input[1]]
        assert zero.dtype == np.int8
        assert not zero.any()
        assert scale.dtype == np.float32
        assert scale.shape == zero.shape
        assert np.isfinite(scale).all()
        assert scale.min() >= MIN_SCALE
    for q in seen.all("QuantizeLinear"):
        (dq,) = seen.readers(q.output[0])
        assert dq.op_type == "DequantizeLinear"
        assert list(dq.input[1:]) == list(q.input[1:])
    for conv in seen.quantised():
        assert seen.is_made_by(conv.input[0], "DequantizeLinear")
        dq = seen.maker[conv.input[1]]
        weights = seen.constant[seen.maker[dq.input[0]].input[0]]
        assert weights.dtype == np.float32
        assert [(a.name, a.i) for a in dq.attribute] == [("axis", 0)]
        limit = np.abs(weights.reshape(len(weights), -1)).max(axis=1) / 127
        np.testing.assert_allclose(seen.constant[dq.input[1]], np.maximum(limit, MIN_SCALE), rtol=1e-6)
        assert len(conv.input) < 3 or seen.constant[conv.input[2]].dtype == np.float32
    assert not [n for n in seen.nodes if n.op_type == "QuantizeLinear" and n.input[0] in seen.maker and n.attribute]


@pytest.mark.parametrize("name", STUDENTS)
def test_which_convolutions(name: str) -> None:
    """Told apart another way: by the sizes of the maps they read."""
    model, metadata = student(name)
    seen = Seen(with_shapes(model))
    in_backbone = {node.output[0] for node in backbone(model, metadata)}
    expected = set()
    for conv in seen.all("Conv"):
        outputs, inputs = seen.constant[conv.input[1]].shape[:2]
        group = next((a.i for a in conv.attribute if a.name == "group"), 1)
        few = [c for c in (outputs, inputs) if c < 16 and c % 8]
        pays = outputs % 8 == 0 if group > 1 else not few or (few == [3] and conv.input[0] == "images")
        if pays and conv.output[0] in in_backbone and seen.shape[conv.input[0]][2:] != [1, 1]:
            expected.add(conv.output[0])
    assert {conv.output[0] for conv in Seen(quantised(name)).quantised()} == expected
    assert len(expected) >= 0.3 * len(seen.all("Conv"))


@pytest.mark.parametrize(
    ("name", "convolutions", "activations"),
    [
        # 17 read by convolutions (a stem; in 8 blocks what they start from and what is between), 3 shortcuts;
        # and both sides of the pooling, which with exits belongs to a head
        ("resnet18", 20, 22),
        ("multi-exit-resnet18", 20, 20),
        # every convolution reads something of its own; identities share; both sides of the pooling
        ("mobilenet_v2", 52, 54),
        # all but the last, which has 5 outputs. 8 fire modules: squeeze, then two that read the same; a stem.
        # Concatenated: 2 x 7, since the eighth leads to the float classifier
        ("squeezenet1_1", 25, 1 + 8 * 2 + 7 * 2),
    ],
)
def test_counted_by_hand(name: str, convolutions: int, activations: int) -> None:
    seen = Seen(quantised(name))
    assert len(seen.quantised()) == convolutions
    assert len(seen.all("QuantizeLinear")) == convolutions + activations


@pytest.mark.parametrize("name", STUDENTS)
def test_one_raw_convolution_and_one_pair_in_each_addition(name: str) -> None:
    seen, counts = Seen(quantised(name)), Counter[str]()
    floats = {n.output[0] for n in seen.nodes} - {n.output[0] for n in backbone(quantised(name), student(name)[1])}
    shapes = Seen(with_shapes(student(name)[0])).shape
    for add in seen.all("Add"):
        plain = [n.removesuffix("_dequantized") for n in add.input]
        if add.output[0] in floats or shapes.get(plain[0]) != shapes.get(plain[1]):
            assert "network/exits" in add.name
            continue
        raw = [n for n in add.input if not seen.is_int8(n)]
        if len(raw) == 2:
            assert not any(seen.maker[n] in seen.quantised() for n in raw)
            counts["float"] += 1
            continue
        for one in raw:
            conv = seen.maker[one]
            assert conv in seen.quantised()
            assert seen.readers(one) == [add]
        counts["raw" if raw else "both"] += 1
    # GhostNet adds what it concatenated: to an identity in 11 blocks, to a raw convolution in the 5 that change shape.
    # MixNet's blocks end with a concatenation, of convolutions with 12 channels in the second stage
    residual = {
        "resnet18": {"raw": 8},
        "mobilenet_v2": {"raw": 10},
        "ghostnet_100": {"raw": 5, "both": 11},
        "mixnet_s": {"raw": 1, "both": 9, "float": 1},
    }
    assert counts == residual.get(name.removeprefix("multi-exit-"), {})


def test_identities_share_and_shortcuts_get_their_own() -> None:
    seen = Seen(quantised("resnet18"))
    identity = shortcut = 0
    for add in seen.all("Add"):
        (dq,) = [seen.maker[n] for n in add.input if seen.is_int8(n)]
        others = [n for n in seen.readers(dq.output[0]) if n != add]
        if others:
            assert {n.op_type for n in others} == {"Conv"}
            identity += 1
        else:
            source = seen.maker[seen.maker[dq.input[0]].input[0]]
            assert seen.constant[seen.maker[seen.maker[source.input[1]].input[0]].input[0]].shape[2:] == (1, 1)
            shortcut += 1
    assert (identity, shortcut) == (5, 3)


@pytest.mark.parametrize("name", STUDENTS)
def test_concatenated_tensors_share_one_scale_or_are_float(name: str) -> None:
    seen, count = Seen(quantised(name)), 0
    for concat in seen.all("Concat"):
        int8 = [seen.is_made_by(n, "DequantizeLinear") for n in concat.input]
        assert all(int8) or not any(int8)
        if all(int8):
            scales = {seen.scale(n) for n in concat.input}
            readers = [r for r in seen.readers(concat.output[0]) if r.op_type == "QuantizeLinear"]
            assert len(scales | {float(seen.constant[r.input[1]]) for r in readers}) == 1
            count += 1
    # Of MixNet's 34 the others go on to swish or to 12 channels, GhostNet's other two to 36 and 60 depthwise ones
    expected = {"squeezenet1_1": 7, "shufflenet_v2_x1_0": 16, "ghostnet_100": 30, "mixnet_s": 11, "msdnet": 40}
    assert count == expected.get(name.removeprefix("multi-exit-"), 0)


@pytest.mark.parametrize("name", ["shufflenet_v2_x1_0", "mixnet_s"])
def test_what_is_only_moved_keeps_its_scale(name: str) -> None:
    """From any dequantised tensor through shuffles and splits to the next pair."""
    seen, checked = Seen(quantised(name)), 0
    for q in seen.all("QuantizeLinear"):
        at = q.input[0]
        while at in seen.maker and seen.maker[at].op_type in DATA_MOVEMENT_OPS:
            at = seen.maker[at].input[0]
            if seen.is_made_by(at, "DequantizeLinear"):
                assert seen.scale(at) == float(seen.constant[q.input[1]])
                checked += 1
                break
    assert checked or name == "mixnet_s"
    for split in seen.all("Split"):
        scales = {float(seen.constant[q.input[1]]) for n in split.output for q in seen.readers(n) if "_q" in q.name}
        assert len(scales) <= 1


@pytest.mark.parametrize("name", STUDENTS)
def test_without_its_pairs_it_is_the_float_network(name: str) -> None:
    model, stripped = fold_batchnorm(student(name)[0]), onnx.ModelProto()
    stripped.CopyFrom(quantised(name))
    nodes, source = list(stripped.graph.node), dict[str, str]()
    del stripped.graph.node[:]
    for node in nodes:
        node.input[:] = [source.get(n, n) for n in node.input]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            source[node.output[0]] = node.input[0]
        else:
            stripped.graph.node.append(node)
    assert [n.SerializeToString() for n in stripped.graph.node] == [n.SerializeToString() for n in model.graph.node]
    for have, want in zip(run(stripped, IMAGES[:8]), run(model, IMAGES[:8])):
        np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize("name", STUDENTS)
def test_all_int8_costs_little_more_than_images_of_8_bits(name: str) -> None:
    """Random weights magnify any change, so what rounding the images alone changes is the measure."""
    model, step = student(name)[0], np.abs(CALIBRATION).max() / 127
    rounded = (np.round(IMAGES / step) * step).astype(np.float32)
    for whole, images, ints in zip(run(model, IMAGES), run(model, rounded), run(quantised(name), IMAGES)):
        assert np.linalg.norm(ints - whole) < 12 * np.linalg.norm(images - whole)
        assert np.linalg.norm(ints - whole) > 0


@pytest.mark.parametrize("name", SINGLE)
def test_scales_hold_what_calibration_saw(name: str) -> None:
    """127 steps of a scale reach the largest magnitude of the tensors that share it, and no further."""
    seen, wider = Seen(quantised(name)), onnx.ModelProto()
    wider.CopyFrom(fold_batchnorm(student(name)[0]))
    inner = [q.input[0] for q in seen.all("QuantizeLinear") if not q.attribute and q.input[0] != "images"]
    wider.graph.output.extend(onnx.ValueInfoProto(name=n) for n in inner)
    largest: dict[str, float] = {}
    for tensor, values in zip(["images", *inner], [CALIBRATION, *run(wider, CALIBRATION)[1:]]):
        (q,) = (n for n in seen.readers(tensor) if n.op_type == "QuantizeLinear")
        largest[q.input[1]] = max(largest.get(q.input[1], 0), np.abs(values).max())
    assert {k: float(seen.constant[k]) for k in largest} == pytest.approx({k: v / 127 for k, v in largest.items()})


def test_the_pairs_of_onnxruntimes_own_quantiser_are_among_ours(tmp_path: Path) -> None:
    """With the options that gave the form TensorRT fuses; it knows nothing of shortcuts."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        batches = iter([{"images": CALIBRATION}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    model = student("resnet18")[0]
    options = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,
        "AddQDQPairToWeight": True,
        "DedicatedQDQPair": False,
        "OpTypesToExcludeOutputQuantization": sorted({n.op_type for n in model.graph.node}),
    }
    quantize_static(
        with_shapes(model),
        tmp_path / "theirs.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv"],
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options=options,
    )
    ours, theirs = (
        {q.input[0]: seen.constant[q.input[1]] for q in seen.all("QuantizeLinear")}
        for seen in (Seen(quantised("resnet18")), Seen(onnx.load(tmp_path / "theirs.onnx")))
    )
    more = ours.keys() - theirs.keys()
    assert theirs.keys() < ours.keys()
    assert sorted("pool" if "pool" in name else name.split("/")[-2] for name in more) == [
        *("act2", "downsample.0", "downsample.0", "downsample.0", "pool")
    ]
    for name, scale in theirs.items():
        np.testing.assert_allclose(ours[name], scale, rtol=1e-5)  # they run the network without optimising it


@pytest.mark.parametrize(
    ("name", "exits"),
    [
        ("multi-exit-resnet18", ()),
        ("multi-exit-shufflenet_v2_x1_0", ("stage2.1", "stage3.3", "final")),  # behind a shuffle, in front of a split
    ],
)
def test_stages_pass_int8_and_equal_the_whole(name: str, exits: tuple[str, ...]) -> None:
    model, metadata = quantised(name, exits=exits), student(name, exits)[1]
    parts, whole = graphs(model, metadata), run(model, IMAGES[:4])
    x = [IMAGES[:4]]
    for k, logits in enumerate(whole):
        of_stage, *x = run(parts[f"stage_{k}"], x[-1])
        np.testing.assert_array_equal(of_stage, logits)
        assert all(t.dtype == np.int8 for t in x)
        assert parts[f"stage_{k}"].graph.output[-1].name in (f"exit_{k}", f"stage_{k}_quantized")


@pytest.mark.parametrize("name", ["shufflenet_v2_x1_0", "mixnet_s"])
def test_pairs_where_moved_tensors_are_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is moved to a pair comes from one; where nothing but movement reads it, no number changes."""
    model, seen = quantised(name), Seen(quantised(name))
    for q in seen.all("QuantizeLinear"):
        at = q.input[0]
        while at in seen.maker and seen.maker[at].op_type in DATA_MOVEMENT_OPS - {"Concat", "MaxPool"}:
            at = seen.maker[at].input[0]
        assert at == q.input[0] or seen.is_made_by(at, "DequantizeLinear")
    monkeypatch.setattr(QdqPlacement, "pair_sources", lambda self, boundaries: None)
    without = quantize_tensorrt(*student(name), CALIBRATION)
    assert len(Seen(without).all("QuantizeLinear")) < len(seen.all("QuantizeLinear"))
    if name == "shufflenet_v2_x1_0":
        np.testing.assert_array_equal(run(model, IMAGES), run(without, IMAGES))


@pytest.mark.parametrize(
    ("name", "heads", "pools"),
    [
        ("multi-exit-resnet18", False, 0),
        ("multi-exit-resnet18", True, 3),  # the deepest exit pools a sum with its context
        ("multi-exit-ghostnet_100", True, 3),  # neither gates nor the deepest exit: convolutions read them
        ("mixnet_s", False, 1),
    ],
)
def test_pooling_of_heads_has_a_pair_on_both_sides(name: str, heads: bool, pools: int) -> None:
    seen = Seen(quantised(name, heads))
    found = [n for n in seen.nodes if n.op_type in ("GlobalAveragePool", "ReduceMean")]
    int8 = [n for n in found if seen.is_made_by(n.input[0], "DequantizeLinear")]
    behind = [n for n in found if [r.op_type for r in seen.readers(n.output[0])] == ["QuantizeLinear"]]
    assert int8 == behind
    assert len(int8) == pools


def test_heads_when_asked() -> None:
    name = "multi-exit-ghostnet_100"
    few, heads = Seen(quantised(name)), Seen(quantised(name, heads=True))
    more = {n.name for n in heads.quantised()} - {n.name for n in few.quantised()}
    assert all("network/exits" in n for n in more)
    assert len(more) == 12  # 3 + 2 + 1 blocks of a depthwise and a 1x1 convolution


def block(*, channels: int = 16) -> tuple[onnx.ModelProto, ModelMetadata]:
    """images -> stem (16) -> relu -> [middle -> relu -> last | shortcut] -> Add -> answer: 1x1 convolutions."""
    shape = ["n", 3, 8, 8]
    given = helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)
    answer = helper.make_tensor_value_info("exit_0", TensorProto.FLOAT, ["n", channels, 8, 8])
    sizes = {"stem": (16, 3), "middle": (16, 16), "last": (channels, 16), "shortcut": (channels, 16)}
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.normal(size=(*s, 1, 1)).astype(np.float32), k) for k, s in sizes.items()]
    wiring = [
        ("Conv", ["images", "stem"], "a"),
        ("Relu", ["a"], "b"),
        ("Conv", ["b", "middle"], "c"),
        ("Relu", ["c"], "d"),
        ("Conv", ["d", "last"], "e"),
        ("Conv", ["b", "shortcut"], "f"),
        ("Add", ["f", "e"], "exit_0"),
    ]
    nodes = [helper.make_node(kind, inputs, [output], name=output) for kind, inputs, output in wiring]
    graph = helper.make_graph(nodes, "block", [given], [answer], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    metadata = ModelMetadata("block", ("x", "y"), Preprocess(8), (Exit("exit_0", ()),), Policy((1.0,)))
    return model, metadata


def test_scale_groups() -> None:
    """a takes b's scale and, through it, c's; joining them again makes no circle."""
    groups = ScaleGroups()
    for tensor, root in (("a", "b"), ("b", "c"), ("a", "c"), ("d", "a"), ("c", "d")):
        groups.join(tensor, root)
    assert [groups.scale_root(tensor) for tensor in "abcde"] == [*"cccce"]


def test_a_block_by_hand() -> None:
    model, metadata = block()
    images = np.zeros((2, 3, 8, 8), np.float32)
    images[0, 0, 0, 0] = -2.54
    seen = Seen(quantize_tensorrt(model, metadata, images))
    paired = [q.input[0] for q in seen.all("QuantizeLinear")]
    assert paired == ["images", "stem", "b", "middle", "d", "last", "shortcut", "f"]
    assert seen.constant["images_scale"] == np.float32(2.54) / np.float32(127)
    assert [list(n.input) for n in seen.all("Add")] == [["f_dequantized", "e"]]


def test_shared_weights_have_one_pair() -> None:
    model, metadata = block()
    model.graph.node[5].input[1] = "last"  # the shortcut's
    seen = Seen(quantize_tensorrt(model, metadata, CALIBRATION[:, :, :8, :8]))
    assert [n.input[1] for n in seen.quantised()] == [f"{w}_dequantized" for w in ("stem", "middle", "last", "last")]
    assert len([q for q in seen.all("QuantizeLinear") if q.input[0] == "last"]) == 1


def test_few_channels_stay_float() -> None:
    model, metadata = block(channels=12)
    seen = Seen(quantize_tensorrt(model, metadata, CALIBRATION[:, :, :8, :8]))
    assert [n.name for n in seen.quantised()] == ["a", "c"]
    assert [list(n.input) for n in seen.all("Add")] == [["f", "e"]]


def test_dead_channels_keep_a_scale() -> None:
    model, metadata = block()
    weights = numpy_helper.to_array(model.graph.initializer[1]).copy()
    weights[3] = 0
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(weights, "middle"))
    quantised = quantize_tensorrt(model, metadata, CALIBRATION[:, :, :8, :8])
    assert Seen(quantised).constant["middle_scale"][3] == np.float16(MIN_SCALE) > 0
    assert np.isfinite(run(quantised, CALIBRATION[:, :, :8, :8])[0]).all()


def test_refusals() -> None:
    model, metadata = block()
    with pytest.raises(ConfigError, match="no calibration images"):
        quantize(model, metadata, CALIBRATION[:0], target="tensorrt", heads=False)
    with pytest.raises(ConfigError, match="Did you mean 'percentile'"):
        quantize(model, metadata, CALIBRATION[:, :, :8, :8], target="tensorrt", heads=False, method="percentil")
    for node in model.graph.node:
        node.op_type = "Conv" if node.op_type == "Conv" else node.op_type
    small, metadata = block(channels=12)
    del small.graph.node[:4], small.graph.node[1:]
    small.graph.node[0].input[0], small.graph.node[0].output[0] = "images", "exit_0"
    with pytest.raises(ConfigError, match="no convolution worth quantising"):
        quantize(small, metadata, CALIBRATION[:, :, :8, :8], target="tensorrt", heads=False)


def test_norms_behind_concatenations_are_folded() -> None:
    model = student("mixnet_s")[0]
    folded = fold_batchnorm(model)
    onnx.checker.check_model(folded, full_check=True)
    kinds = Counter(n.op_type for n in model.graph.node) - Counter(n.op_type for n in folded.graph.node)
    assert kinds == {"BatchNormalization": 34}
    (want,), (have,) = run(model, IMAGES), run(folded, IMAGES)
    np.testing.assert_allclose(have, want, atol=1e-4 * np.abs(want).max())
    assert fold_batchnorm(student("resnet18")[0]).graph.node == student("resnet18")[0].graph.node


def test_polygraphy_accepts_every_student(tmp_path: Path) -> None:
    """Its `inspect model` and `surgeon sanitize`, all in one process, which needs no TensorRT."""
    for name in STUDENTS:
        onnx.save(quantised(name), tmp_path / f"{name}.onnx")
    script = """
import sys
from polygraphy.tools._main import main
for path in sys.argv[1:]:
    for command in (["inspect", "model", path], ["surgeon", "sanitize", path, "-o", path + ".out"]):
        sys.argv = ["polygraphy", *command]
        try:
            main()
        except SystemExit as end:
            assert not end.code, (command, end.code)
"""
    paths = [str(path) for path in sorted(tmp_path.glob("*.onnx"))]
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "TensorRT" not in done.stderr
    for path in paths:
        cleaned = onnx.load(f"{path}.out")
        counts = [Counter(n.op_type for n in m.graph.node) for m in (cleaned, onnx.load(path))]
        assert counts[0]["QuantizeLinear"] == counts[1]["QuantizeLinear"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("resnet18", 0.7), ("squeezenet1_1", 0.6), ("mobilenet_v2", 0.5)])
def test_imagenet_weights_keep_their_answers(name: str, least: float, shared: Path, tmp_path: Path) -> None:
    """1000 classes on pictures of none of them: more than a rounding decides. Calibrated on other pictures."""
    from edgekd.export import to_onnx
    from edgekd.models.networks import build
    from edgekd.models.weights import load_state, read_state

    packed = shared / "weights" / f"{name}.safetensors.xz"
    (tmp_path / "w.safetensors").write_bytes(lzma.decompress(packed.read_bytes()))
    net = build(name, classes=1000, image_size=128)
    state = {k: v.float() for k, v in read_state(tmp_path / "w.safetensors").items()}
    assert not load_state(net, state, source=name).missing
    files = sorted((shared / "data" / "kather2016").glob("*/*.jpg"))[::53]
    images = load_batch(files, Preprocess(128))
    metadata = ModelMetadata(name, tuple(map(str, range(1000))), Preprocess(128), (Exit("exit_0", ()),), Policy((1.0,)))
    model = to_onnx(net, image_size=128)
    quantised = quantize_tensorrt(model, metadata, images[::3], method="entropy")
    (whole,), (ints,) = run(model, images[1::3]), run(quantised, images[1::3])
    agree = (whole.argmax(axis=1) == ints.argmax(axis=1)).mean()
    print(name, agree, len(whole), 10 * np.log10((whole**2).sum() / ((whole - ints) ** 2).sum()))
    assert agree >= least
