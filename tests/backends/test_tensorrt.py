"""The TensorRT layer from student.onnx to answers, on fakes of four versions that keep the real rules.

No GPU is involved: the fakes run the graphs in ONNX Runtime. What TensorRT makes of a graph, and how fast, only a GPU
tells: benchmarks/gpu.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fakes.cuda import Cuda
from fakes.machine import BUCKETS, IMAGES, RNG, Box, compiled, engine_of, policies, recipe, surest
from fakes.tensorrt import FAMILIES
from onnx import TensorProto, helper, numpy_helper

from edgekd.artifacts.metadata import read_onnx
from edgekd.artifacts.partition import graphs
from edgekd.backends.base import find_backend
from edgekd.backends.cuda.device import device
from edgekd.backends.cuda.device_tensor import moves
from edgekd.backends.tensorrt.builder import _monitor, build_plan, timing_cache, timing_cache_path
from edgekd.backends.tensorrt.graph_passes import to_fp16, without_new_operators, without_qdq
from edgekd.backends.tensorrt.library import TENSORRT
from edgekd.backends.tensorrt.options import tensorrt_target
from edgekd.errors import ArtifactError, BackendError, DataError, GateError
from edgekd.policy import Policy
from edgekd.runtime import doctor
from edgekd.runtime.classifier import Classifier
from edgekd.runtime.engine import open_engine
from edgekd.runtime.self_test import PRECISIONS, self_test


def test_moves_by_hand() -> None:
    assert list(moves([0, 1, 2])) == []
    assert list(moves([0, 3, 4, 9])) == [(1, 3, 2), (3, 9, 1)]
    assert list(moves([1, 2, 3])) == [(0, 1, 1), (1, 2, 1), (2, 3, 1)]  # one apart, so one at a time


def test_moves_bring_any_rows_to_the_front() -> None:
    for _ in range(200):
        count = int(RNG.integers(1, 40))
        rows = np.flatnonzero(RNG.random(count) < RNG.random())
        x = np.arange(count)
        for to, source, size in moves(rows.tolist()):
            assert to + size <= source
            x[to : to + size] = x[source : source + size]
        assert x[: len(rows)].tolist() == rows.tolist()


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "int8-fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compile_open_and_answer(
    box: Callable[..., Box], family: str, name: str, small_student: Path, tmp_path: Path
) -> None:
    machine = box(family)
    manifest = compiled(small_student, tmp_path / "student.engine", recipe(name))
    assert manifest.backend_version == machine.trt.__version__
    reported = manifest.host.backends["tensorrt"]
    assert (reported["gpu"], reported["sm"]) == ("Orin", "8.7")
    expected = {"fp32": {"fp32": 1}, "fp16": {"fp16": 1}}.get(name)
    assert manifest.precision == expected or (manifest.precision["int8"] == pytest.approx(4 / 7))
    assert ("fp16" in manifest.precision) == ("fp16" in name)
    engine = open_engine(tmp_path / "student.engine")
    assert engine.name == f"tensorrt {name}"
    want = open_engine(small_student, threads=1).logits(IMAGES)
    limit = {"fp32": 1e-4, "fp16": 2e-2}.get(name, 0.1) * np.abs(want).max()
    for got in (engine.logits(IMAGES), engine.staged_logits(IMAGES)):
        assert np.abs(got - want).max() <= limit
    host = [engine.stage(0)(IMAGES[:3])]
    host += [engine.stage(1)(*host[0][1:])]
    assert np.abs(host[1][0] - want[1, :3]).max() <= limit
    seam = {"fp32": np.float32, "fp16": np.float16}.get(name, np.int8)
    assert {x.dtype.type for x in host[0][1:]} == {seam}


@pytest.mark.parametrize("family", FAMILIES)
def test_how_the_types_are_asked_for(box: Callable[..., Box], family: str, small_student: Path, tmp_path: Path) -> None:
    machine = box(family)
    compiled(small_student, tmp_path / "fp16.engine", recipe("fp16"))
    compiled(small_student, tmp_path / "int8.engine", recipe("int8"))
    compiled(small_student, tmp_path / "fp32.engine", recipe("fp32"))
    count = len(machine.trt.built) // 3
    flags = [{f.name for f in config._flags} for _, config in machine.trt.built]
    strong = {network._strong for network, _ in machine.trt.built}
    assert strong == {family in ("10.16", "11.4")}
    asked = [set(), set(), set()] if strong == {True} else [{"FP16"}, {"INT8"}, set()]
    assert [f & {"FP16", "INT8"} for f in (flags[0], flags[count], flags[-1])] == asked
    assert ["TF32" in f for f in (flags[0], flags[-1])] == [True, False]


def test_profiles_and_scratch(box: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    machine = box("10.3")
    machine.cuda.total = 4 << 30
    compiled(
        small_student,
        tmp_path / "e.engine",
        recipe(options={"tensorrt": {"workspace_share": 0.25, "optimization_level": 5}}),
    )
    _, config = machine.trt.built[0]
    assert [p._shapes["images"] for p in config._profiles] == [((n, 3, 16, 16),) * 3 for n in BUCKETS]
    assert config.builder_optimization_level == 5
    assert next(iter(config._pools.values())) == pytest.approx(1 << 30, rel=0.01)


@pytest.mark.parametrize(
    ("trouble", "size"), [({"wrong_profile": 0}, 1), ({"wrong_profile": 1}, 2), ({"forgets": True}, 8)]
)
def test_every_batch_size_is_checked_also_after_the_others(
    box: Callable[..., Box], trouble: dict[str, Any], size: int, small_student: Path, tmp_path: Path
) -> None:
    box("8.6")
    parity = compiled(small_student, tmp_path / "student.engine", recipe("fp16", max_accuracy_drop=0.5)).parity
    assert parity is not None
    assert [turn.size for turn in parity.by_batch_size] == [8, 4, 2, 1, 2, 4, 8]
    box("8.6", **trouble)
    with pytest.raises(GateError, match=rf"^in batches of {size}: tensorrt fp16 loses too much accuracy on 20 "):
        compiled(small_student, tmp_path / "other.engine", recipe("fp16", max_accuracy_drop=0.5))


def test_libraries_can_be_left_out(box: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    for family, excluded in (("8.6", {"CUBLAS", "CUBLAS_LT", "CUDNN"}), ("11.4", set())):
        machine = box(family)
        compiled(small_student, tmp_path / "e.engine", recipe(options={"tensorrt": {"library_tactics": False}}))
        sources = machine.trt.built[0][1].get_tactic_sources()
        assert {s.name for s in machine.trt.TacticSource if not sources >> int(s) & 1} == excluded


@pytest.mark.parametrize("family", FAMILIES)
def test_cascade_answers_as_onnx_runtime_does(
    box: Callable[..., Box], family: str, small_student: Path, tmp_path: Path
) -> None:
    box(family)
    engine, reference = engine_of(small_student, tmp_path), open_engine(small_student, threads=1)
    for policy in policies(reference.logits(IMAGES)):
        want = Classifier(reference, policy=policy).run(IMAGES)
        ours = Classifier(engine, policy=policy)
        for batches in ([20], [1] * 20, [3, 8, 5, 4]):
            start = np.cumsum([0, *batches])
            found = [ours.run(IMAGES[a:b]) for a, b in itertools.pairwise(start)]
            assert np.concatenate([f.exits for f in found]).tolist() == want.exits.tolist()
            assert np.concatenate([f.probabilities for f in found]) == pytest.approx(want.probabilities, abs=1e-5)
            assert np.concatenate([f.confidence for f in found]) == pytest.approx(want.confidence, abs=1e-5)


def test_a_stage_is_a_launch_a_copy_and_a_wait(box: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    cuda = box("10.16").cuda
    engine = engine_of(small_student, tmp_path)
    stays = Classifier(engine, policy=Policy((1.0,) * 3, (1.0, 1.0)))  # could exit early, and does not
    stays.run(IMAGES[:4])  # makes and captures what is needed
    before = cuda.launches, cuda.syncs, cuda.plain
    del cuda.copied[:]
    stays.run(IMAGES[:4])
    assert (cuda.launches, cuda.syncs, cuda.plain) == (before[0] + 3, before[1] + 3, before[2])
    assert cuda.copied == ["in"]  # the logits' copies are in the graphs; features go nowhere


def test_survivors_are_gathered_on_the_device(box: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    cuda = box("10.16").cuda
    engine, reference = engine_of(small_student, tmp_path), open_engine(small_student, threads=1)
    assert engine.manifest is not None
    proportional = {str(n): (float(n),) * 3 for n in BUCKETS}  # so that smaller batches pay
    engine.manifest = dataclasses.replace(engine.manifest, stage_ms=proportional)
    first = surest(reference.logits(IMAGES[:8])[0])
    stays = np.flatnonzero(first < np.sort(first)[2:4].mean()).tolist()  # 3 of 8, who need a batch of 4
    ours = Classifier(engine, policy=Policy((1.0,) * 3, (float(np.sort(first)[2:4].mean()), 2.0)))
    ours.run(IMAGES[:8])
    del cuda.copied[:]
    found = ours.run(IMAGES[:8])
    assert np.flatnonzero(found.exits == 2).tolist() == stays
    assert cuda.copied == ["in", *["within"] * len(list(moves(stays)))]
    want = Classifier(reference, policy=ours.policy).run(IMAGES[:8])
    assert found.probabilities == pytest.approx(want.probabilities, abs=1e-5)


def test_threads_share_an_engine(box: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    box("10.3")
    engine, reference = engine_of(small_student, tmp_path), open_engine(small_student, threads=1)
    policy = policies(reference.logits(IMAGES))[-1]
    ours, want = Classifier(engine, policy=policy), Classifier(reference, policy=policy).run(IMAGES)
    whole = reference.logits(IMAGES)

    def one(i: int) -> tuple[int, bool]:
        at = i % 20
        exits = ours.run(IMAGES[at : at + 1]).exits[0]
        return int(exits), bool(np.allclose(engine.logits(IMAGES[at : at + 1])[:, 0], whole[:, at], atol=1e-4))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(80))) == [(int(want.exits[i % 20]), True) for i in range(80)]


def test_large_batches_are_cut_for_a_graph_and_refused_by_a_walk(
    box: Callable[..., Box], small_student: Path, tmp_path: Path
) -> None:
    box("10.3")
    engine = engine_of(small_student, tmp_path)
    want = open_engine(small_student, threads=1).logits(IMAGES)
    assert engine.monolithic(IMAGES)[0] == pytest.approx(want[0], abs=1e-4)  # 20 of at most 8
    outside = r"batch of 20 is outside the profiles of stage_0: 1, 2, 4, 8[\s\S]*8, 20\]"
    with pytest.raises(BackendError, match=outside), engine.staged_runner()(IMAGES) as run:
        run.run_stage()
    with pytest.raises(DataError, match=r"float32 \(2, 3, 8, 8\) is outside the profiles[\s\S]*\(N, 3, 16, 16\)"):
        engine.monolithic(np.zeros((2, 3, 8, 8), np.float32))
    with pytest.raises(DataError, match="float64"):
        engine.monolithic(IMAGES.astype(np.float64))


def test_version_and_hardware_compatible_engines(box: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    out, want = tmp_path / "student.engine", open_engine(small_student, threads=1).logits(IMAGES)
    box("10.3")
    options = {"tensorrt": {"version_compatible": True, "hardware_compatible": True}}
    compiled(small_student, out, recipe(options=options))
    cuda = Cuda()
    cuda.sm = (8, 9)
    box("11.4", cuda=cuda)
    assert open_engine(out).logits(IMAGES) == pytest.approx(want, abs=1e-4)
    box("8.6")
    with pytest.raises(ArtifactError, match=r"10\.3\.0; this machine has 8\.6\.1"):  # not backwards
        open_engine(out)
    cuda = Cuda()
    cuda.sm = (7, 5)
    box("10.3", cuda=cuda)
    with pytest.raises(ArtifactError, match=r"SM 7\.5"):
        open_engine(out)


def test_stages_run_alone_before_they_are_linked(box: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    box("10.3")
    engine, want = engine_of(small_student, tmp_path), open_engine(small_student, threads=1).logits(IMAGES)
    _, *xs = engine.stage(0)(IMAGES[:4])
    assert engine.stage(1)(*xs)[0] == pytest.approx(want[1, :4], abs=1e-4)  # has its own inputs
    assert engine.staged_logits(IMAGES) == pytest.approx(want, abs=1e-4)  # and now the first stage's outputs
    assert engine.stage(1)(*xs)[0] == pytest.approx(want[1, :4], abs=1e-4)


def test_weights_left_out_and_put_in_again(box: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    stripped = recipe("fp16", options={"tensorrt": {"strip_weights": True}})
    box("8.6")
    with pytest.raises(BackendError, match=r"8\.6\.1 lacks strip_weights: 10\.0"):
        compiled(small_student, tmp_path / "old.engine", stripped)
    box("10.16")
    manifest = compiled(small_student, tmp_path / "student.engine", stripped)
    assert {"stage_0.onnx", "stage_0.plan"} <= manifest.files.keys()
    want = open_engine(small_student, threads=1).logits(IMAGES)
    assert open_engine(tmp_path / "student.engine").logits(IMAGES) == pytest.approx(want, abs=2e-2)


@pytest.mark.parametrize("family", ["8.5", "8.6", "10.3"])
def test_dla(box: Callable[..., Box], family: str, small_student: Path, tmp_path: Path) -> None:
    asked = recipe("int8-fp16", batch_sizes=(1,), options={"tensorrt": {"dla_core": 0}})
    box(family)
    with pytest.raises(BackendError, match=r"no DLA core 0: TensorRT[\s\S]*finds 0[\s\S]*int8-fp16"):
        compiled(small_student, tmp_path / "e.engine", asked)
    machine = box(family, dla_cores=2)
    manifest = compiled(small_student, tmp_path / "e.engine", asked)
    network, config = machine.trt.built[0]
    assert {n.op_type for n in network._model.graph.node}.isdisjoint({"QuantizeLinear", "DequantizeLinear"})
    assert network.get_input(0).shape == (1, 3, 16, 16)
    assert network.get_input(0)._range[1] == pytest.approx(np.abs(IMAGES).max(), rel=1e-5)
    assert (config.DLA_core, "GPU_FALLBACK" in {f.name for f in config._flags}) == (0, True)
    assert manifest.precision["int8"] > 0.2
    engine = open_engine(tmp_path / "e.engine")
    assert engine.name == "tensorrt dla-int8"
    assert engine.staged_logits(IMAGES) == pytest.approx(open_engine(small_student, threads=1).logits(IMAGES), abs=2e-2)
    with pytest.raises(BackendError, match="onnxruntime has no DLA"):
        compiled(small_student, tmp_path / "cpu.engine", asked, backend="onnxruntime")


def test_timing_cache(
    box: Callable[..., Box], small_student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:

    machine = box("10.3")
    compiled(small_student, tmp_path / "e.engine", recipe())
    path = timing_cache_path(TENSORRT)
    assert path.is_relative_to(tmp_path / "cache")
    assert path.name == "Orin-sm8.7-10.3.0.timing"
    everything = machine.trt.built[-1][1].create_timing_cache(path.read_bytes())._kernels
    assert {"Conv:s", "Gemm:exit_2"} <= everything
    del machine.trt.built[:]
    compiled(small_student, tmp_path / "e.engine", recipe())
    assert everything <= machine.trt.built[0][1]._cache._kernels
    path.write_bytes(b"nonsense")
    compiled(small_student, tmp_path / "e.engine", recipe())
    assert "damaged, or from another TensorRT" in caplog.text
    assert machine.trt.built[-1][1].create_timing_cache(path.read_bytes())._kernels == everything
    config = machine.trt.Builder(TENSORRT.logger).create_builder_config()
    with timing_cache(config, tensorrt_target(recipe())):  # a build, while another one ends
        other = config.create_timing_cache(b"")
        other._kernels = {"other"}
        path.write_bytes(other.serialize())
    assert config.create_timing_cache(path.read_bytes())._kernels == {"other", *everything}
    path.unlink()
    compiled(small_student, tmp_path / "e.engine", recipe(options={"tensorrt": {"timing_cache": False}}))
    assert not path.exists()


@pytest.mark.parametrize("family", ["8.5", "10.3"])
def test_progress(box: Callable[..., Box], family: str, small_student: Path, tmp_path: Path) -> None:
    box(family)
    seen: list[tuple[float, int]] = []
    compiled(small_student, tmp_path / "e.engine", recipe(), progress=lambda done, total: seen.append((done, total)))
    shares = [done for done, _ in seen]
    assert shares == sorted(shares)
    assert seen[-1] == (100, 100)
    assert (len(set(shares)) > 10) == (family != "8.5")  # below 10, there is no progress monitor


def _monitor_of(box: Callable[..., Box], told: list[float], received: list[int]) -> Any:
    box("10.3")
    with device():
        return _monitor(told.append, TENSORRT, received)


def test_progress_is_told_as_tensorrt_has_it(box: Callable[..., Box]) -> None:
    """As TensorRT-RTX 1.7.1 reports: of six steps it takes five, and one is over before the phase in it is."""
    told: list[float] = []
    monitor = _monitor_of(box, told, [])
    monitor.phase_start("Building engine", None, 6)
    for step in range(5):
        monitor.phase_start("Inner", "Building engine", 2)
        assert monitor.step_complete("Inner", 0)
        assert monitor.step_complete("Building engine", step)
        assert monitor.step_complete("Inner", 1)
        monitor.phase_finish("Inner")
    monitor.phase_finish("Building engine")
    assert monitor.step_complete("Never begun", 3)
    monitor.phase_finish("Never begun")
    assert told == sorted(set(told))
    assert told[-1] <= 1


def test_progress_comes_from_many_threads(box: Callable[..., Box]) -> None:
    told: list[float] = []
    monitor = _monitor_of(box, told, [])
    monitor.phase_start("Building engine", None, 8)

    def work(number: int) -> bool:
        going = True
        for turn in range(200):
            name = f"Tactics {number % 4}"  # two threads have a phase of the same name
            monitor.phase_start(name, "Building engine", 3)
            going = all(monitor.step_complete(name, step) for step in range(3)) and going
            monitor.phase_finish(name)
            going = monitor.step_complete("Building engine", turn % 8) and going
        return going

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert monitor.error is None
    assert told == sorted(set(told))
    assert told[-1] <= 1


def test_what_ends_a_build(box: Callable[..., Box]) -> None:
    received: list[int] = []
    monitor = _monitor_of(box, [], received)
    monitor.phase_start("Building engine", None, 2)
    assert monitor.step_complete("Building engine", 0)
    received.append(2)
    assert not monitor.step_complete("Building engine", 1)


def test_fp16_graph_of_the_student(small_student: Path) -> None:
    model = onnx.load(str(small_student))
    half = to_fp16(model)
    kinds = {c.data_type for c in half.graph.initializer}
    ends = {v.type.tensor_type.elem_type for v in (*half.graph.input, *half.graph.output)}
    assert (kinds, ends) == ({TensorProto.FLOAT16}, {TensorProto.FLOAT})
    assert [n.op_type for n in half.graph.node].count("Cast") == 4
    assert {c.data_type for c in model.graph.initializer} == {TensorProto.FLOAT}  # the model itself is untouched


def test_fp16_cannot_hold_everything(small_student: Path) -> None:
    model = onnx.load(str(small_student))
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((16, 3, 3, 3), 1e5, np.float32), "stem_w"))
    with pytest.raises(BackendError, match="stem_w has values that fp16 cannot hold"):
        to_fp16(model)


def test_scales_are_rounded_up() -> None:
    from edgekd.backends.tensorrt.graph_passes import _to_fp16

    tiny = numpy_helper.from_array(np.array([1e-9, 2.0**-24, 0.1], np.float32), "s")
    exact, half = numpy_helper.to_array(tiny), numpy_helper.to_array(_to_fp16(tiny, upwards=True))
    assert (half >= exact).all()
    assert half[:2].tolist() == [2.0**-24] * 2
    assert half[2] == pytest.approx(0.1, rel=1e-3)


def test_ranges_for_the_q_dq_pairs(small_student: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["x"]),
        helper.make_node("DequantizeLinear", ["w", "t", "y"], ["v"], axis=0),
        helper.make_node("Conv", ["x", "v"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["seam"]),
    ]
    constants = {
        "s": np.float32(0.5),
        "z": np.int8(0),
        "w": np.array([[[[2]]], [[[3]]]], np.int8),
        "t": np.array([10, 100], np.float32),
        "y": np.zeros(2, np.int8),
    }
    graph = helper.make_graph(
        nodes,
        "pairs",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 1, 4, 4])],
        [helper.make_tensor_value_info("seam", TensorProto.INT8, ["n", 2, 4, 4])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model, ranges = without_qdq(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    assert ranges == {"images": 63.5, "c": 63.5, "seam": 63.5}
    assert [n.op_type for n in model.graph.node] == ["Conv", "Identity"]
    assert {c.name: numpy_helper.to_array(c).ravel().tolist() for c in model.graph.initializer} == {"v": [20, 300]}
    onnx.checker.check_model(model, full_check=True)


def _answers(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def test_operators_that_tensorrt_8_5_lacks(box: Callable[..., Box], student_onnx: Path) -> None:
    """Every head of a multi-exit network has a LayerNormalization, for which 8.5 has no importer."""
    model, metadata = read_onnx(student_onnx)
    old = without_new_operators(model)
    onnx.checker.check_model(old, full_check=True)
    assert "LayerNormalization" in {n.op_type for n in model.graph.node} - {n.op_type for n in old.graph.node}
    feeds = {"images": RNG.normal(size=(4, 3, 32, 32)).astype(np.float32)}
    for ours, want in zip(_answers(old, feeds), _answers(model, feeds)):
        assert ours == pytest.approx(want, abs=1e-5)
    box("8.5")
    target = tensorrt_target(recipe("fp16"))
    with device():
        plan = build_plan(graphs(model, metadata)["stage_1"], name="stage_1", target=target)
    assert "LayerNormalization" not in {n.op_type for n in plan.graph.graph.node}


@pytest.mark.parametrize(
    ("operator", "shape", "attributes", "constants"),
    [
        ("LayerNormalization", (3, 4, 5), {}, 2),  # epsilon's default
        ("LayerNormalization", (3, 4, 5), {"axis": -2, "epsilon": 0.1}, 2),
        ("LayerNormalization", (3, 5), {"axis": -1, "epsilon": 0.01}, 1),  # without a bias
        ("HardSwish", (3, 4, 5), {}, 0),
    ],
)
def test_operators_written_out(
    operator: str, shape: tuple[int, ...], attributes: dict[str, Any], constants: int
) -> None:
    dims = shape[attributes.get("axis", -1) :]
    values = {f"c{i}": RNG.normal(size=dims).astype(np.float32) for i in range(constants)}
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", *values], ["y"], **attributes)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    old = without_new_operators(model)
    onnx.checker.check_model(old, full_check=True)
    assert operator not in {n.op_type for n in old.graph.node}
    feeds = {"x": (4 * RNG.normal(size=shape)).astype(np.float32)}
    assert _answers(old, feeds)[0] == pytest.approx(_answers(model, feeds)[0], abs=1e-5)


@pytest.mark.parametrize("attribute", [{"value_float": 3.0}, {"value_floats": [3.0]}])
def test_constants_in_nodes_become_fp16(attribute: dict[str, Any]) -> None:
    nodes = [helper.make_node("Constant", [], ["c"], **attribute), helper.make_node("Mul", ["images", "c"], ["exit_0"])]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, (2, 1))
    logits = helper.make_tensor_value_info("exit_0", TensorProto.FLOAT, (2, 1))
    graph = helper.make_graph(nodes, "constant", [images], [logits])
    half = to_fp16(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert _answers(half, {"images": np.array([[1], [2]], np.float32)})[0].ravel().tolist() == [3, 6]


def test_graphs_that_cannot_become_fp16() -> None:
    """What onnx raises is told as an error of edgekd."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, (2, 1))
    logits = helper.make_tensor_value_info("exit_0", TensorProto.FLOAT, (2, 1))
    double = helper.make_node("Cast", ["images"], ["d"], to=TensorProto.DOUBLE)
    graph = helper.make_graph([double, helper.make_node("Add", ["images", "d"], ["exit_0"])], "g", [images], [logits])
    with pytest.raises(BackendError, match="cannot be converted to fp16"):
        to_fp16(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_doctor_tries_tensorrt(box: Callable[..., Box], monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = box("10.3").cuda
    tested = self_test(find_backend("tensorrt"), PRECISIONS)
    monkeypatch.setattr(doctor, "_in_child", lambda backend: tested)  # the fake is not there in another process
    lines, healthy = doctor.report()
    (line,) = [line for line in lines if line.startswith("tensorrt: ")]
    assert line.startswith("tensorrt: 10.3.0 works on gpu Orin, sm 8.7, ")
    assert line.endswith("; right in fp32, fp16, int8")
    assert healthy
    assert cuda.launches == 3 * 8  # CUDA graphs of every stage


@pytest.mark.parametrize(
    ("trouble", "text"),
    [
        ({"wrong_profile": 0}, r"gives wrong results on gpu .*; fp32: a batch of 1 after it, exit 0: off by"),
        ({"forgets": True}, r"fp16: a batch of 2 whose second image goes on, exit 0"),
        ({"cannot_start": True}, r"initialization failure with error: 35"),
        ({"fast_int8": False}, r"works on .*; right in fp32, fp16; no int8: "),
    ],
)
def test_doctor_finds_what_is_wrong(box: Callable[..., Box], trouble: dict[str, Any], text: str) -> None:
    box("8.6", **trouble)
    found, works = self_test(find_backend("tensorrt"), PRECISIONS)
    assert re.search(text, found), found
    assert works == ("works" in found)


@pytest.mark.parametrize(
    ("last", "text"),
    [
        (
            "os.kill(os.getpid(), signal.SIGSEGV)",
            "crashed with SIGSEGV in the step 'fp16: build stage_1'; its last words: C",
        ),
        ("raise SystemExit(3)", "ended with exit code 3 in the step"),
        ("time.sleep(60)", "did not end in 0 minutes in the step"),
    ],
)
def test_a_crash_does_not_take_doctor_down(
    box: Callable[..., Box], last: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box("8.6")
    lines = ["import os, signal, sys, time", "open(sys.argv[2], 'w').write('{\"step\": \"fp16: build stage_1\"}\\n')"]
    (tmp_path / "dies.py").write_text("\n".join([*lines, "print('CUDA error', file=sys.stderr, flush=True)", last]))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "CHILD", "dies")
    monkeypatch.setattr(doctor, "TIMEOUT_S", 2 if "sleep" in last else 30)
    found, works = doctor._try(find_backend("tensorrt"))
    assert text in found
    assert not works


def test_doctor_in_a_process_of_its_own() -> None:
    """With a backend that is here; its result and its remarks come back."""
    assert doctor._in_child(find_backend("onnxruntime"))[1]


def test_fp16_stages_of_multi_exit_resnet18(student_onnx: Path) -> None:
    model, metadata = read_onnx(student_onnx)
    images = RNG.normal(size=(4, 3, 32, 32)).astype(np.float32)
    want, feeds = open_engine(student_onnx).logits(images), {"images": images}
    parts = graphs(model, metadata)
    for k in range(4):
        half = to_fp16(parts[f"stage_{k}"])
        onnx.checker.check_model(half, full_check=True)
        session = onnxruntime.InferenceSession(half.SerializeToString(), providers=["CPUExecutionProvider"])
        names = [o.name for o in session.get_outputs()]
        feeds = dict(zip(names, session.run(names, feeds)))
        assert np.abs(feeds.pop(f"exit_{k}") - want[k]).max() <= 5e-3 * np.abs(want).max()
        assert {x.dtype.type for x in feeds.values()} <= {np.float16}


def test_engines_share_their_scratch_memory(box: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    """It grows for an engine that is opened after others were captured, and is freed with the last engine."""
    cuda = box("10.3").cuda
    want = open_engine(small_student, threads=1).staged_logits(IMAGES)
    compiled(small_student, tmp_path / "e.engine", recipe(graphs="all"))
    gc.collect()
    assert not cuda.blocks
    engines = [open_engine(tmp_path / "e.engine") for _ in range(3)]

    def scratch() -> set[int]:
        with device() as gpu:
            return {gpu.scratch.memory.address}

    for engine in engines[:2]:
        assert engine.staged_logits(IMAGES) == pytest.approx(want, abs=1e-4)
    before, launches = scratch(), cuda.launches
    assert engines[0].staged_logits(IMAGES) == pytest.approx(want, abs=1e-4)
    assert cuda.launches > launches
    assert engines[2].logits(IMAGES) == pytest.approx(want, abs=1e-4)  # in one piece, which needs more
    assert scratch().isdisjoint(before)
    assert before.isdisjoint(cuda.blocks)
    after, plain = scratch(), cuda.plain
    for engine in engines * 2:
        assert engine.staged_logits(IMAGES) == pytest.approx(want, abs=1e-4)
    assert scratch() == after
    assert cuda.plain - plain <= 3 * 3 * len(BUCKETS)  # each batch size of each stage was captured anew, once
    for engine in engines:
        engine.close()
    del engine, engines
    gc.collect()
    assert not cuda.blocks


def test_a_layout_with_padding_is_refused(box: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    box("8.6")
    compiled(small_student, tmp_path / "e.engine", recipe())
    box("8.6", padded="images")
    with pytest.raises(BackendError, match=r"images is laid out as 'Channel major[\s\S]*compile it again"):
        open_engine(tmp_path / "e.engine").staged_logits(IMAGES)
