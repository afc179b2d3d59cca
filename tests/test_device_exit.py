"""The cascade that the GPU ends itself: its kernel compiled for real and run on the CPU, its graph on a fake CUDA."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.box import IMAGES, RNG, Box, engine_of, policies
from fakes.cuda import Cuda

from edgekd.engines import open_engine
from edgekd.engines.trt_device_exit import ARGUMENTS, MEASURES, PTX, SOURCE
from edgekd.errors import BackendError, ConfigError
from edgekd.runtime.classifier import Classifier
from edgekd.runtime.policy import Average, Measure, Policy, step

HOST = (
    """
#include <cmath>
#define __global__
#define __device__
"""
    + SOURCE
    + """
static void (*sink)(unsigned long long, unsigned int);
extern "C" void cudaGraphSetConditional(unsigned long long handle, unsigned int value) { sink(handle, value); }
extern "C" void tell(void (*to)(unsigned long long, unsigned int)) { sink = to; }
"""
)


class Kernel:
    """The kernel's source, compiled for the CPU; `conditions` takes what it sets."""

    def __init__(self, library: Any) -> None:
        self.conditions: dict[int, int] = {}
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint32)(self._set)
        library.tell(self._callback)
        self._decide = library.decide
        self._decide.argtypes = ARGUMENTS

    def _set(self, handle: int, value: int) -> None:
        self.conditions[handle] = value

    def __call__(self, *values: Any) -> None:
        self._decide(*values)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    compiler = shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler to run the kernel on the CPU with")
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "decide.cpp").write_text(HOST)
    flags = [compiler, "-shared", "-fPIC", "-O1", str(folder / "decide.cpp"), "-o", str(folder / "decide.so")]
    subprocess.run(flags, check=True)
    return Kernel(ctypes.CDLL(str(folder / "decide.so")))


def compiled() -> bytes:
    """`SOURCE` as NVRTC translates it for Turing and newer, under a version that the driver of CUDA 12.4 reads."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="no CUDA bindings to compile with")
    try:
        _, program = nvrtc.nvrtcCreateProgram(SOURCE.encode(), b"decide.cu", 0, [], [])
    except RuntimeError as error:
        pytest.skip(f"no NVRTC to compile with: {error}")
    options = [b"--gpu-architecture=compute_75", b"--relocatable-device-code=true"]
    assert not int(nvrtc.nvrtcCompileProgram(program, len(options), options)[0])
    code = b" " * nvrtc.nvrtcGetPTXSize(program)[1]
    nvrtc.nvrtcGetPTX(program, code)
    return re.sub(rb"\.version \d\.\d", b".version 7.0", code.rstrip(b"\0"), count=1)


def test_the_shipped_ptx_is_the_kernel() -> None:
    """Written by `compiled`; another NVRTC than the one that wrote it translates a little differently."""
    shipped, now = PTX.read_bytes(), compiled()
    for words in (
        b".version 7.0",
        b".target sm_75",
        b".visible .entry decide(",
        b".extern .func cudaGraphSetConditional",
    ):
        assert words in shipped
    compiler = re.compile(rb"Cuda compilation tools, release .*")
    if compiler.findall(shipped) == compiler.findall(now):
        assert shipped == now


@pytest.mark.parametrize("average", ["own", "mean"])
@pytest.mark.parametrize("measure", MEASURES)
def test_the_kernel_decides_as_the_policy_does(kernel: Kernel, measure: Measure, average: Average) -> None:
    policy = Policy((0.7, 1.0, 1.9), (0.6, 0.4), confidence=measure, average=average)
    for logits in RNG.normal(size=(40, 3, 1, 7)).astype(np.float32) * 4:
        ours, said = np.zeros(7, np.float32), np.zeros(9, np.float32)
        total = np.zeros((1, 7), np.float32)
        for exit in range(3):
            threshold = (*policy.thresholds, 0.0)[exit]
            at = [x.ctypes.data for x in (logits[exit], ours, said)]
            rest = (7, exit, policy.temperatures[exit], threshold, MEASURES.index(measure), int(average == "mean"), 77)
            kernel(*at, *rest)
            seen = step(policy, exit, logits[exit], total)
            assert said[0] == pytest.approx(seen.confidence[0], abs=1e-5)
            assert said[2:] == pytest.approx(seen.probabilities[0], abs=1e-6)
            assert said[1] == exit
            if exit < 2:
                assert kernel.conditions[77] == (not seen.leaves[0])
            total = seen.total


def test_the_gpu_ends_the_cascade(box: Callable[..., Box], kernel: Kernel, small_student: Path, tmp_path: Path) -> None:
    cuda = box("10.16", kernel=kernel).cuda
    engine, reference = engine_of(small_student, tmp_path), open_engine(small_student, threads=1)
    for policy in reversed(policies(reference.logits(IMAGES))):
        want = Classifier(reference, policy=policy).run(IMAGES)
        ours = Classifier(engine, policy=policy, device_side_exit=True)
        kernel.conditions = cuda.graphs.conditions
        before = cuda.launches, cuda.syncs, cuda.runs
        found = ours.run(IMAGES)
        assert found.exits.tolist() == want.exits.tolist()
        assert found.probabilities == pytest.approx(want.probabilities, abs=1e-5)
        assert found.confidence == pytest.approx(want.confidence, abs=1e-5)
        after = cuda.launches, cuda.syncs, cuda.runs
        stages = int((want.exits + 1).sum())  # no later stage runs
        assert [b - a for a, b in zip(before, after)] == [20, 20, stages]


def test_where_the_gpu_cannot(box: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    policy = Policy((1.0,) * 3, (0.5, 0.5))
    with pytest.raises(BackendError, match=r"onnxruntime cannot decide on the device[\s\S]*--device-side-exit"):
        Classifier(small_student, policy=policy, device_side_exit=True)
    for keys, text in (
        ({"bindings": ("pycuda",)}, "pycuda has no"),
        ({"cuda": Cuda(driver=12020)}, r"driver here is 12\.2"),
    ):
        box("10.3", **keys)
        engine = engine_of(small_student, tmp_path)
        with pytest.raises(BackendError, match=text):
            Classifier(engine, policy=policy, device_side_exit=True)
        with pytest.raises(ConfigError, match="ends cascades, not 'full'"):
            Classifier(engine, strategy="full", device_side_exit=True)
