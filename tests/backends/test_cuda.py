"""CUDA through either of its bindings, and that the fake is as strict as the tests need.

No GPU is involved: the fakes run the graphs in ONNX Runtime. What TensorRT makes of a graph, and how fast, only a GPU
tells: benchmarks/gpu.
"""

from __future__ import annotations

import enum
import gc
import operator
import re
import sys
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from fakes.cuda import Cuda, Error, RuleBroken
from fakes.machine import IMAGES, Box, engine_of, policies, recipe
from fakes.tensorrt import FAMILIES

from edgekd import host
from edgekd.backends.base import find_backend
from edgekd.backends.cuda import cuda_python
from edgekd.backends.cuda.cuda_python import Bindings, CudaPython, load
from edgekd.backends.cuda.device import device, find
from edgekd.backends.tensorrt import device_exit
from edgekd.backends.tensorrt.library import TENSORRT
from edgekd.errors import BackendError, ConfigError
from edgekd.runtime.classifier import Classifier
from edgekd.runtime.engine import open_engine


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fake_has_the_real_names_and_no_others(box: Callable[..., Box], family: str) -> None:
    box(family)
    trt = TENSORRT.trt
    assert hasattr(trt.BuilderFlag, "FP16") == (family != "11.4")
    assert hasattr(trt, "IProgressMonitor") == (family[0] != "8")
    config = trt.Builder(TENSORRT.logger).create_builder_config()
    with pytest.raises(AttributeError, match="no attribute 'fp16'"):
        config.fp16 = True
    assert hasattr(trt.ICudaEngine, "device_memory_size")  # of the fake: every version has the code …
    assert not hasattr(trt.Runtime(TENSORRT.logger), "invented")


def test_the_fake_cuda_punishes(box: Callable[..., Box]) -> None:
    cuda = box("10.3").cuda
    with device() as gpu:
        memory, host = gpu.allocate(1024), gpu.pinned((256,), np.float32)
        address = memory.address
        gpu.download(host, address)
        assert np.isnan(host).all()  # nothing has come yet
        gpu.synchronize()
        assert not host.any()
        with pytest.raises(RuleBroken, match="not pinned"):
            gpu.upload(address, np.zeros(4, np.float32))
        with pytest.raises(RuleBroken, match="reach beyond"):
            gpu.move(address + 1000, address, 100)
        with pytest.raises(RuleBroken, match="overlaps"):
            gpu.move(address, address + 4, 16)
        gpu.download(host, address)
        with pytest.raises(RuleBroken, match="freed while"):
            cuda.free(address)
        gpu.synchronize()
        del memory
        with pytest.raises(RuleBroken, match="it was freed"):
            gpu.download(host, address)
        graph = gpu.capture(lambda: None)
        handle = graph.handle
        del graph
        with pytest.raises(RuleBroken, match="no live"):
            cuda.alive(handle)


def test_without_cuda_graphs(
    box: Callable[..., Box], small_student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cuda = box("10.3").cuda
    cuda.can_capture = False
    engine = engine_of(small_student, tmp_path)
    got = engine.staged_logits(IMAGES)
    assert got == pytest.approx(open_engine(small_student, threads=1).logits(IMAGES), abs=1e-4)
    assert (cuda.launches, cuda.plain > 0) == (0, True)
    assert caplog.text.count("no CUDA graphs") == 1
    assert "StreamCaptureInvalidated" in caplog.text


@pytest.mark.parametrize("bindings", [("pycuda",), ("cuda-python", "pycuda")])
def test_pycuda_when_chosen_or_alone(
    box: Callable[..., Box],
    bindings: tuple[str, ...],
    small_student: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = box("8.6", bindings=bindings).cuda
    if len(bindings) > 1:
        assert device().bindings == "cuda-python"
        find.cache_clear()
        monkeypatch.setenv("EDGEKD_CUDA", "pycuda")
    assert device().bindings == "pycuda"
    engine, reference = engine_of(small_student, tmp_path), open_engine(small_student, threads=1)
    policy = policies(reference.logits(IMAGES))[-1]
    found, want = (Classifier(e, policy=policy).run(IMAGES) for e in (engine, reference))
    assert found.exits.tolist() == want.exits.tolist()
    assert (cuda.launches, caplog.text.count("pycuda has no CUDA graphs")) == (0, 1)


def test_bindings_that_are_not_there(box: Callable[..., Box], monkeypatch: pytest.MonkeyPatch) -> None:
    box("10.3", bindings=())
    with pytest.raises(BackendError, match=r"neither cuda-python nor pycuda is installed[\s\S]*edgekd\[tensorrt\]"):
        find_backend("tensorrt").build(onnx.ModelProto(), Path("x.plan"), recipe=recipe())
    monkeypatch.setenv("EDGEKD_CUDA", "pycuda")
    with pytest.raises(BackendError, match="pycuda is not installed"):
        device()
    monkeypatch.setenv("EDGEKD_CUDA", "pycudda")
    with pytest.raises(ConfigError, match="Did you mean 'pycuda'"):
        device()


@pytest.mark.parametrize("bindings", [12060, 12090])
def test_no_driver(box: Callable[..., Box], bindings: int) -> None:
    """Bindings up to 12.8 raise instead of returning a code."""
    box("10.3", cuda=Cuda(driver=0, bindings=bindings))
    with pytest.raises(BackendError, match=r"no NVIDIA driver was found[\s\S]*--runtime nvidia"):
        device()


def test_functions_that_the_driver_lacks() -> None:
    def lacking() -> None:
        raise RuntimeError('Function "cuGraphAddNode_v2" not found')

    def missing() -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    bindings = Bindings(types.SimpleNamespace(lacking=lacking, missing=missing, cudaHostAllocDefault=0))
    with pytest.raises(BackendError, match=r"older than the CUDA bindings: Function \"cuGraphAddNode_v2\""):
        bindings.lacking()
    with pytest.raises(BackendError, match="no NVIDIA driver was found: Failed to dlopen"):
        bindings.missing()
    assert (bindings.cudaHostAllocDefault, hasattr(bindings, "other")) == (0, False)


def test_why_installed_bindings_do_not_load_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cuda" / "bindings").mkdir(parents=True)
    (tmp_path / "cuda" / "bindings" / "runtime.py").write_text("import cuda.pathfinder\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(BackendError, match=r"cuda-python cannot be loaded: No module named 'cuda\.pathfinder'"):
        load("runtime")
    assert load("driver") is None
    (tmp_path / "cuda" / "cudart.py").write_text("")  # as up to 12.6.0
    (tmp_path / "cuda" / "bindings" / "runtime.py").unlink()
    assert load("runtime").__name__ == "cuda.cudart"
    for name in [name for name in sys.modules if name.split(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("release", "pin"), [("36 (release), REVISION: 4.3", "12.6"), ("36 (release), REVISION: 3.0", "12.2"),
                         ("35 (release), REVISION: 4.1", "11.8"), ("39 (release), REVISION: 2.1", "13.2")],
)  # fmt: skip
def test_a_jetson_without_bindings(
    box: Callable[..., Box], release: str, pin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "nv_tegra_release").write_text(f"# R{release}, GCID: 38968081, BOARD: generic\n")
    monkeypatch.setattr(host, "ROOT", tmp_path)
    box("10.3", bindings=())
    with pytest.raises(BackendError) as error:
        device()
    assert error.value.fix == f"pip install 'cuda-python=={pin}.*'"


@pytest.mark.parametrize("bindings", ["cuda-python", "pycuda"])
@pytest.mark.parametrize(
    ("integrated", "requested", "schedule", "flag"),
    [(True, None, "spin", 1), (True, "auto", "auto", 0), (False, None, "auto", 0), (False, "block", "block", 4)],
)
def test_the_host_spins_on_a_jetson(
    box: Callable[..., Box], bindings: str, integrated: bool, requested: str | None, schedule: str, flag: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    cuda = box("8.6", cuda=Cuda(integrated=integrated), bindings=(bindings,)).cuda
    library = types.SimpleNamespace(
        cuDeviceGet=lambda gpu, ordinal: 0, cuDevicePrimaryCtxSetFlags_v2=lambda gpu, flags: cuda.set_schedule(flags)
    )
    monkeypatch.setattr("ctypes.CDLL", lambda name: {"libcuda.so.1": library}[name])
    monkeypatch.delenv("EDGEKD_CUDA_SCHEDULE", raising=False)
    if requested:
        monkeypatch.setenv("EDGEKD_CUDA_SCHEDULE", requested)
    assert (device().schedule, cuda.schedule) == (schedule, flag)
    assert device().facts()["cuda_schedule"] == schedule


def test_an_unknown_way_to_wait(box: Callable[..., Box], monkeypatch: pytest.MonkeyPatch) -> None:
    box("8.6")
    monkeypatch.setenv("EDGEKD_CUDA_SCHEDULE", "spinn")
    with pytest.raises(ConfigError, match="Did you mean 'spin'"):
        device()


class Cycle:
    """Something that only the garbage collector frees."""

    def __init__(self, held: object) -> None:
        self.me, self.held = self, held


def test_memory_that_is_collected_during_a_capture(box: Callable[..., Box]) -> None:
    cuda = box("10.3").cuda
    with device() as gpu:
        kept, lost = gpu.allocate(256), [gpu.allocate(256), gpu.pinned((4,), np.float32)]
        address = lost[0].address  # type: ignore[attr-defined]
        Cycle(lost)
        del lost

        def work() -> None:
            gpu.move(kept.address, kept.address + 128, 64)
            gc.collect()
            assert address in cuda.blocks

        graph = gpu.capture(work)
        assert (address in cuda.blocks, cuda.pinned) == (False, {})
        gpu.launch(graph)
        gpu.synchronize()


def test_failed_captures_leave_no_graph_behind(box: Callable[..., Box], monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = box("10.3").cuda
    with device() as gpu:
        assert isinstance(gpu, CudaPython)
        before = set(cuda.live)
        with pytest.raises(ZeroDivisionError):
            gpu.capture(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
        monkeypatch.setattr(
            gpu.runtime, "cudaGraphInstantiateWithFlags", lambda *_: (Error.cudaErrorMemoryAllocation, 0)
        )
        with pytest.raises(BackendError, match="MemoryAllocation"):
            gpu.capture(lambda: None)
        assert cuda.live == before


def test_pycuda_frees_everything_in_its_context(box: Callable[..., Box]) -> None:
    """What it frees elsewhere it leaks, with a warning."""
    cuda = box("8.6", bindings=("pycuda",)).cuda

    def use() -> None:
        with device() as gpu:
            memory, host = gpu.allocate(64), gpu.pinned((16,), np.float32)
            assert (len(cuda.blocks), len(cuda.pinned)) == (1, 1)
            view = host[:4]
            del host
            gpu.download(view, memory.address)
            gpu.synchronize()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(use).result()
    assert (cuda.blocks, cuda.pinned, len(cuda.live)) == ({}, {}, 1)
    find.cache_clear()
    gc.collect()
    assert (cuda.live, cuda.leaked) == (set(), [])


def test_pycuda_out_of_pinned_memory(box: Callable[..., Box]) -> None:
    box("8.6", bindings=("pycuda",)).cuda.limit = 1 << 20
    with pytest.raises(BackendError, match=r"cuMemHostAlloc failed[\s\S]*2 MiB were requested"), device() as gpu:
        gpu.pinned((1 << 21,), np.int8)


def test_an_error_of_the_context_does_not_keep_the_gpu(
    box: Callable[..., Box], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the GPU makes every later call fail, also the one that leaves the context."""
    box("8.6", bindings=("pycuda",))
    gpu = device()
    failing = lambda: (_ for _ in ()).throw(gpu._cu.Error("cuCtx failed: unspecified launch failure"))  # noqa: E731
    for call in ("push", "pop"):
        with monkeypatch.context() as patch:
            patch.setattr(gpu._context, call, failing)  # type: ignore[attr-defined]
            with pytest.raises(BackendError, match="unspecified launch failure"), gpu:
                pass
    with ThreadPoolExecutor(1) as pool:  # another thread can have it
        assert pool.submit(lambda: gpu.__enter__() and gpu.__exit__(None, None, None)).result(timeout=10) is None


def test_an_error_of_the_driver_is_named(box: Callable[..., Box]) -> None:
    """The runtime describes no error but its own."""
    box("10.3")
    gpu = device()
    assert isinstance(gpu, CudaPython)

    class Refused(enum.IntEnum):
        CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222

    with pytest.raises(BackendError, match=r"CUDA reports CUDA_ERROR_UNSUPPORTED_PTX_VERSION[\s\S]*newer driver"):
        gpu.do((Refused.CUDA_ERROR_UNSUPPORTED_PTX_VERSION, None), fix="take a newer driver")


def test_the_real_bindings_have_every_name() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    driver = pytest.importorskip("cuda.bindings.driver")
    source = "".join(Path(module.__file__).read_text() for module in (cuda_python, device_exit))
    found = set(re.findall(r"\bruntime\.(cuda\w+(?:\.cuda\w+)?)", source))
    assert len(found) > 25
    for name in found:
        operator.attrgetter(name)(runtime)
    for name in re.findall(r"\bdriver(?:\(\))?\.(cu\w+)", source):
        operator.attrgetter(name)(driver)


def test_the_real_bindings_tell_that_there_is_no_driver() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    if not runtime.cudaGetDeviceCount()[0]:
        pytest.skip("there is a GPU")
    with pytest.raises(BackendError, match="no NVIDIA driver was found"):
        CudaPython(runtime)
