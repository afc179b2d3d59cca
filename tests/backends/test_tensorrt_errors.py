"""What TensorRT, CUDA and their absence do to `edgekd compile`, and what the user is told.

No GPU is involved: the fakes run the graphs in ONNX Runtime. What TensorRT makes of a graph, and how fast, only a GPU
tells: benchmarks/gpu.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from fakes.cuda import Cuda
from fakes.machine import IMAGES, Box, compiled, engine_of, recipe

from edgekd.artifacts.metadata import put_metadata, read_onnx, read_student
from edgekd.backends.base import find_backend
from edgekd.backends.cuda.device import device, find
from edgekd.backends.tensorrt.library import TENSORRT
from edgekd.compiler.build import compile_engine
from edgekd.errors import ArtifactError, BackendError
from edgekd.runtime.engine import open_engine


@pytest.mark.parametrize("bindings", ["cuda-python", "pycuda"])
def test_no_driver_and_no_gpu_are_found_before_tensorrt_is_touched(
    box: Callable[..., Box], bindings: str, small_student: Path, tmp_path: Path
) -> None:
    for cuda, text in ((Cuda(driver=0), "driver"), (Cuda(count=0), "finds no GPU")):
        machine = box("10.3", cuda=cuda, bindings=(bindings,))
        with pytest.raises(BackendError, match=text):
            compiled(small_student, tmp_path / "e.engine", recipe())
        assert "tensorrt" not in machine.finder.imported


@pytest.mark.parametrize(
    ("driver", "bindings", "pin"),
    [
        (11040, 12090, "11.8"),
        (12060, 12090, "12.6"),
        (12020, 12090, "12.2"),
        (12070, 12080, "12.6"),
        (12090, 13000, "12.9"),
    ],
)
def test_a_driver_older_than_the_bindings(box: Callable[..., Box], driver: int, bindings: int, pin: str) -> None:
    """Also of the same major version, which a Jetson may refuse; no cuda-python was made for 11.4 and 12.7."""
    box("10.3", cuda=Cuda(driver=driver, bindings=bindings, integrated=True))
    with pytest.raises(BackendError, match=r"supports CUDA 1\d\.\d+; the CUDA bindings are for 1\d\.\d") as error:
        device()
    assert error.value.fix == f"pip install 'cuda-python=={pin}.*', or a newer driver"


@pytest.mark.parametrize(
    ("trouble", "what", "fix"),
    [
        ({"out_of_memory": True}, "cannot build stage_0 as fp16", "workspace_share"),
        ({"no_reason": True}, "gives no reason", "report"),
        ({"cannot_start": True}, "initialization failure with error: 35", "report"),
        ({"unknown_sm": True}, "SM 53 is not supported", r"Orin \(SM 8\.7\)"),
        (
            {"operators": ("GlobalAveragePool",)},
            r"node 'pool0' \(GlobalAveragePool\): No importer",
            "another --backend",
        ),
        ({"ignores_fp16": True}, "runs 100% fp32; the recipe requests fp16", "another --recipe"),
        ({"damaged_information": True}, "inspector gives no layers", "report"),
        ({"cannot_run": True}, "cannot run stage_0", "report"),
    ],
)
def test_tensorrt_fails(
    box: Callable[..., Box], trouble: dict[str, Any], what: str, fix: str, small_student: Path, tmp_path: Path
) -> None:
    box("10.3", **trouble)
    with pytest.raises(BackendError, match=rf"{what}[\s\S]*{fix}"):
        compiled(small_student, tmp_path / "e.engine", recipe("fp16"))
    assert not (tmp_path / "e.engine").exists()


def test_opset_that_is_too_new(box: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    box("8.6")
    model, metadata = read_onnx(small_student)
    model.opset_import[0].version = 18
    put_metadata(model, metadata)
    onnx.save(model, str(tmp_path / "new.onnx"))
    with pytest.raises(BackendError, match=r"8\.6\.1 understands opset 17; stage_0 has opset 18[\s\S]*newer TensorRT"):
        compiled(tmp_path / "new.onnx", tmp_path / "e.engine", recipe())


def test_layers_that_tell_nothing_do_not_refuse_an_engine(
    box: Callable[..., Box], small_student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A compiler may put all layers of a small network into one."""
    box("10.3", opaque_layers=True)
    manifest = compiled(small_student, tmp_path / "e.engine", recipe("fp16"))
    assert manifest.precision == {}
    assert "tensorrt does not tell which precision runs" in manifest.notes
    assert "the precision of 0 of 0 layers of stage_0" in caplog.text


def test_what_is_logged_of_a_build(box: Callable[..., Box], caplog: pytest.LogCaptureFixture) -> None:
    """A build has up to a million messages. Weights that overflow are told, as the accuracy suffers."""
    box("10.3")
    with device():
        logger, severity = TENSORRT.logger, TENSORRT.trt.Logger
    logger.log(severity.VERBOSE, "Tactic: 0x1 Time: 0.1")
    logger.log(severity.VERBOSE, "Layers:\nName: a")
    logger.log(severity.WARNING, "Detected layernorm nodes in FP16.")
    assert not caplog.records
    logger.log(severity.WARNING, "2 weights would overflow in FP16 and are converted to the closest finite value.")
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert logger.listing == "Layers:\nName: a"
    caplog.set_level("DEBUG", "edgekd.backends.tensorrt.library")
    logger.log(severity.INFO, "Engine generation completed")
    assert "TensorRT: Engine generation completed" in caplog.text
    TENSORRT.forget_messages()
    assert (logger.listing, len(logger.warnings)) == ("", 0)


def test_int8_where_there_is_none(box: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    box("8.6", fast_int8=False)
    with pytest.raises(BackendError, match=r"Orin \(SM 8\.7\) has no fast int8[\s\S]*fp16"):
        compiled(small_student, tmp_path / "e.engine", recipe("int8"))


def test_gpu_memory_runs_out(box: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    machine = box("10.3")
    engine = engine_of(small_student, tmp_path)
    machine.cuda.limit = 0
    with pytest.raises(BackendError, match=r"MemoryAllocation[\s\S]*smaller batch_sizes"):
        engine.staged_logits(IMAGES)


def test_engines_of_other_versions_and_gpus(box: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    out = tmp_path / "student.engine"
    box("10.3")
    compiled(small_student, out, recipe())
    box("11.4")
    with pytest.raises(
        ArtifactError, match=r"by TensorRT 10\.3\.0; this machine has 11\.4\.0\.106[\s\S]*edgekd compile"
    ):
        open_engine(out)
    cuda = Cuda()
    cuda.name, cuda.sm = "T4", (7, 5)
    box("10.3", cuda=cuda)
    with pytest.raises(
        ArtifactError, match=r"for Orin \(SM 8\.7\); this machine has T4 \(SM 7\.5\)[\s\S]*--recipe fp32"
    ):
        open_engine(out)


def test_a_driver_that_tensorrt_cannot_start_with(box: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    """A runtime would crash the interpreter, so on another driver than at the build a builder is made first."""
    box("10.3")
    compiled(small_student, tmp_path / "e.engine", recipe())
    box("10.3", cuda=Cuda(driver=13000), cannot_start=True)
    with pytest.raises(BackendError, match=r"cannot make its Builder[\s\S]*initialization failure with error: 35"):
        open_engine(tmp_path / "e.engine")


def test_a_file_that_tensorrt_refuses(box: Callable[..., Box], tmp_path: Path) -> None:
    box("10.3")
    (tmp_path / "stage_0.plan").write_bytes(b"nonsense")
    with pytest.raises(BackendError, match=r"cannot open[\s\S]*magicTag[\s\S]*compile it again"):
        find_backend("tensorrt").load(tmp_path / "stage_0.plan", recipe=recipe(), threads=1)


def test_another_gpu_of_the_same_kind_is_said(
    box: Callable[..., Box], small_student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine = box("10.3")
    engine_of(small_student, tmp_path)
    machine.cuda.name = "Orin NX"
    find.cache_clear()
    open_engine(tmp_path / "student.engine")
    assert "built on Orin, this machine has Orin NX" in caplog.text


def test_timing_cache_that_cannot_be_written(
    box: Callable[..., Box],
    small_student: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    box("10.3")
    compiled(small_student, tmp_path / "e.engine", recipe())
    assert "cannot be written" in caplog.text


def test_ctrl_c_ends_a_build(box: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    box("10.3")

    def stop(done: float, total: int) -> None:
        if done > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled(small_student, tmp_path / "e.engine", recipe(), progress=stop)
    assert list(tmp_path.glob("*e.engine*")) == []


def test_auto_goes_on_without_a_gpu(box: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    box("10.3", cuda=Cuda(driver=0))
    _, attempts = compile_engine(
        read_student(small_student),
        tmp_path / "e.engine",
        recipe=recipe(batch_sizes=(1,)),
        validation=None,
    )
    said = {a.backend: a.note for a in attempts if not a.ok}
    assert said == {"tensorrt": "no NVIDIA driver was found"}


def test_sixteen_bit_floats_beside_int8_where_there_are_none(small_student: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="onnxruntime has no fp16 kernels"):
        compiled(small_student, tmp_path / "e.engine", recipe("int8-fp16"), backend="onnxruntime")
