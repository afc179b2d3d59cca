"""What NVIDIA's real parser and builder make of edgekd's graphs: TensorRT-RTX, which needs no GPU to build.

`make test-tensorrt` has every network; here are two. The engines are not run: that needs a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.real_builder import RECIPES, builds, exported, int8_nodes, quantised, real_builder, target, wheels  # noqa: F401
from onnx import helper

from edgekd.artifacts.partition import graphs
from edgekd.backends.tensorrt.builder import Plan, build_plan
from edgekd.backends.tensorrt.graph_passes import is_boundary, without_new_operators, without_qdq
from edgekd.backends.tensorrt.layers import precision_of_nodes, precisions
from edgekd.errors import BackendError

pytestmark = [pytest.mark.network, pytest.mark.usefixtures("real_builder")]
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def shufflenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Depthwise and grouped convolutions, channels that are split and shuffled."""
    return exported("multi-exit-shufflenet_v2_x1_0", tmp_path_factory.mktemp("shufflenet"))


@pytest.fixture(params=["resnet18", "shufflenet"])
def student(request: pytest.FixtureRequest, student_onnx: Path, shufflenet: Path) -> Path:
    return student_onnx if request.param == "resnet18" else shufflenet


def ends(plan: Plan) -> dict[str, tuple[tuple[int, ...], str, str]]:
    """Boundary tensors, with the suffix of the profile, as the engine's layers read or write them."""
    found = {}
    for tensor in (t for layer in plan.layers for t in (*layer.inputs, *layer.outputs)):
        names = {v.name for v in (*plan.graph.graph.input, *plan.graph.graph.output)}
        name = tensor.name.partition(" [profile")[0]
        if name in names and is_boundary(name):
            found[tensor.name] = (tensor.shape, tensor.precision, tensor.format)
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_graph_is_built_as_asked(student: Path, recipe: str) -> None:
    plans = builds(quantised(student, RECIPES[recipe]), RECIPES[recipe])
    assert list(plans) == ["stage_0", "stage_1", "stage_2", "stage_3", "monolithic", "final"]
    for name, plan in plans.items():
        assert len(plan.data) > 1000
        wanted = int8_nodes(plan.graph)
        assert precision_of_nodes(plan.layers, wanted) == dict.fromkeys(wanted, "int8"), name
        others = set(precisions(plan.layers)) - ({"int8"} if wanted else set())
        assert others <= {"fp16" if "fp16" in recipe else "fp32"}, name
    assert bool(int8_nodes(plans["monolithic"].graph)) == recipe.startswith("int8")
    for before, after in (("stage_0", "stage_1"), ("stage_1", "stage_2"), ("stage_2", "stage_3")):
        written = {name: end for name, end in ends(plans[before]).items() if name not in read_by(plans[before])}
        read = {name: end for name, end in ends(plans[after]).items() if name in read_by(plans[after])}
        assert written == read != {}
        assert all("linear" in layout for _, _, layout in read.values())


def read_by(plan: Plan) -> set[str]:
    """Boundary tensors that are inputs of the graph, with the suffix of the profile."""
    inputs = {value.name for value in plan.graph.graph.input}
    return {name for name in ends(plan) if name.partition(" [profile")[0] in inputs}


def test_graphs_for_a_dla_are_built(student_onnx: Path) -> None:
    """With Q/DQ pairs, as TensorRT 11 takes them, and with ranges in their place."""
    recipe = RECIPES["int8-fp16"]
    subject = quantised(student_onnx, recipe, target="dla")
    graph = graphs(*subject)["stage_1"]
    plan = build_plan(graph, name="stage_1", target=target(recipe))
    assert set(precision_of_nodes(plan.layers, int8_nodes(plan.graph)).values()) == {"int8"}
    floats, _ = without_qdq(graph)
    assert set(precisions(build_plan(floats, name="stage_1", target=target(recipe)).layers)) <= {"fp16", "fp32"}


def test_graphs_for_tensorrt_8_5_are_built(student_onnx: Path) -> None:
    graph = without_new_operators(graphs(*quantised(student_onnx, RECIPES["fp16"]))["stage_1"])
    assert build_plan(graph, name="stage_1", target=target(RECIPES["fp16"])).data


def test_progress_rises_to_the_end(student_onnx: Path) -> None:
    told: list[float] = []
    graph = graphs(*quantised(student_onnx, RECIPES["fp16"]))["stage_3"]
    build_plan(graph, name="stage_3", target=target(RECIPES["fp16"]), progress=told.append)
    assert told == sorted(set(told))
    assert told[-1] == 1
    assert len(told) > 20


def test_the_parser_names_node_and_operator(student_onnx: Path) -> None:
    graph = graphs(*quantised(student_onnx, RECIPES["fp32"]))["stage_3"]
    last = graph.graph.node[-1]
    last.output[0], name = "logits", last.output[0]
    graph.graph.node.append(helper.make_node("Det", ["logits"], [name], name="odd one"))
    with pytest.raises(BackendError, match=r"cannot read stage_3[\s\S]*node 'odd one' \(Det\)"):
        build_plan(graph, name="stage_3", target=target(RECIPES["fp32"]))


INTERRUPTED = """
import logging, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from helpers.real_builder import RECIPES, quantised, target
from edgekd.artifacts.partition import graphs
from edgekd.backends.tensorrt.builder import build_plan

class Press(logging.Handler):
    "Ctrl-C while TensorRT logs, where exceptions are swallowed, behind the given part of the build."
    def emit(self, record):
        if shares and shares[-1] > float(sys.argv[3]) and not pressed:
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
shares, pressed = [], []
logger = logging.getLogger("edgekd.backends.tensorrt.library")
graph = graphs(*quantised(Path(sys.argv[2]), RECIPES["fp16"]))["monolithic"]
logger.addHandler(Press())
logger.setLevel(logging.DEBUG)
logger.propagate = False
try:
    build_plan(graph, name="monolithic", target=target(RECIPES["fp16"]), progress=shares.append)
except KeyboardInterrupt:
    print("ended at", shares[-1], "pressed", pressed)
else:
    print("built", shares[-1], "pressed", pressed)
"""


@pytest.mark.parametrize("at", ["0.01", "0.5"])
def test_ctrl_c_ends_a_build(student_onnx: Path, at: str) -> None:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    command = [sys.executable, "-c", INTERRUPTED, str(wheels()), str(student_onnx), at]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.stdout.startswith("ended at "), done.stdout + done.stderr
    assert float(done.stdout.split()[2]) < 1
    assert "Exception" not in done.stderr
