"""What a real TensorRT told on a real GPU: edgekd reads it rightly, and the fakes speak as it does."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes.machine import Box, compiled, recipe

from edgekd.backends.tensorrt import layers
from edgekd.backends.tensorrt.backend import inspector_report
from edgekd.backends.tensorrt.options import tensorrt_target
from edgekd.backends.tensorrt.runner import TensorRTRunner

GOLDEN = Path(__file__).parents[1] / "fakes" / "golden"


@pytest.fixture(scope="module")
def h100() -> dict[str, Any]:
    """multi-exit-resnet18 as fp16, by TensorRT 8.6.0 on an H100."""
    found: dict[str, Any] = json.loads((GOLDEN / "tensorrt-8.6.0-h100-fp16.json").read_text())
    return found


def test_precisions_of_real_engines(h100: dict[str, Any]) -> None:
    """20 convolutions of ResNet18, 9 + 6 + 3 of the heads, an attention a head, and the Gemms of all but the last.

    That one, and each attention's transform, are inside layers of Myelin's, which name no weights.
    """
    counts = {}
    for name, graph in h100["graphs"].items():
        first = [layer for layer in graph["layers"] if "[profile" not in layer["Name"]]
        found = layers.precisions(layers.from_inspector(json.dumps({"Layers": first})))
        counts[name] = len(found)
        assert set(found) <= {"fp16", "fp32"}
    assert counts == {"stage_0": 16, "stage_1": 13, "stage_2": 10, "stage_3": 6, "monolithic": 45, "final": 21}
    found = layers.precisions(layers.from_inspector(json.dumps({"Layers": h100["graphs"]["monolithic"]["layers"]})))
    shares = {name: found.count(name) / len(found) for name in found}
    assert shares == pytest.approx(h100["precisions_of_monolithic"])


@pytest.mark.parametrize(
    ("recipe", "counts"),
    [
        ("fp32", {"fp32": 15}),
        ("fp16", {"fp16": 15}),
        ("int8", {"int8": 11, "fp32": 4}),
        ("int8-fp16", {"int8": 22, "fp16": 6}),
    ],
)
def test_precisions_in_the_newer_compilers_words(recipe: str, counts: dict[str, int]) -> None:
    """The second stage of multi-exit-resnet18, as the builder of TensorRT-RTX lists it: five convolutions of ResNet18,
    six of the head and its attention, and three matrix products in generated code. The last has two batch sizes, and
    the compiler merged layers of one.
    """
    found = layers.from_log((GOLDEN / f"tensorrt-rtx-1.7.1-{recipe}.txt").read_text())
    assert Counter(layers.precisions(found)) == counts
    kinds = {layer.kind for layer in found}
    assert {"correlation", "kgen"} <= kinds
    conv = "/network/layer2/layer2.0/conv1/Conv"  # generated code that adds its bias names it, too
    assert layers.precision_of_nodes(found, [conv, "/none"]) == {conv: recipe.split("-")[0]}


def test_a_multiplication_that_only_a_generated_layer_names() -> None:
    """TensorRT 10 and 11 compile small layers into code of their own; a report may also lack what is needed."""
    weights = {"Name": "w", "Dimensions": [8, 4], "Datatype": "Half", "Format": "Row major"}
    images = {"Name": "x", "Dimensions": [1, 8], "Format/Datatype": "Float"}
    rows = [
        {
            "Name": "fc",
            "LayerType": "kgen",
            "Inputs": [images],
            "Constants": [weights],
            "Metadata": "[ONNX Layer: /fc/Gemm]",
        },
        {"Name": "act", "LayerType": "kgen", "Inputs": [images], "Constants": [], "Metadata": "[ONNX Layer: /fc/Gemm]"},
        {"Name": "c", "LayerType": "gemm", "Metadata": "[ONNX Layer: /c/MatMul]\x1e[ONNX Layer: /c/Add]", "Inputs": []},
        "a name alone",
    ]
    found = layers.from_inspector(json.dumps({"Layers": rows}))
    assert layers.precisions(found) == [None, "fp16"]
    assert found[2].nodes == ("/c/MatMul", "/c/Add")
    with pytest.raises(ValueError, match="no layers"):
        layers.from_inspector('{"Layer": []}')


def test_boundaries_are_linear(h100: dict[str, Any]) -> None:
    """What lies between stages has no vectors of channels, so its bytes are its shape's; whatever is around it has."""
    formats: dict[str, set[str]] = {"boundary": set(), "inside": set()}
    for graph in h100["graphs"].values():
        for tensor in (t for layer in graph["layers"] for t in (*layer["Inputs"], *layer["Outputs"])):
            name = tensor["Name"].partition(" [profile")[0]
            formats["boundary" if name in graph["dtypes"] else "inside"].add(tensor["Format/Datatype"])
    assert formats["boundary"] == {"Row major linear FP32", "Row major linear FP16 format"}
    assert "Channel major FP16 format where channel % 8 == 0" in formats["inside"]


def test_the_fake_speaks_as_the_real_inspector(
    box: Callable[..., Box], h100: dict[str, Any], small_student: Path, tmp_path: Path
) -> None:
    box("8.6")
    asked = recipe("fp16", batch_sizes=(1, 4))
    compiled(small_student, tmp_path / "student.engine", asked)
    report = inspector_report(TensorRTRunner(tmp_path / "student.engine" / "stage_1.plan", tensorrt_target(asked)))
    ours = json.loads(report)["Layers"]
    real = h100["graphs"]["stage_1"]["layers"]
    known = [layer for graph in h100["graphs"].values() for layer in graph["layers"]]

    def words(found: list[dict[str, Any]]) -> set[tuple[str, Any, Any]]:
        types = [(x["LayerType"], x.get("ParameterType"), (x.get("Weights") or {}).get("Type")) for x in found]
        return {t for t in types if t[2]} | {(t[0], None, None) for t in types}

    assert words(ours) <= words(known)
    assert {t["Format/Datatype"] for x in ours for t in x["Inputs"]} <= {
        t["Format/Datatype"] for x in known for t in x["Inputs"]
    }
    for found in (ours, real):  # the second profile's layers follow the first's, and their tensors are named so, too
        second = [x for x in found if "[profile 1]" in x["Name"]]
        assert found[-len(second) :] == second
        assert all(t["Name"].endswith(" [profile 1]") for x in second for t in x["Inputs"])
        assert not any("[profile 0]" in x["Name"] for x in found)
