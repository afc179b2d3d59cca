"""CUDA through cuda-python."""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.backends.cuda.base import GET_DRIVER, CudaDevice, Graph, Memory, out_of_memory_fix
from edgekd.errors import BackendError

log = logging.getLogger(__name__)
NO_DRIVER, NO_DEVICE = 35, 100
"""Values of cudaErrorInsufficientDriver, which is also returned without any driver, and of cudaErrorNoDevice."""


class CudaPython(CudaDevice):
    """CUDA through cuda-python."""

    bindings = "cuda-python"

    def __init__(self, runtime: Any) -> None:
        super().__init__()
        self.runtime = runtime
        self._check_there()
        attribute = runtime.cudaDeviceAttr
        major = self.do(runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMajor, 0))
        minor = self.do(runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMinor, 0))
        self.sm = f"{major}.{minor}"
        self.name = self.do(runtime.cudaGetDeviceProperties(0)).name.decode().rstrip("\0")
        self.cuda = {"runtime": self._version(runtime.cudaRuntimeGetVersion), "driver": self._driver()}
        self.stream = int(self.do(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))
        self._in, self._out, self._within = (
            runtime.cudaMemcpyKind.cudaMemcpyHostToDevice,
            runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost,
            runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice,
        )

    def _check_there(self) -> None:
        try:
            error, count = self.runtime.cudaGetDeviceCount()
        except RuntimeError as missing:  # cuda-python up to 12.8 where libcuda.so.1 cannot be loaded
            raise BackendError(f"no NVIDIA driver was found: {missing}", fix=GET_DRIVER) from missing
        if int(error) == NO_DRIVER and self._driver() == "0.0":
            raise BackendError("no NVIDIA driver was found", fix=GET_DRIVER)
        if int(error) == NO_DRIVER:
            runtime = self._version(self.runtime.cudaRuntimeGetVersion)
            what = f"NVIDIA's driver supports CUDA {self._driver()}; the CUDA bindings are for {runtime}"
            raise BackendError(what, fix=f"pip install 'cuda-python<{int(runtime.split('.')[0])}', or a newer driver")
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
        memory = Memory(address, size, functools.partial(self.runtime.cudaFree, address))
        self.do(self.runtime.cudaMemsetAsync(address, 0, size, self.stream))
        self.synchronize()
        return memory

    def pinned(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        address = int(self.do(self.runtime.cudaHostAlloc(size, self.runtime.cudaHostAllocDefault)))
        block = (ctypes.c_ubyte * size).from_address(address)
        weakref.finalize(block, self.runtime.cudaFreeHost, address)
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
        self.do(self.runtime.cudaStreamBeginCapture(self.stream, mode))
        try:
            work()
        finally:  # also ends a capture that failed: the stream is unusable otherwise
            error, template = self.runtime.cudaStreamEndCapture(self.stream)
            if int(error):
                self.runtime.cudaGetLastError()  # or TensorRT would read it later as an error of its own
        self.do((error,))
        return template

    def launchable(self, template: Any) -> Graph:
        """Instantiate a graph for launching; the graph itself is destroyed."""
        handle = self.do(self.runtime.cudaGraphInstantiateWithFlags(template, 0))
        self.do(self.runtime.cudaGraphDestroy(template))
        return Graph(handle, functools.partial(self.runtime.cudaGraphExecDestroy, handle))

    def launch(self, graph: Graph) -> None:
        self.do(self.runtime.cudaGraphLaunch(graph.handle, self.stream))
