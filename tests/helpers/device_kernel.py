"""The CUDA kernel that decides on the device, compiled for the CPU."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from edgekd.backends.tensorrt.device_exit import ARGUMENTS, SHIPPED, source
from edgekd.policy import Policy

HOST = """
#include <cmath>
#define __global__
#define __device__
{source}
static void (*sink)(unsigned long long, unsigned int);
extern "C" void cudaGraphSetConditional(unsigned long long handle, unsigned int value) {{ sink(handle, value); }}
extern "C" void tell(void (*to)(unsigned long long, unsigned int)) {{ sink = to; }}
"""


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


class LoadedKernel:
    """The kernel whose PTX was loaded last."""

    def __init__(self, kernels: Callable[[str], Kernel]) -> None:
        self._kernels = kernels
        self._kernel = kernels("max_probability")
        self.conditions: dict[int, int] = {}

    def load(self, code: bytes) -> None:
        measure = next(p.stem for p in SHIPPED.glob("*.ptx") if p.read_bytes() == code.rstrip(b"\0"))
        self._kernel = self._kernels(measure)

    def __call__(self, *values: Any) -> None:
        self._kernel.conditions = self.conditions
        self._kernel(*values)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Kernel]:
    """The kernel by confidence measure."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler to run the kernel on the CPU with")

    @functools.cache
    def kernel(measure: str) -> Kernel:
        folder = tmp_path_factory.mktemp("kernel")
        code = HOST.format(source=source(Policy((1.0,), confidence=measure)))
        (folder / "decide.cpp").write_text(code)
        flags = [compiler, "-shared", "-fPIC", "-O1", str(folder / "decide.cpp"), "-o", str(folder / "decide.so")]
        subprocess.run(flags, check=True)
        return Kernel(ctypes.CDLL(str(folder / "decide.so")))

    return kernel
