"""compile_engine: choosing, gating, refusing, leaving nothing half-written."""

from __future__ import annotations

import re
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgekd.artifacts.manifest import Accuracy, Manifest, PredictionAccuracy, read_manifest
from edgekd.artifacts.metadata import read_student
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import installed, load_recipe
from edgekd.cli.compile import _attempts
from edgekd.compiler.build import Attempt, _doubling, compile_engine
from edgekd.compiler.gate import GateReport, Validation, check
from edgekd.errors import BackendError, ConfigError, GateError
from edgekd.files import sha256
from edgekd.runtime.engine import Engine, open_engine
from edgekd.testing.students import small_student

IMAGES = np.random.default_rng(3).normal(size=(12, 3, 32, 32)).astype(np.float32)
SHORT = {"batch_sizes": [1, 2], "int8_attempts": 0, "openvino.static_batch_sizes": [1]}


def recipe(name: str, **overrides: object) -> Recipe:
    return load_recipe(name, {**SHORT, **overrides})


@pytest.fixture(scope="module")
def validation(student_onnx: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels that the last exit gets right."""
    return IMAGES, open_engine(student_onnx).logits(IMAGES)[-1].argmax(axis=1)


def openvino_has_16_bits() -> bool:
    import openvino

    return bool({"FP16", "BF16"} & set(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")))


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_shipped_recipes(name: str) -> None:
    assert load_recipe(name).precision == name


def test_recipe_misspelt_and_wrong() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'max_accuracy_drop'"):
        recipe("int8", max_acuracy_drop=1.0)
    with pytest.raises(ConfigError, match="Did you mean 'int8'"):
        recipe("int9")
    with pytest.raises(ConfigError, match="1 among them"):
        recipe("int8", batch_sizes=[2])
    with pytest.raises(ConfigError, match="calibration_images"):
        recipe("int8", calibration_images=0)


def test_auto_builds_with_every_backend_and_keeps_one(
    student_onnx: Path, validation: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    steps: list[tuple[int, int]] = []
    manifest, attempts = compile_engine(
        read_student(student_onnx),
        tmp_path / "e.engine",
        recipe=recipe("fp32"),
        validation=validation,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert [a.backend for a in attempts] == [b.name for b in installed()]
    assert all(a.ok and a.drop == 0 and a.precision == {"fp32": 1.0} for a in attempts)
    assert manifest.backend == min(attempts, key=lambda a: a.batch1_ms or 0).backend
    assert steps[-1] == (100, 100)
    assert steps == sorted(steps)
    assert len(set(steps)) > 10
    assert read_manifest(tmp_path / "e.engine").source_sha256 == sha256(student_onnx)
    assert {p.name for p in (tmp_path / "e.engine").iterdir()} == {*manifest.files, "manifest.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["e.engine"]
    assert max(manifest.parity.max_abs_logit_difference) <= 1e-3
    assert {size: len(times) for size, times in manifest.stage_ms.items()} == {"1": 4, "2": 4}
    assert (
        np.abs(open_engine(tmp_path / "e.engine").logits(IMAGES) - open_engine(student_onnx).logits(IMAGES)).max()
        < 1e-3
    )


def test_fp16_says_what_ran(student_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="onnxruntime has no fp16"):
        compile_engine(
            read_student(student_onnx),
            tmp_path / "e",
            recipe=recipe("fp16"),
            backend="onnxruntime",
            validation=None,
        )
    if not openvino_has_16_bits():
        with pytest.raises(BackendError, match="neither fp16 nor bf16"):
            compile_engine(
                read_student(student_onnx), tmp_path / "e", recipe=recipe("fp16"), backend="openvino", validation=None
            )
        return
    manifest, attempts = compile_engine(
        read_student(student_onnx), tmp_path / "e", recipe=recipe("fp16"), validation=None
    )
    assert {a.backend: a.ok for a in attempts} == {b.name: b.name != "onnxruntime" for b in installed()}
    assert sum(manifest.precision.get(p, 0) for p in ("fp16", "bf16")) >= 0.9
    assert "unchecked" in " ".join(manifest.notes)
    assert manifest.accuracy is None


def test_precision_that_does_not_run_is_an_error(
    student_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekd.backends.openvino._precision_hint", lambda recipe: "f32")
    with pytest.raises(BackendError, match="openvino runs 100% fp32; the recipe requests fp16"):
        compile_engine(
            read_student(student_onnx),
            tmp_path / "e",
            recipe=recipe("fp16"),
            backend="openvino",
            validation=None,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("asked", [256, 12])
def test_gate_shows_a_table_and_writes_nothing(
    student_onnx: Path, validation: tuple[np.ndarray, np.ndarray], tmp_path: Path, asked: int
) -> None:
    with pytest.raises(GateError) as caught:
        compile_engine(
            read_student(student_onnx),
            tmp_path / "e",
            recipe=recipe("int8", max_accuracy_drop=-100.0, calibration_images=asked),
            calibration=IMAGES,
            validation=validation,
        )
    for word in ("onnxruntime int8", "openvino int8", "12 validation images", "exit_0", "ensemble", "final", "-100.00"):
        assert word in caught.value.what
    assert ("more than 12" in caught.value.fix) == (asked == 12)  # of 256 there were no more
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("int8", "float_", "kept"), [((1, 0), None, "int8"), ((9, 7), (9, 8), "float"), ((3, 0), (4, 0), "int8")]
)
def test_the_heads_that_lose_less_are_kept(
    student_onnx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    int8: tuple[int, int],
    float_: tuple[int, int] | None,
    kept: str,
) -> None:
    """Images lost and gained of 168, which refuse none of these; above 0.6 points float heads are tried, too."""
    from edgekd.compiler import build

    counts = [PredictionAccuracy(1.0, 1.0, 168, n, g) for n, g in filter(None, (int8, float_))]
    found = iter([Accuracy(168, (), (), {"ensemble": c, "final": c}) for c in counts])
    monkeypatch.setattr(build, "check", lambda *args, **options: GateReport(None, next(found)))
    manifest, (attempt,) = compile_engine(
        read_student(student_onnx),
        tmp_path / "e",
        recipe=recipe("int8", max_accuracy_drop=0.6),
        backend="onnxruntime",
        calibration=IMAGES,
        validation=None,
    )
    assert f"exit heads: {kept} convolutions" in manifest.notes
    assert not list(found)
    assert "168 validation images cannot tell whether it is within 0.6" in manifest.notes[-1]
    assert attempt.drop is not None
    assert attempt.drop_bounds is not None
    assert attempt.drop_bounds[0] < attempt.drop < attempt.drop_bounds[1]
    assert open_engine(tmp_path / "e").logits(IMAGES[:1]).shape == (4, 1, 5)
    assert {p.name for p in (tmp_path / "e").iterdir()} == {*manifest.files, "manifest.json"}


def test_answers_are_judged_and_exits_reported(
    student_onnx: Path, validation: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    """A shallow exit that is worth nothing does not refuse an engine whose answers are right."""
    engine = open_engine(student_onnx)
    images, labels = validation
    logits = engine.logits(images)
    better = logits.copy()
    better[0] = 100.0 * np.eye(5, dtype=np.float32)[labels]  # what the first exit would have answered rightly
    better[1:] = 1000.0 * np.eye(5, dtype=np.float32)[labels]
    report = check(engine, Validation(images, labels, better), recipe=recipe("fp16", max_accuracy_drop=50.0))
    assert report.refusal is None
    assert report.accuracy is not None
    assert report.accuracy.reference[0] - report.accuracy.engine[0] >= 0.5
    assert report.accuracy.predictions["final"] == PredictionAccuracy(1.0, 1.0, 12, 0, 0)


def test_the_table_shows_a_refusal_whole() -> None:
    table = _attempts(
        [
            Attempt("openvino", True, 1.5, {}, 0.6, (-0.6, 1.8), "in one piece 1.40 ms"),
            Attempt("onnxruntime", False, note="loses too much:\n  exit_0  99.0\n  final   98.0"),
        ]
    )
    assert "0.60 [-0.60, 1.80]" in table
    assert table.endswith("\nonnxruntime: loses too much:\n  exit_0  99.0\n  final   98.0")


def test_heads_stay_float_when_quantised_ones_are_refused(
    student_onnx: Path, validation: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekd.compiler import build

    asked, check = [], build.check

    def refuse_first(*args: object, **options: object) -> object:
        asked.append(args)
        if len(asked) == 1:
            return GateReport(refusal=GateError("too far"))
        return check(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(build, "check", refuse_first)
    manifest, _ = compile_engine(
        read_student(student_onnx),
        tmp_path / "e",
        recipe=recipe("int8", max_accuracy_drop=100.0),
        backend="onnxruntime",
        calibration=IMAGES,
        validation=validation,
    )
    assert manifest.precision["int8"] == pytest.approx(20 / 58)
    assert manifest.notes[:2] == ("quantised exit heads were refused: too far", "exit heads: float convolutions")
    assert manifest.calibration.images == 12


SMALL_IMAGES = np.random.default_rng(4).normal(size=(40, 3, 16, 16)).astype(np.float32)


def compile_small(folder: Path, **overrides: object) -> tuple[Manifest, Attempt]:
    """Compile a small network for ONNX Runtime, judged by its own answers."""
    student = read_student(small_student(folder / "student.onnx"))
    labels = open_engine(folder / "student.onnx").logits(SMALL_IMAGES)[-1].argmax(axis=1)
    manifest, (attempt,) = compile_engine(
        student,
        folder / "e",
        recipe=load_recipe("int8", {"batch_sizes": [1], **overrides}),
        backend="onnxruntime",
        calibration=SMALL_IMAGES,
        validation=(SMALL_IMAGES, labels),
    )
    return manifest, attempt


def test_int8_that_loses_too_much_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate refuses all but an engine that has a block in float; engines are chosen before they are judged."""
    from edgekd.compiler import build

    judged = []

    def refuse(engine: Engine, *args: object, **options: object) -> GateReport:
        judged.append(engine)
        report = check(engine, *args, **options)  # type: ignore[arg-type]
        return report if len(judged) == 4 else replace(report, refusal=GateError("too far"))

    monkeypatch.setattr(build, "check", refuse)
    monkeypatch.setattr("edgekd.compiler.int8.WORTHWHILE", 2.0)  # all that is tried is kept
    manifest, attempt = compile_small(tmp_path, max_accuracy_drop=50.0)
    assert len(judged) == 4  # int8 heads, float heads, other ranges and corrections, one block in float
    notes = "\n".join(manifest.notes)
    for words in ("percentile ranges", "entropy ranges", "equalised channels and bias correction", "1 block"):
        assert words in notes
    assert re.search(r"left in float: .+; stages take [\d.]+ ms on one image, [\d.]+ times", notes)
    assert "stages take" in attempt.note
    assert 0.2 <= manifest.precision["int8"] < 1
    assert {p.name for p in (tmp_path / "e").iterdir()} == {*manifest.files, "manifest.json"}


def test_a_refusal_lists_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd.compiler import build

    reports = []

    def refuse(*args: object, **options: object) -> GateReport:
        reports.append(check(*args, **options))  # type: ignore[arg-type]
        return replace(reports[-1], refusal=GateError(f"too far: {len(reports)}"))

    monkeypatch.setattr(build, "check", refuse)
    with pytest.raises(GateError, match="angular error of the logits on calibration images") as caught:
        compile_small(tmp_path, max_accuracy_drop=50.0, int8_attempts=3)
    assert caught.value.what.count(" points") == len(reports) - 2 <= 3
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("most", "attempts", "counts"), [(0, 5, []), (1, 5, [1]), (6, 5, [1, 2, 4, 6]), (24, 3, [1, 2, 24]), (6, 0, [])]
)
def test_few_engines_with_blocks_in_float_are_judged(most: int, attempts: int, counts: list[int]) -> None:
    assert _doubling(most, attempts) == counts


@pytest.mark.parametrize("calibration", [None, IMAGES[:0]])
def test_int8_without_images(student_onnx: Path, tmp_path: Path, calibration: np.ndarray | None) -> None:
    with pytest.raises(ConfigError, match="calibration images of the training split"):
        compile_engine(
            read_student(student_onnx), tmp_path / "e", recipe=recipe("int8"), calibration=calibration, validation=None
        )


def test_other_folders_are_not_replaced(student_onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is not an engine"):
        compile_engine(read_student(student_onnx), tmp_path, recipe=recipe("fp32"), validation=None)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_full_disk_leaves_the_old_engine(student_onnx: Path, tmp_path: Path, backend: str) -> None:
    out, options = tmp_path / "e", {"recipe": recipe("fp32", batch_sizes=[1]), "validation": None}
    compile_engine(read_student(student_onnx), out, backend=backend, **options)
    before = (out / "manifest.json").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises((OSError, BackendError)):
            compile_engine(read_student(student_onnx), out, backend=backend, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (out / "manifest.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["e"]
    assert open_engine(out).logits(IMAGES[:1]).shape == (4, 1, 5)


def test_interrupted_leaves_nothing(student_onnx: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_engine(
            read_student(student_onnx),
            tmp_path / "e",
            recipe=recipe("fp32"),
            backend="onnxruntime",
            validation=None,
            progress=interrupt,
        )
    assert list(tmp_path.iterdir()) == []
