"""CUDA through cuda-python."""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.backends.cuda.base import (
    GET_DRIVER,
    SCHEDULE,
    SCHEDULES,
    CudaDevice,
    Graph,
    Memory,
    chosen_schedule,
    out_of_memory_fix,
    pinned_bindings,
)
from edgekd.errors import BackendError

log = logging.getLogger(__name__)
NO_DRIVER, NO_DEVICE = 35, 100
"""Values of cudaErrorInsufficientDriver, which is also returned without any driver, and of cudaErrorNoDevice."""
_OLD_NAMES = {"runtime": "cuda.cudart", "driver": "cuda.cuda", "nvrtc": "cuda.nvrtc"}
"""Modules of cuda-python up to 12.6.0; later ones are in `cuda.bindings`."""


def load(part: str) -> Any:
    """Import a module of cuda-python.

    Args:
        part: `runtime`, `driver` or `nvrtc`.

    Returns:
        The module; None if cuda-python is not installed.

    Raises:
        BackendError: It is installed and cannot be imported.
    """
    for name in (f"cuda.bindings.{part}", _OLD_NAMES[part]):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
                continue
            fix = "pip install --force-reinstall cuda-python"
            raise BackendError(f"cuda-python cannot be loaded: {error}", fix=fix) from error
    return None


class Bindings:
    """A module of cuda-python whose functions raise no RuntimeError.

    The runtime module up to 12.8 and the driver module of every version raise one instead of returning a code where the
    driver's library is missing, or lacks the function.

    Args:
        module: The module.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if callable(value) and not isinstance(value, type):
            value = functools.partial(_call, value)
        setattr(self, name, value)  # found directly from now on
        return value


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), "")
        if reason.startswith("Function "):
            what = f"NVIDIA's driver is older than the CUDA bindings: {reason}"
            raise BackendError(what, fix="install the cuda-python of the CUDA version that nvidia-smi shows") from error
        raise BackendError(f"no NVIDIA driver was found: {reason}", fix=GET_DRIVER) from error


class CudaPython(CudaDevice):
    """CUDA through cuda-python.

    Args:
        runtime: Its module `runtime`.
    """

    bindings = "cuda-python"
    distributions = ("cuda-bindings", "cuda-python")

    def __init__(self, runtime: Any) -> None:
        super().__init__()
        self._capturing: int | None = None  # the thread that captures
        self._unused: list[Callable[[], object]] = []  # what to free after the capture
        self.runtime = runtime = Bindings(runtime)
        self._check_there()
        attribute = runtime.cudaDeviceAttr
        integrated = self.do(runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrIntegrated, 0))
        self.schedule = chosen_schedule(integrated=bool(integrated))
        if self.schedule != "auto":  # before anything creates a context
            flag = getattr(runtime, f"cudaDeviceSchedule{SCHEDULES[self.schedule]}")
            self.do(runtime.cudaSetDeviceFlags(flag), fix=f"set {SCHEDULE}=auto")
        major = self.do(runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMajor, 0))
        minor = self.do(runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMinor, 0))
        self.sm = f"{major}.{minor}"
        self.name = self.do(runtime.cudaGetDeviceProperties(0)).name.decode().rstrip("\0")
        self.pci_bus_id = self.do(runtime.cudaDeviceGetPCIBusId(32, 0)).decode().rstrip("\0")
        self.cuda = {"runtime": self._version(runtime.cudaRuntimeGetVersion), "driver": self._driver()}
        self.stream = int(self.do(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))
        self._in, self._out, self._within = (
            runtime.cudaMemcpyKind.cudaMemcpyHostToDevice,
            runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost,
            runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice,
        )

    def _check_there(self) -> None:
        error, count = self.runtime.cudaGetDeviceCount()
        if int(error) == NO_DRIVER and self._driver() == "0.0":
            raise BackendError("no NVIDIA driver was found", fix=GET_DRIVER)
        if int(error) == NO_DRIVER:
            runtime = self._version(self.runtime.cudaRuntimeGetVersion)
            what = f"NVIDIA's driver supports CUDA {self._driver()}; the CUDA bindings are for {runtime}"
            raise BackendError(what, fix=f"pip install '{pinned_bindings(self._driver())}', or a newer driver")
        if int(error) == NO_DEVICE or (not int(error) and count == 0):
            raise BackendError("CUDA finds no GPU", fix="look at nvidia-smi and CUDA_VISIBLE_DEVICES")
        self.do((error,))

    def _driver(self) -> str:
        return self._version(self.runtime.cudaDriverGetVersion)

    def _version(self, query: Callable[[], Any]) -> str:
        number = self.do(query())
        return f"{number // 1000}.{number % 1000 // 10}"

    def do(self, result: Any, *, fix: str = "") -> Any:
        """Return the value of a call that must succeed.

        Raises:
            BackendError: It failed; with CUDA's message and `fix`.
        """
        error, *values = result
        if int(error):
            of_driver = error.name.startswith("CUDA_")  # the runtime describes only its own errors
            text = "" if of_driver else f": {self.runtime.cudaGetErrorString(error)[1].decode()}"
            raise BackendError(f"CUDA reports {error.name}{text}", fix=fix)
        return values[0] if values else None

    def free_bytes(self) -> int:
        error, free, _ = self.runtime.cudaMemGetInfo()
        self.do((error,))
        return int(free)

    def allocate(self, size: int) -> Memory:
        address = int(self.do(self.runtime.cudaMalloc(size), fix=out_of_memory_fix(size)))
        memory = Memory(address, size, self._freeing(self.runtime.cudaFree, address))
        self.do(self.runtime.cudaMemsetAsync(address, 0, size, self.stream))
        self.synchronize()
        return memory

    def pinned(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        allocated = self.runtime.cudaHostAlloc(size, self.runtime.cudaHostAllocDefault)
        address = int(self.do(allocated, fix=out_of_memory_fix(size)))
        block = (ctypes.c_ubyte * size).from_address(address)
        weakref.finalize(block, self._freeing(self.runtime.cudaFreeHost, address))
        array: npt.NDArray[Any] = np.frombuffer(memoryview(block), dtype).reshape(shape)
        return array

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        self.do(self.runtime.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, self._in, self.stream))

    def download(self, array: npt.NDArray[Any], address: int) -> None:
        self.do(self.runtime.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, self._out, self.stream))

    def move(self, to: int, source: int, size: int) -> None:
        self.do(self.runtime.cudaMemcpyAsync(to, source, size, self._within, self.stream))

    def synchronize(self) -> None:
        self.do(self.runtime.cudaStreamSynchronize(self.stream))

    def capture(self, work: Callable[[], None]) -> Graph:
        return self.launchable(self.record(work))

    def record(self, work: Callable[[], None]) -> Any:
        """Capture what `work` enqueues, as a graph to launch or to add to another."""
        mode = self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._capturing, complete = threading.get_ident(), False
        try:
            self.do(self.runtime.cudaStreamBeginCapture(self.stream, mode))
            try:
                work()
                complete = True
            finally:  # also ends a capture that failed: the stream is unusable otherwise
                error, template = self.runtime.cudaStreamEndCapture(self.stream)
                if int(error):
                    self.runtime.cudaGetLastError()  # or TensorRT would read it later as an error of its own
                elif not complete:
                    self.runtime.cudaGraphDestroy(template)
        finally:
            self._capturing = None
            while self._unused:
                self._unused.pop()()
        self.do((error,))
        return template

    def _freeing(self, free: Callable[[Any], object], handle: Any) -> Callable[[], object]:
        """Return a function that frees `handle`, now or after a capture of the same thread.

        The garbage collector may call it anywhere, and CUDA invalidates a capture in which its thread frees memory.
        """

        def finalize() -> None:
            if self._capturing == threading.get_ident():
                self._unused.append(functools.partial(free, handle))
            else:
                free(handle)

        return finalize

    def launchable(self, template: Any) -> Graph:
        """Instantiate a graph for launching; the graph itself is destroyed."""
        try:
            handle = self.do(self.runtime.cudaGraphInstantiateWithFlags(template, 0))
        finally:
            self.runtime.cudaGraphDestroy(template)
        return Graph(handle, self._freeing(self.runtime.cudaGraphExecDestroy, handle))

    def launch(self, graph: Graph) -> None:
        self.do(self.runtime.cudaGraphLaunch(graph.handle, self.stream))
