"""Engines opened and run: every backend for real, on a small student."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgekd import config
from edgekd.artifacts.manifest import MANIFEST, read_manifest, read_metadata, write_manifest
from edgekd.artifacts.metadata import Exit, put_metadata, read_onnx, read_student
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import find_backend
from edgekd.backends.openvino import OpenVinoBackend
from edgekd.bench.suite import Suite
from edgekd.compiler.build import compile_engine
from edgekd.errors import ArtifactError, BackendError, ConfigError
from edgekd.runtime.classifier import Classifier
from edgekd.runtime.engine import open_engine

RNG = np.random.default_rng(2)
IMAGES = RNG.normal(size=(12, 3, 32, 32)).astype(np.float32)
_STATIC = {"openvino": {"static_batch_sizes": (1,)}}
QUICK = Recipe("int8", max_accuracy_drop=100.0, batch_sizes=(1,), graphs="all", options=_STATIC)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def engine_path(request: pytest.FixtureRequest, student_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines") / f"{request.param}.engine"
    labels = open_engine(student_onnx).logits(IMAGES)[-1].argmax(axis=1)
    compile_engine(
        read_student(student_onnx),
        out,
        recipe=QUICK,
        backend=request.param,
        calibration=IMAGES,
        validation=(IMAGES, labels),
    )
    return out


@pytest.fixture
def copy(engine_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine_path, tmp_path / "copy.engine"))


def test_student_onnx_opens_in_fp32(student_onnx: Path) -> None:
    engine = open_engine(student_onnx, threads=1)
    assert (engine.backend.name, engine.name, engine.threads) == ("onnxruntime", "onnxruntime fp32", 1)
    assert engine.manifest is None
    logits = engine.logits(IMAGES, batch_size=5)
    assert logits.shape == (4, 12, 5)
    assert np.array_equal(logits, engine.staged_logits(IMAGES, batch_size=5))
    assert np.allclose(engine.final(IMAGES)[0], logits[3], atol=1e-5)


def test_one_exit_without_boundary_is_one_graph(student_onnx: Path, tmp_path: Path) -> None:
    model, metadata = read_onnx(student_onnx)
    del model.graph.output[:3]
    put_metadata(model, dataclasses.replace(metadata, exits=(Exit("exit_3", ()),)))
    onnx.save(model, str(tmp_path / "plain.onnx"))
    engine = open_engine(tmp_path / "plain.onnx")
    assert engine.stage(0) is engine.monolithic is engine.final
    out = tmp_path / "plain.engine"
    manifest, _ = compile_engine(
        read_student(tmp_path / "plain.onnx"),
        out,
        recipe=QUICK,
        backend="onnxruntime",
        calibration=IMAGES,
        validation=None,
    )
    assert {f.graph for f in manifest.files.values()} == {"monolithic"}
    assert open_engine(out).logits(IMAGES).shape == (1, 12, 5)


def test_engine_near_float(engine_path: Path, student_onnx: Path) -> None:
    engine, source = open_engine(engine_path), open_engine(student_onnx)
    want = source.logits(IMAGES)
    assert engine.name == f"{engine_path.stem} int8"
    assert np.abs(engine.logits(IMAGES) - want).max() <= 0.1 * np.abs(want).max()


@pytest.mark.parametrize("batch_size", [1, 5])
def test_stages_in_turn_equal_the_whole(engine_path: Path, batch_size: int) -> None:
    engine = open_engine(engine_path)
    staged = engine.staged_logits(IMAGES, batch_size=batch_size)
    assert np.array_equal(staged, engine.logits(IMAGES, batch_size=batch_size))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_boundaries_of_several_tensors(two_maps_onnx: Path, tmp_path: Path, backend: str, precision: str) -> None:
    images = RNG.normal(size=(7, 3, 16, 16)).astype(np.float32)
    recipe = dataclasses.replace(QUICK, precision=precision)
    calibration = images if precision == "int8" else None
    source = open_engine(two_maps_onnx)
    labels = source.logits(images)[-1].argmax(axis=1)
    out = tmp_path / "e"
    compile_engine(
        read_student(two_maps_onnx),
        out,
        recipe=recipe,
        backend=backend,
        calibration=calibration,
        validation=(images, labels),
    )
    engine = open_engine(out)
    between = engine.stage(0)(images[:2])
    assert [x.shape for x in between[1:]] == [(2, 8, 16, 16), (2, 12, 8, 8)]
    assert {x.dtype for x in between[1:]} == {np.dtype(np.uint8 if precision == "int8" else np.float32)}
    for batch_size in (1, 3):
        whole = engine.logits(images, batch_size=batch_size)
        assert np.allclose(engine.staged_logits(images, batch_size=batch_size), whole, rtol=0, atol=1e-6)
        assert np.allclose(whole, source.logits(images), rtol=0, atol=0.02 if precision == "int8" else 1e-5)


def test_rows_do_not_depend_on_their_batch(engine_path: Path) -> None:
    engine = open_engine(engine_path)
    assert np.allclose(engine.logits(IMAGES, batch_size=1), engine.logits(IMAGES, batch_size=12), atol=1e-4)


def test_outputs_belong_to_the_caller(engine_path: Path) -> None:
    engine = open_engine(engine_path)
    first = engine.monolithic(IMAGES[:1])
    kept = [output.copy() for output in first]
    engine.monolithic(IMAGES[1:2])
    assert all(np.array_equal(a, b) for a, b in zip(first, kept))


def test_read_only_and_strided_inputs(engine_path: Path) -> None:
    engine = open_engine(engine_path)
    want = engine.monolithic(IMAGES[:4:2].copy())
    frozen = IMAGES[:4:2].copy()
    frozen.flags.writeable = False
    for x in (frozen, IMAGES[:4:2]):
        assert all(np.array_equal(a, b) for a, b in zip(engine.monolithic(x), want))
    one = engine.staged_logits(IMAGES[:1])
    for x in (frozen[:1], np.asfortranarray(IMAGES[:1]), IMAGES[:1, :, ::-1][:, :, ::-1]):
        assert np.array_equal(engine.staged_logits(x), one)


@pytest.mark.parametrize("threads", [1, None])
def test_threads_may_share_an_engine(engine_path: Path, threads: int | None) -> None:
    want = open_engine(engine_path, threads=threads).logits(IMAGES, batch_size=1)
    engine = open_engine(engine_path, threads=threads)  # nothing is loaded yet: threads race for that, too
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: engine.staged_logits(IMAGES[i % 12 : i % 12 + 1]), range(96)))
    assert all(np.array_equal(result[:, 0], want[:, i % 12]) for i, result in enumerate(results))


def test_linked_stages_go_on_as_arrays_when_rows_leave(student_onnx: Path, tmp_path: Path) -> None:
    recipe = Recipe("fp32", batch_sizes=(1,), options={"openvino": {"static_batch_sizes": (1, 4)}})
    compile_engine(read_student(student_onnx), tmp_path / "e", recipe=recipe, backend="openvino", validation=None)
    engine = open_engine(tmp_path / "e")
    staged_runner, want = engine.staged_runner(), engine.logits(IMAGES[:8])
    with staged_runner(IMAGES[:4]) as run:
        run.compact(np.array([2]), 1)  # before the first stage, too
        np.testing.assert_allclose(run.run_stage(), want[0, 2:3], atol=1e-5)
    for start in (0, 4, 0):  # the same requests again, and nothing of the batch before is left
        with staged_runner(IMAGES[start : start + 4]) as run:
            first = run.run_stage()
            run.compact(np.array([1, 3]), 3)
            second = [run.run_stage()[:2] for _ in range(3)]
        np.testing.assert_allclose(first, want[0, start : start + 4], atol=1e-5)
        np.testing.assert_allclose(second, want[1:, [start + 1, start + 3]], atol=1e-5)


def test_precision_is_read_back(engine_path: Path) -> None:
    precision = read_manifest(engine_path).precision
    assert precision["int8"] == pytest.approx(42 / 58)  # 42 convolutions of 58 layers; 16 small linear ones are float
    assert sum(precision.values()) == pytest.approx(1)


def test_files_damaged(copy: Path, student_onnx: Path) -> None:
    victim = max(copy.glob("stage_1.*"), key=lambda p: p.stat().st_size)
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match=rf"{victim.name} is not the file that was built"):
        open_engine(copy)
    assert read_metadata(copy) == read_metadata(student_onnx)
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=victim.name):
        open_engine(copy)
    victim.unlink()
    with pytest.raises(ArtifactError, match=f"{victim.name} is missing"):
        open_engine(copy)


def test_manifest_damaged(copy: Path) -> None:
    path = copy / MANIFEST
    text = path.read_text()
    path.write_text(text.replace('"max_accuracy_drop": 100.0', '"max_accuracy_drop": 0.1'))
    with pytest.raises(ArtifactError, match="was edited"):
        open_engine(copy)
    path.write_text(text[: len(text) // 2])
    with pytest.raises(ArtifactError, match="not a valid engine manifest"):
        open_engine(copy)
    path.unlink()
    with pytest.raises(ArtifactError, match="is not an engine"):
        open_engine(copy)


def test_built_elsewhere(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = read_manifest(copy)
    version = manifest.backend_version
    write_manifest(copy, dataclasses.replace(manifest, backend_version="1.2.3"))
    with pytest.raises(ArtifactError, match=rf"1\.2\.3; this machine has {version}[\s\S]*edgekd compile"):
        open_engine(copy)
    write_manifest(copy, dataclasses.replace(manifest, host=dataclasses.replace(manifest.host, machine="riscv64")))
    with pytest.raises(ArtifactError, match="machine riscv64; this machine has"):
        open_engine(copy)
    write_manifest(copy, dataclasses.replace(manifest, host=dataclasses.replace(manifest.host, cpu="Other CPU")))
    assert open_engine(copy).logits(IMAGES[:1]).shape == (4, 1, 5)
    assert "Other CPU" in caplog.text


def test_quantised_for_vnni(copy: Path, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest) -> None:
    """ONNX Runtime answers the same to the bit by slower kernels; OpenVINO's sums would saturate."""
    manifest, before = read_manifest(copy), open_engine(copy).logits(IMAGES)
    write_manifest(copy, dataclasses.replace(manifest, host=dataclasses.replace(manifest.host, exact_int8=True)))
    request.getfixturevalue("without_vnni")
    if manifest.backend == "openvino":
        with pytest.raises(ArtifactError, match="CPU with VNNI"):
            open_engine(copy)
        return
    assert np.array_equal(open_engine(copy).logits(IMAGES), before)
    assert "it is slower" in caplog.text


@pytest.mark.usefixtures("without_vnni")
def test_compiled_without_vnni(engine_path: Path, student_onnx: Path, tmp_path: Path) -> None:
    """Full weights and a note of the cost in ONNX Runtime, 7 bits in OpenVINO."""
    backend = read_manifest(engine_path).backend
    manifest, _ = compile_engine(
        read_student(student_onnx), tmp_path / "e", recipe=QUICK, backend=backend, calibration=IMAGES, validation=None
    )
    assert not manifest.host.exact_int8
    assert any("without VNNI" in note for note in manifest.notes)
    if backend == "onnxruntime":
        values = [numpy_helper.to_array(i) for i in onnx.load(tmp_path / "e" / "monolithic.onnx").graph.initializer]
        assert max(abs(v.astype(int)).max() for v in values if v.dtype == np.int8 and v.ndim == 4) == 127


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_from_one_on(student_onnx: Path, tmp_path: Path, threads: int) -> None:
    options = {"recipe": QUICK, "calibration": IMAGES, "validation": None}
    for refused in (
        lambda: open_engine(student_onnx, threads=threads),
        lambda: Classifier(student_onnx, threads=threads),
        lambda: compile_engine(read_student(student_onnx), tmp_path / "e", threads=threads, **options),
        lambda: config.load(Suite, "benchmarks/suites", "quick", overrides={"threads": threads}),
    ):
        with pytest.raises(ConfigError, match="threads"):
            refused()


def test_onnx_damaged_or_foreign(student_onnx: Path, tmp_path: Path) -> None:
    data = student_onnx.read_bytes()
    half = tmp_path / "half.onnx"
    half.write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match="not a complete ONNX file"):
        open_engine(half)
    model, metadata = read_onnx(student_onnx)
    put_metadata(model, dataclasses.replace(metadata, exits=(Exit("exit_0", ("nowhere",)), *metadata.exits[1:])))
    onnx.save(model, str(half))
    with pytest.raises(ArtifactError, match="nowhere"):
        open_engine(half).stage(0)
    del model.metadata_props[:]
    onnx.save(model, str(half))
    with pytest.raises(ArtifactError, match="not made by edgekd"):
        open_engine(half)
    with pytest.raises(ArtifactError, match="no ONNX file"):
        open_engine(tmp_path / "missing.onnx")


def test_unknown_backend() -> None:
    with pytest.raises(BackendError, match="Did you mean 'openvino'"):
        find_backend("openvin")


def test_backend_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenVinoBackend, "version", lambda self: None)
    with pytest.raises(BackendError, match=r"pip install 'edgekd\[cpu\]'"):
        find_backend("openvino")


def test_openvino_leaves_the_signal_stack_alone(student_onnx: Path, tmp_path: Path) -> None:
    """It would leave one that is unmapped when the engine is gone, and the next signal would end the process."""

    def signal_stack() -> bytes:
        found = ctypes.create_string_buffer(64)
        assert ctypes.CDLL(None).sigaltstack(None, found) == 0
        return found.raw[:24]

    before = signal_stack()
    compile_engine(
        read_student(student_onnx),
        tmp_path / "out.engine",
        recipe=Recipe("fp32"),
        backend="openvino",
        validation=None,
    )
    open_engine(tmp_path / "out.engine").monolithic(np.zeros((1, 3, 32, 32), np.float32))
    assert signal_stack() == before
