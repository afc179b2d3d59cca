"""Exits cut out of a compiled engine: the others answer as before, and nothing is lost on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from fakes.machine import Box, compiled, recipe

from edgekd.artifacts.manifest import NETWORK_FILE, Manifest, read_manifest, write_manifest
from edgekd.artifacts.metadata import read_student
from edgekd.artifacts.partition import keep_exits
from edgekd.backends.base import load_recipe
from edgekd.compiler import pruning
from edgekd.compiler.build import compile_engine
from edgekd.compiler.pruning import prune_exits
from edgekd.compiler.whole_graphs import add_final
from edgekd.errors import ArtifactError, ConfigError, GateError
from edgekd.policy import NEVER_EXIT, Policy
from edgekd.runtime.classifier import Classifier
from edgekd.runtime.engine import open_engine
from edgekd.testing.students import small_student

IMAGES = np.random.default_rng(3).normal(size=(40, 3, 16, 16)).astype(np.float32)


@pytest.fixture
def engine(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The small student, three exits with the thresholds 0.26 and 0.3, compiled by ONNX Runtime or as requested."""
    backend, recipe = getattr(request, "param", ("onnxruntime", "fp32"))
    student = read_student(small_student(tmp_path / "student.onnx"))
    labels = open_engine(tmp_path / "student.onnx").logits(IMAGES)[-1].argmax(axis=1)
    settings = load_recipe(recipe, {"batch_sizes": [1, 4], "max_accuracy_drop": 100.0})
    out, validation = tmp_path / "student.engine", (IMAGES, labels)
    compile_engine(student, out, recipe=settings, backend=backend, calibration=IMAGES, validation=validation)
    return out


@pytest.mark.parametrize(
    ("engine", "keep"),
    [
        (("onnxruntime", "fp32"), (0, 2)),
        (("onnxruntime", "int8"), (1, 2)),
        (("onnxruntime", "int8"), (2,)),
        (("openvino", "int8"), (0, 2)),
        (("ncnn", "fp32"), (2,)),
    ],
    indirect=["engine"],
)
def test_the_exits_that_are_kept_answer_as_before(engine: Path, keep: tuple[int, ...]) -> None:
    before, old = open_engine(engine).logits(IMAGES), read_manifest(engine)
    pruned = prune_exits(engine, keep, images=IMAGES)
    after = open_engine(engine)
    assert after.manifest == pruned
    difference = np.abs(after.logits(IMAGES) - before[list(keep)]).max()
    assert difference <= (1e-3 if old.recipe.precision == "fp32" else max(old.parity.max_abs_logit_difference))
    assert after.metadata.outputs == [f"exit_{k}" for k in range(len(keep))]
    assert after.metadata.policy.thresholds == tuple((0.26, 0.3)[k] for k in keep[:-1])
    assert {size: len(times) for size, times in pruned.stage_ms.items()} == {"1": len(keep), "4": len(keep)}
    assert pruned.parity.max_abs_logit_difference == tuple(old.parity.max_abs_logit_difference[k] for k in keep)
    assert set(pruned.accuracy.predictions) == {"final"}
    assert {p.name for p in engine.iterdir()} == {*pruned.files, "manifest.json"}
    decision = Classifier(after).run(IMAGES)
    assert set(decision.exits.tolist()) <= set(range(len(keep)))


@pytest.mark.parametrize(("name", "keep"), [("int8", (0, 2)), ("fp16", (2,))])
def test_tensorrt_engines(
    box: Callable[..., Box], small_student: Path, tmp_path: Path, name: str, keep: tuple[int, ...]
) -> None:
    """On the strict fake of TensorRT, with a check of every batch size."""
    box("10.3")
    compiled(small_student, tmp_path / "e", recipe(name, batch_sizes=(1, 4), graphs="all"))
    before = open_engine(tmp_path / "e", threads=1).logits(IMAGES, batch_size=4)
    prune_exits(tmp_path / "e", keep, images=IMAGES)
    after = open_engine(tmp_path / "e", threads=1).logits(IMAGES, batch_size=4)
    np.testing.assert_allclose(after, before[list(keep)], atol=1e-3)


def test_an_engine_without_early_exits_is_the_plain_network(engine: Path) -> None:
    final = Classifier(engine, strategy="final").run(IMAGES)
    pruned = prune_exits(engine, (2,), images=IMAGES)
    assert {file.graph for file in pruned.files.values()} == {"monolithic"}
    decision = Classifier(engine).run(IMAGES)
    np.testing.assert_allclose(decision.probabilities, final.probabilities, atol=1e-6)
    assert set(decision.exits.tolist()) == {0}


def test_a_head_that_reads_the_logits_of_a_removed_exit(tmp_path: Path) -> None:
    """exit_2 = its own logits + those of exit_1, whose name it takes."""
    student = read_student(small_student(tmp_path / "student.onnx"))
    graph = student.model.graph
    graph.node[-1].output[0] = "own"
    graph.node.append(onnx.helper.make_node("Add", ["own", "exit_1"], ["exit_2"], name="sum"))
    want = onnx.reference.ReferenceEvaluator(student.model).run(["exit_0", "exit_2"], {"images": IMAGES[:4]})
    model, metadata = keep_exits(student.model, student.metadata, (0, 2))
    onnx.checker.check_model(model, full_check=True)
    assert metadata.outputs == [o.name for o in model.graph.output] == ["exit_0", "exit_1"]
    assert metadata.exits[1].boundary == ("stage_2",)
    got = onnx.reference.ReferenceEvaluator(model).run(None, {"images": IMAGES[:4]})
    assert np.array_equal(want, got)


def test_the_policy_of_some_exits() -> None:
    policy = Policy((1.0, 2.0, 3.0), (0.5, 0.6), "margin", "mean")
    assert policy.of_exits((0, 2)) == Policy((1.0, 3.0), (0.5,), "margin", "mean")
    assert policy.of_exits((2,)) == Policy((3.0,), (), "margin", "mean")
    assert Policy((1.0, 2.0, 3.0)).of_exits((1, 2)) == Policy((2.0, 3.0))
    rows = ((1.0,), (0.2, 0.8), (0.0, 0.0, 1.0))
    pooled = Policy((1.0, 2.0, 3.0), (0.5, 0.6), average="geometric", pooling=rows)
    assert pooled.of_exits((1, 2)).pooling == ((0.8,), (0.0, 1.0))
    assert pooled.of_exits((0, 2)).pooling == ((1.0,), (0.0, 1.0))
    assert pooled.of_exits((2,)).pooling == ((1.0,),)


@pytest.mark.parametrize("keep", [(), (0, 1), (2, 0), (0, 0, 2), (0, 3), (-1, 2)])
def test_exits_that_cannot_be_kept(engine: Path, keep: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="rising indices that end in 2"):
        prune_exits(engine, keep, images=IMAGES)


def test_a_copy_without_the_network_runs_but_cannot_be_pruned(engine: Path) -> None:
    (engine / NETWORK_FILE).unlink()
    assert open_engine(engine).logits(IMAGES).shape == (3, 40, 5)
    with pytest.raises(ArtifactError, match=r"copy without network\.onnx"):
        prune_exits(engine, (2,), images=IMAGES)


def test_an_engine_of_an_earlier_version_runs_but_cannot_be_pruned(engine: Path) -> None:
    manifest = read_manifest(engine)
    files = {name: file for name, file in manifest.files.items() if name != NETWORK_FILE}
    write_manifest(engine, dataclasses.replace(manifest, files=files))
    assert open_engine(engine).logits(IMAGES).shape == (3, 40, 5)
    with pytest.raises(ArtifactError, match=r"was compiled without network\.onnx") as caught:
        prune_exits(engine, (2,), images=IMAGES)
    assert "compile it again" in caught.value.fix


def test_a_changed_network_is_refused(engine: Path) -> None:
    data = bytearray((engine / NETWORK_FILE).read_bytes())
    data[len(data) // 2] ^= 1
    (engine / NETWORK_FILE).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"network\.onnx is not the file that was built"):
        open_engine(engine)


def test_changed_logits_leave_the_engine_as_it_was(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruning is stopped where the kept exit's weights change on the way."""

    def corrupt(folder: Path, manifest: Manifest) -> onnx.ModelProto:
        model = onnx.load(str(folder / NETWORK_FILE))
        bias = next(i for i in model.graph.initializer if i.name == "fc2_b")
        bias.CopyFrom(onnx.numpy_helper.from_array(np.full(5, 0.01, np.float32), "fc2_b"))
        return model

    before = {path.name: path.read_bytes() for path in engine.iterdir()}
    monkeypatch.setattr(pruning, "read_network", corrupt)
    with pytest.raises(GateError, match=r"the logits of exit_2 differ by 1\.00e-02"):
        prune_exits(engine, (0, 2), images=IMAGES)
    assert {path.name: path.read_bytes() for path in engine.iterdir()} == before
    assert {path.name for path in engine.parent.iterdir()} == {"student.onnx", "student.engine"}


def test_other_files_in_the_folder_stay(engine: Path) -> None:
    (engine / "README.txt").write_text("mine")
    prune_exits(engine, (0, 2), images=IMAGES)
    assert (engine / "README.txt").read_text() == "mine"


def test_a_cascade_that_never_exits_runs_the_final_graph(engine: Path) -> None:
    never = Policy((1.0, 1.0, 2.0), (NEVER_EXIT, NEVER_EXIT))
    opened = add_final(open_engine(engine), engine)
    decision = Classifier(opened, strategy="cascade", policy=never).run(IMAGES)
    assert set(opened._runners) == {"final"}
    want = Classifier(opened, strategy="cascade", policy=dataclasses.replace(never, thresholds=(1.5, 1.5))).run(IMAGES)
    assert set(opened._runners) == {"final", "stage_0", "stage_1", "stage_2"}
    np.testing.assert_allclose(decision.probabilities, want.probabilities, atol=1e-6)
    assert np.array_equal(decision.exits, want.exits)
    mean = dataclasses.replace(never, average="mean")  # every exit contributes to its answers
    assert np.abs(Classifier(opened, policy=mean).run(IMAGES).probabilities - decision.probabilities).max() > 0.01
