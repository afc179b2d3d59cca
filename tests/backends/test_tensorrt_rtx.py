"""Engines of TensorRT-RTX: built where there is no GPU, pending until they are checked on the GPU that runs them.

A fake stands for library, GPU and CUDA here, so that the way of a
pending engine is walked to its end.
"""

from __future__ import annotations

import dataclasses
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from fakes.cuda import Cuda
from fakes.machine import IMAGES, Box, compiled, recipe
from helpers.cli import edgekd

from edgekd.artifacts.manifest import MANIFEST, PENDING, STUDENT_FILE, Manifest, read_manifest
from edgekd.artifacts.metadata import put_metadata, read_student
from edgekd.backends.base import find_backend, load_recipe
from edgekd.backends.tensorrt.library import TENSORRT_RTX
from edgekd.compiler.build import compile_engine
from edgekd.compiler.pending import complete
from edgekd.data.folders import check, scan
from edgekd.data.split import read_split
from edgekd.data.splitting import make_split
from edgekd.errors import ArtifactError, BackendError, ConfigError, GateError
from edgekd.runtime.classifier import Classifier
from edgekd.runtime.engine import open_engine
from edgekd.serialization import to_json
from edgekd.testing.students import small_student

ADA = ("NVIDIA GeForce RTX 4070", (8, 9))


def gpu(name: str, sm: tuple[int, int]) -> Cuda:
    cuda = Cuda()
    cuda.name, cuda.sm = name, sm
    return cuda


@pytest.fixture
def rtx(box: Callable[..., Box]) -> Callable[..., Box]:
    """rtx() is a machine without a GPU, rtx(ADA) one with it; both have TensorRT-RTX."""

    def start(device: tuple[str, tuple[int, int]] | None = None, **trouble: Any) -> Box:
        return box("11.4", rtx=True, cuda=gpu(*device) if device else Cuda(driver=0), **trouble)

    return start


def device(name: str, precision: str = "fp32") -> Any:
    return recipe(precision, options={"tensorrt-rtx": {"device": name}})


def built(student: Path, out: Path, asked: Any) -> Manifest:
    return compiled(student, out, asked, backend="tensorrt-rtx")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8-fp16"])
def test_what_is_known_without_a_gpu(
    rtx: Callable[..., Box], small_student: Path, tmp_path: Path, precision: str
) -> None:
    rtx()
    out = tmp_path / "s.engine"
    made = built(small_student, out, device("rtx-40", precision))
    assert made.pending == PENDING
    assert (made.parity, made.accuracy, made.stage_ms, made.tuning) == (None, None, {}, None)
    assert made.precision[precision.partition("-")[0]] > 0.5
    assert "no NVIDIA driver" in made.notes[0]
    assert read_manifest(out).files[STUDENT_FILE].graph == "student"
    for use in (open_engine, Classifier):
        with pytest.raises(ArtifactError, match=r"is pending.*accuracy and times are unknown[\s\S]*edgekd tune"):
            use(out)


def test_the_check_on_the_gpu_completes_it(rtx: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    rtx()
    out = tmp_path / "s.engine"
    labels = open_engine(small_student, threads=1).logits(IMAGES)[-1].argmax(axis=1)
    built(small_student, out, device("rtx-40", "int8-fp16"))
    with pytest.raises(BackendError, match="no NVIDIA driver"):
        complete(out, IMAGES, labels)
    rtx(ADA)
    with pytest.raises(ConfigError, match="needs validation images"):
        complete(out, IMAGES[:0], labels[:0])
    done = complete(out, IMAGES, labels)
    assert done == read_manifest(out)
    assert done.pending == ()
    assert done.accuracy is not None
    assert done.accuracy.validation_images == len(IMAGES)
    assert done.parity is not None
    assert [parity.size for parity in done.parity.by_batch_size] == [8, 4, 2, 1, 2, 4, 8]
    assert set(done.stage_ms) == {"1", "2", "4", "8"}
    assert done.host.backends["tensorrt-rtx"]["gpu"] == ADA[0]
    assert not (out / STUDENT_FILE).exists()
    assert open_engine(out).staged_logits(IMAGES).shape == (3, len(IMAGES), 5)
    with pytest.raises(ArtifactError, match="is not pending"):
        complete(out, IMAGES, labels)


def test_an_engine_that_fails_its_check_stays_pending(
    rtx: Callable[..., Box], small_student: Path, tmp_path: Path
) -> None:
    rtx()
    out = tmp_path / "s.engine"
    labels = open_engine(small_student, threads=1).logits(IMAGES)[-1].argmax(axis=1)
    built(small_student, out, device("portable"))
    before = (out / MANIFEST).read_bytes()
    rtx(ADA, wrong_profile=0)
    with pytest.raises(GateError, match=r"in batches of 1: .*differs from student\.onnx"):
        complete(out, IMAGES, labels)
    assert (out / MANIFEST).read_bytes() == before
    with pytest.raises(ArtifactError, match="is pending"):
        open_engine(out)


def test_an_edited_float_network_is_not_used(rtx: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    rtx()
    out = tmp_path / "s.engine"
    built(small_student, out, device("portable"))
    rtx(ADA)
    with (out / STUDENT_FILE).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ArtifactError, match=r"student\.onnx is not the file that was built"):
        complete(out, IMAGES, IMAGES)


def test_where_it_runs_everything_is_done_at_once(rtx: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    rtx(ADA)
    for name, pending in (("rtx-40", ()), ("portable", ()), ("rtx-50", PENDING)):
        made = built(small_student, tmp_path / f"{name}.engine", device(name))
        assert made.pending == pending
        assert (made.accuracy is None) == bool(pending)


@pytest.mark.parametrize(
    ("name", "sm", "runs"),
    [
        ("rtx-30", (8, 6), True),
        ("rtx-30", (8, 9), False),
        ("rtx-50", (12, 0), True),
        ("portable", (8, 0), True),
        ("portable", (12, 1), True),
        ("portable", (7, 5), False),
        ("portable", (9, 0), False),
    ],
)
def test_which_gpus_an_engine_runs_on(
    rtx: Callable[..., Box], small_student: Path, tmp_path: Path, name: str, sm: tuple[int, int], runs: bool
) -> None:
    rtx()
    out = tmp_path / "s.engine"
    built(small_student, out, device(name))
    rtx(("some GPU", sm))
    if runs:
        open_engine(out, pending=True)
        return
    with pytest.raises(ArtifactError, match=rf"for {name} GPUs; this machine has some GPU \(SM {sm[0]}\.{sm[1]}\)"):
        open_engine(out, pending=True)


def test_another_version_and_another_system(
    rtx: Callable[..., Box], small_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtx()
    out = tmp_path / "s.engine"
    built(small_student, out, device("portable"))
    machine = rtx(ADA)
    monkeypatch.setattr("platform.system", lambda: "Windows")
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    open_engine(out, pending=True)
    monkeypatch.setattr(TENSORRT_RTX.trt, "__version__", "1.8.0.1")
    with pytest.raises(ArtifactError, match=r"by TensorRT-RTX 1\.7\.1\.116; this machine has 1\.8\.0\.1"):
        open_engine(out, pending=True)
    assert "tensorrt" not in machine.finder.imported


def test_auto_builds_nothing_that_is_pending(
    rtx: Callable[..., Box], small_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtx()
    two = [find_backend(name) for name in ("tensorrt-rtx", "onnxruntime")]
    monkeypatch.setattr("edgekd.compiler.build.installed", lambda: two)
    student = read_student(small_student)
    asked = recipe(batch_sizes=(1,))
    manifest, attempts = compile_engine(student, tmp_path / "s.engine", recipe=asked, validation=None)
    assert manifest.backend == "onnxruntime"
    assert not manifest.pending
    attempt = attempts[0]
    assert not attempt.ok
    assert "would be pending: no NVIDIA driver" in attempt.note


def test_a_pending_manifest_cannot_claim_anything(rtx: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    rtx()
    made = built(small_student, tmp_path / "s.engine", device("portable"))
    with pytest.raises(ValueError, match="none of which is known"):
        dataclasses.replace(made, stage_ms={"1": (1.0, 1.0, 1.0)})
    with pytest.raises(ValueError, match="parity, accuracy, stage_ms"):
        dataclasses.replace(made, pending=("accuracy",))


def test_a_device_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="is none of portable, rtx-30, rtx-40, rtx-50"):
        load_recipe("fp16", {"tensorrt-rtx.device": "rtx-20"})


def test_bindings_without_their_libraries(box: Callable[..., Box], monkeypatch: pytest.MonkeyPatch) -> None:
    box("11.4", rtx=True)
    backend = find_backend("tensorrt-rtx")
    vars(TENSORRT_RTX).clear()

    def fail(name: str) -> types.ModuleType:
        raise ImportError("libtensorrt_rtx.so.1: cannot open shared object file")

    monkeypatch.setattr("edgekd.backends.tensorrt.library.importlib.import_module", fail)
    with pytest.raises(BackendError, match=r"TensorRT-RTX cannot be loaded[\s\S]*edgekd\[tensorrt-rtx\]"):
        backend.build(read_student, Path("x.plan"), recipe=recipe())  # type: ignore[arg-type]


def test_the_commands(rtx: Callable[..., Box], cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """compile here; nothing uses it; tune and bench on its GPU check it first."""
    split, out, student = tmp_path / "split.json", tmp_path / "student.engine", tmp_path / "student.onnx"
    split.write_bytes(to_json(make_split(check(scan(cells)))))
    read = read_student(small_student(student))
    put_metadata(read.model, dataclasses.replace(read.metadata, classes=read_split(split).classes))
    onnx.save(read.model, str(student))
    images = ("--data", cells, "--split", split)
    wide = ("--set", "max_accuracy_drop=100", "--set", "batch_sizes=[1,8]")
    rtx()
    assert "builds ahead of time; none of its engines can run here: no NVIDIA driver" in edgekd("doctor")
    said = edgekd("compile", student, "--backend", "tensorrt-rtx", "--device", "rtx-40", *wide)
    assert "pending: parity, accuracy, stage_ms are unknown" in said
    assert read_manifest(out).recipe.options["tensorrt-rtx"] == {"device": "rtx-40"}
    assert "--device is for --backend tensorrt-rtx" in edgekd("compile", student, "--device", "rtx-40", code=1)
    for words in (("predict", out, cells), ("evaluate", out, *images), ("certify", out, "--data", cells)):
        assert "is pending" in edgekd(*words, code=1)
    assert "no NVIDIA driver" in edgekd("tune", out, *images, "--max-accuracy-drop", "100", code=1)
    copy = shutil.copytree(out, tmp_path / "copy.engine")

    rtx(ADA)
    assert "is pending" in edgekd("predict", out, cells, code=1)
    said = edgekd("tune", out, *images, "--max-accuracy-drop", "100", "--keep-exits")
    assert "was pending; it is now checked against its float network, and timed" in said
    assert read_manifest(out).tuning is not None
    assert "exit" in edgekd("predict", out, cells)

    def stop(*_: Any, **__: Any) -> None:
        raise ConfigError("measured", fix="")

    monkeypatch.setattr("edgekd.bench.measure.bench", stop)
    edgekd("bench", copy, *images, "--out", tmp_path / "record.json", "--no-report", code=1)
    assert not read_manifest(copy).pending
