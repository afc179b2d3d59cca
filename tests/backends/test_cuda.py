"""CUDA through either of its bindings, and that the fake is as strict as the tests need.

No GPU is involved: the fakes run the graphs in ONNX Runtime. What TensorRT makes of a graph, and how fast, only a GPU
tells: benchmarks/gpu.
"""

from __future__ import annotations

import enum
import operator
import re
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from fakes.cuda import RuleBroken
from fakes.machine import IMAGES, Box, engine_of, policies, recipe
from fakes.tensorrt import FAMILIES

from edgekd.backends.base import find_backend
from edgekd.backends.cuda import cuda_python
from edgekd.backends.cuda.cuda_python import CudaPython
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


def test_a_driver_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bindings up to 12.8 raise instead of answering with a code."""

    def missing() -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    runtime = types.SimpleNamespace(cudaGetDeviceCount=missing)
    with pytest.raises(
        BackendError, match=r"no NVIDIA driver was found: Failed to dlopen libcuda[\s\S]*--runtime nvidia"
    ):
        CudaPython(runtime)


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
