"""benchmarks/gpu without a GPU: preparing, the dry run, the steps on a fake TensorRT, and the table's verdicts."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.cuda import Cuda
from fakes.machine import Box
from helpers.device_kernel import Kernel, LoadedKernel
from PIL import Image

from edgekd.bench.record import read_record
from edgekd.data.images import load_subset
from edgekd.data.split import Item, Split, read_split
from edgekd.errors import GateError
from edgekd.files import atomic_write, sha256
from edgekd.runtime.engine import open_engine
from edgekd.serialization import to_json

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))
    for name in ("golden", "gpu", "measure", "prepare", "probe", "steps", "table"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def prepared(small_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both folders, of 60 pictures whose labels are what the network's last exit says."""
    import prepare

    folder = tmp_path_factory.mktemp("gpu")
    rng, data = np.random.default_rng(0), folder / "data"
    engine, items = open_engine(small_student, threads=1), []
    data.mkdir()
    for i in range(60):
        image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((40, 30), Image.Resampling.BICUBIC)
        image.save(data / f"{i}.jpg")
        label = engine.logits(engine.metadata.preprocess(image)[None])[-1].argmax()
        items.append(Item(f"{i}.jpg", int(label), digest=sha256(data / f"{i}.jpg")))
    parts = {"train": tuple(items[:20]), "val": tuple(items[20:40]), "test": tuple(items[40:])}
    split = Split(engine.metadata.classes, parts, "by hand", 0, "none", 0, 0, "fingerprint")
    atomic_write(folder / "split.json", to_json(split))
    words = ["--student", small_student, "--plain", small_student, "--data", data, "--split", folder / "split.json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare.py", *map(str, words), "--out", str(folder / "out"), "--test", "12"])
        assert prepare.main() == 0
    return folder / "out"


def asked(prepared: Path, out: Path, recipe: str, **more: Any) -> argparse.Namespace:
    plain = {
        "batch_sizes": (1, 4),
        "seconds": 0.02,
        "optimization_level": 3,
        "no_library_tactics": True,
        "dry_run": False,
        "network": "student",
    }
    return argparse.Namespace(
        models=prepared / "models", images=prepared / "images", out=out, recipe=recipe, **plain | more
    )


def test_prepared_folders(prepared: Path, small_student: Path) -> None:
    assert (prepared / "models" / "student.onnx").read_bytes() == small_student.read_bytes()
    split = read_split(prepared / "images")
    assert {part: len(items) for part, items in split.subsets.items()} == {"train": 20, "val": 20, "test": 12}
    assert Image.open(prepared / "images" / split.subset("test")[0].path).size == (16, 16)
    engine = open_engine(prepared / "models" / "student.onnx", threads=1)
    for part in ("val", "test"):
        images, labels = load_subset(split, part, data=prepared / "images", preprocess=engine.metadata.preprocess)
        kept = np.load(prepared / "models" / "student.npz")[part]
        np.testing.assert_allclose(engine.logits(images), kept, atol=1e-5)
        assert (kept[-1].argmax(axis=1) == labels).mean() > 0.7  # JPEG moved some
    assert len(list((prepared / "models" / "calibration").glob("*.json"))) >= 2


def test_prepare_refuses_networks_that_see_other_images(
    prepared: Path,
    student_onnx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import prepare

    words = ["--student", prepared / "models" / "student.onnx", "--plain", student_onnx, "--data", tmp_path]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, words), "--out", str(tmp_path / "out")])
    assert prepare.main() == 1
    assert "student: 16 pixels, 5 classes, plain: 32 pixels" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_steps_on_a_fake_gpu(
    box: Callable[..., Box], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but CUDA events, power and other processes."""
    import steps

    def spans(gpu: Any, work: Callable[[], object], *, seconds: float) -> list[float]:
        work()
        gpu.synchronize()
        return [1.0]

    monkeypatch.setattr(steps, "spans", spans)
    monkeypatch.setattr(steps, "gaps", lambda gpu, stages, walk, *, seconds: [(walk(), 0.01)[1] for _ in stages])
    monkeypatch.setattr(steps, "Meter", lambda gpu: (_ for _ in ()).throw(steps.NotMeasured("no NVML here")))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # a machine that cannot install anything
    box("8.6")
    found = steps.build(asked(prepared, tmp_path, "fp16"))
    assert found["precision"] == {"fp16": 1}
    assert max(found["parity"]["max_abs_logit_difference"]) < 0.1
    assert found["accuracy"]["validation_images"] == 20
    assert set(found["stage_ms"]) == {"1", "4"}
    assert found["tuned"]["accuracy"] > 0.5
    clocks = steps.on_device(asked(prepared, tmp_path, "fp16"))
    assert set(clocks["device_ms"]) == {"monolithic", "final", "stage_0", "stage_1", "stage_2"}
    assert clocks["gap_us"] == pytest.approx(10)
    assert clocks["energy"] == {"not measured": "no NVML here"}
    assert clocks["gpu"] == "Orin"
    assert steps.short(asked(prepared, tmp_path, "fp16")) == {}
    told = steps.layers(asked(prepared, tmp_path, "fp16"))
    kept = json.loads((tmp_path / told["file"]).read_text())
    assert set(kept) == set(clocks["device_ms"])
    assert {layer["LayerType"] for layer in kept["stage_0"]["layers"]} >= {"CaskConvolution", "Reformat"}
    assert kept["stage_1"]["ends"]["stage_0"]["dtype"].endswith("HALF")
    assert set(steps.build_times(asked(prepared, tmp_path, "fp16"))["seconds"]) == {
        "no cache",
        "empty cache",
        "full cache",
    }


def test_probe_on_a_fake_gpu(box: Callable[..., Box], kernels: Callable[[str], Kernel]) -> None:
    """What needs neither NVRTC nor mapped memory."""
    import probe

    kernel, cuda = LoadedKernel(kernels), Cuda()
    cuda.limit = 1 << 30
    box("8.6", cuda=cuda, kernel=kernel)
    kernel.conditions = cuda.graphs.conditions if cuda.graphs else {}
    found = probe.layer(argparse.Namespace())
    assert all(found[key] for key in ("zeroed", "copied", "replayed", "after_a_failed_capture"))
    assert "cudaErrorMemoryAllocation" in found["too_much_memory"]
    assert "cudaErrorStreamCapture" in found["capture_refused"]
    kernel.conditions = cuda.graphs.conditions
    found = probe.cascade(argparse.Namespace(seconds=0.01))
    assert all(row["same_exits"] == 1 and row["off_by"] < 1e-5 for row in found.values())
    assert found["never"]["left_at"] == [0, 0, 0, 200]


def test_int8_on_a_fake_gpu_needs_no_onnxruntime(
    box: Callable[..., Box], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import steps

    machine = box("10.3")
    calibrations = Path(os.environ["XDG_CACHE_HOME"]) / "edgekd" / "calibration"
    calibrations.parent.mkdir(parents=True)
    calibrations.symlink_to(prepared / "models" / "calibration")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(steps, "DROP", 100.0)  # with 20 pictures, one that changes sides is 5 points
    found = steps.build(asked(prepared, tmp_path, "int8-fp16"))
    assert found["precision"]["int8"] > 0.4
    assert found["calibration_method"] == "minmax"
    assert machine.trt.built
    monkeypatch.setattr(steps, "DROP", -101.0)
    with pytest.raises(GateError) as error:
        steps.build(asked(prepared, tmp_path, "int8"))
    refusals = [line for line in error.value.what.splitlines() if "loses too much accuracy on 20" in line]
    assert [line.partition(":")[0] for line in refusals] == ["minmax", "entropy"]


@pytest.mark.slow
def test_dry_run(prepared: Path, tmp_path: Path) -> None:
    words = [
        FOLDER / "run.sh",
        prepared / "models",
        prepared / "images",
        tmp_path / "out",
        "--dry-run",
        "--seconds=0.02",
    ]
    words += ["--batch-sizes=1,4", "--recipes=fp16,fp32"]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert done.stdout == (out / "table.md").read_text()
    assert "**Dry run: ONNX Runtime on the CPU" in done.stdout
    assert "- build student fp16: refused: onnxruntime has no fp16 kernels" in done.stdout
    assert "| student fp32: no-early-exit |" in done.stdout
    record = read_record(out / "records" / "student-fp32.json")
    assert [v.name for v in record.variants][-3:] == ["full", "final", "plain"]
    steps = json.loads((out / "steps.json").read_text())["steps"]
    assert {(s["step"], s["network"], s["outcome"]) for s in steps if s["recipe"] == "fp32"} == {
        ("build", "student", "done"),
        ("build", "plain", "done"),
        ("records", "student", "done"),
        ("layers", "student", "skipped"),
        ("device", "student", "skipped"),
        ("device", "plain", "skipped"),
    }


def test_no_step_begins_when_the_time_is_up_and_a_crash_is_one_steps(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import measure

    (tmp_path / "dies.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "dies.py")])
    space = asked(prepared, tmp_path, "fp16")
    crashed = measure._run(space, "build", "student", "fp16", time.monotonic() + 60)
    assert (crashed["outcome"], crashed["why"]) == ("failed", "ended by signal 11")
    assert measure._run(space, "build", "student", "fp16", 0.0)["why"] == "the time budget was used up"
    assert measure._run(space, "short", "student", "fp16", 0.0, before=None)["why"].startswith("compute-sanitizer")


def test_gaps_and_spans_by_a_clock_of_its_own() -> None:
    """Events of a GPU on which every launch takes 2 ms and all between two takes 0.5."""
    import gpu as module

    class Runtime:
        now, marks = 0.0, {}

        def cudaEventCreate(self) -> object:
            return object()

        cudaEventRecordExternal = 1

        def cudaEventRecord(self, event: object, stream: int) -> None:
            self.marks[event] = self.now

        def cudaEventRecordWithFlags(self, event: object, stream: int, flags: int) -> None:
            assert flags == self.cudaEventRecordExternal
            self.marks[event] = self.now

        def cudaEventElapsedTime(self, start: object, stop: object) -> float:
            return self.marks[stop] - self.marks[start]

    class Stage:
        def launch(self, count: int) -> None:
            self.enqueue()

        def batch(self, count: int) -> Stage:
            return self

        def enqueue(self) -> None:
            runtime.now += 2

    def launch(graph: Callable[[], None]) -> None:
        runtime.now += 0.25  # before the graph begins: a part of the gap
        graph()

    runtime, stages = Runtime(), [Stage(), Stage(), Stage()]
    device = argparse.Namespace(runtime=runtime, stream=0, do=lambda value: value, synchronize=lambda: None)
    device.capture, device.launch = lambda work: work, launch

    def walk() -> None:
        for stage in stages:
            runtime.now += 0.5
            stage.launch(1)

    assert set(module.gaps(device, stages, walk, seconds=0.01)) == {0.75}
    assert set(module.spans(device, walk, seconds=0.0)) == {7.5}
    assert "launch" not in vars(stages[0])
    with pytest.raises(module.NotMeasured, match="use cuda-python"):
        module.spans(argparse.Namespace(bindings="pycuda"), walk, seconds=0.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--recipes=fp17"], "no recipe fp17; known: fp16"), ([], "make both folders with benchmarks/gpu/prepare.py")],
)
def test_clear_errors(words: list[str], said: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(FOLDER / "run.sh"), str(tmp_path), str(tmp_path), str(tmp_path / "out"), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
        check=False,
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_tensorrt_or_python(prepared: Path, tmp_path: Path) -> None:
    words = [str(FOLDER / "run.sh"), str(prepared / "models"), str(prepared / "images"), str(tmp_path / "out")]
    if find_spec("tensorrt") is None:
        environment = {**os.environ, "PYTHON": sys.executable}
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 1
        assert "check student fp16: refused" in done.stderr
        assert "tensorrt is not installed\n  fix: pip install 'edgekd[tensorrt]'" in done.stderr
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHON": "false"}, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: false is not Python 3.10 or newer")


def test_verdicts_by_hand() -> None:
    from table import table

    def row(ms: float, accuracy: float) -> dict[str, Any]:
        return {"mean_ms": {"1": ms}, "accuracy": accuracy, "shares": (1.0,)}

    variants = {
        "cascade": row(0.5, 0.95),
        "no-early-exit": row(1.2, 0.96),
        "full": row(1.0, 0.96),
        "plain": row(1.0, 0.955),
    }
    host = {"cpu": "x", "backends": {"tensorrt": {"gpu": "Orin", "sm": "8.7"}}}
    build = {
        "host": host,
        "backend_version": "10.3.0",
        "build_seconds": 3.0,
        "bytes": {"a": 2**20},
        "precision": {"fp16": 1.0},
    }
    build |= {
        "parity": {"max_abs_logit_difference": [0.01, 0.03]},
        "accuracy": {"reference": [0.9, 0.9], "engine": [0.9, 0.899]},
    }
    device = {
        "device_ms": {"stage_0": {"1": 0.1}},
        "device_mib": 10.0,
        "energy": {"not measured": "no NVML"},
        "gap_us": 30.0,
    }
    common = {"network": "student", "recipe": "fp16", "outcome": "done"}
    steps = [
        {"step": "build", **common, **build},
        {"step": "records", **common, "variants": variants},
        {"step": "device", **common, **device},
        {
            "step": "build",
            "network": "student",
            "recipe": "int8",
            "outcome": "failed",
            "why": "Traceback\nKeyError: 'x'",
        },
    ]
    text = table(steps, Path(), dry_run=False)
    for line in (
        "network's, batch 1: 0.5 (target: at most 0.6): met",
        "from the plain network, points: 0.5 (target: at most 0.5): met",  # and in binary a little more
        "monolithic, fp16, batch 1: 1.2 (target: at most 1.15): NOT met",
        "between stages, fp16, microseconds: 30 (target: at most 25): NOT met",
        "int8-fp16 / fp16, cascade, batch 1: not measured (target: at most 1)",
        "student fp16: largest logit difference: 0.03 (target: at most 0.02): NOT met",
        "drop of the worst exit, points: 0.1 (target: at most 0.5): met",
        "- build student int8: failed: KeyError: 'x'",
        "Orin; SM 8.7; 10.3.0",
    ):
        assert line in text
    assert "Dry run" not in text
