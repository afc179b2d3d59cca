"""The CUDA runtime through cuda-python or pycuda: memory, one stream, one GPU, captured graphs."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import logging
import math
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.errors import BackendError, ConfigError, nearest

log = logging.getLogger(__name__)

CHOICE = "EDGEKD_CUDA"
"""Environment variable that names the bindings to use: cuda-python or pycuda."""
NO_DRIVER, NO_DEVICE = 35, 100
"""Values of cudaErrorInsufficientDriver, which is also returned without any driver, and of cudaErrorNoDevice."""
GET_DRIVER = "install NVIDIA's driver; a container needs --gpus all, on a Jetson --runtime nvidia"


def out_of_memory_fix(size: int) -> str:
    """Return the advice for an allocation of `size` bytes that failed."""
    return f"{size / 2**20:.0f} MiB were requested: close other programs, or compile with smaller batch_sizes"


class Memory:
    """Zeroed device memory at `address`, freed with the object."""

    def __init__(self, address: int, size: int, free: Callable[[], object]) -> None:
        self.address = address
        self.size = size
        weakref.finalize(self, free)


class Graph:
    """Captured work that is launched as one, freed with the object."""

    def __init__(self, handle: Any, free: Callable[[], object]) -> None:
        self.handle = handle
        weakref.finalize(self, free)


class CudaDevice(ABC):
    """The first GPU that CUDA lists (see CUDA_VISIBLE_DEVICES), and a stream that runs everything in order.

    `with device:` gives the calling thread exclusive use of the GPU; every function that uses a device must be called
    inside. Enqueued work is complete once `synchronize` returns: until then, its host arrays must not be changed.

    Attributes:
        bindings: Package of the bindings.
        can_capture: True if the bindings support CUDA graphs.
        name: Name of the GPU.
        sm: Compute capability, such as "8.7".
        cuda: CUDA versions of the `runtime` and of the `driver`.
        stream: Handle of the stream.
    """

    bindings: str
    can_capture = True
    name: str
    sm: str
    cuda: dict[str, str]
    stream: int

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> CudaDevice:
        self._lock.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    @abstractmethod
    def free_bytes(self) -> int:
        """Return the number of free bytes of device memory."""

    @abstractmethod
    def allocate(self, size: int) -> Memory:
        """Allocate `size` bytes of zeroed device memory.

        Raises:
            BackendError: Out of memory.
        """

    @abstractmethod
    def pinned(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Allocate an array in page-locked memory, which asynchronous copies to and from the GPU require."""

    @abstractmethod
    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """Enqueue a copy of a contiguous pinned array to the device."""

    @abstractmethod
    def download(self, array: npt.NDArray[Any], address: int) -> None:
        """Enqueue a copy from the device into a contiguous pinned array."""

    @abstractmethod
    def move(self, to: int, source: int, size: int) -> None:
        """Enqueue a copy within the device.

        Args:
            to: Address to write.
            source: Address to read; the two ranges must not overlap.
            size: Number of bytes.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all enqueued work is complete."""

    @abstractmethod
    def capture(self, work: Callable[[], None]) -> Graph:
        """Capture what `work` enqueues, without running it.

        Raises:
            BackendError: `work` cannot be captured.
        """

    @abstractmethod
    def launch(self, graph: Graph) -> None:
        """Enqueue a captured graph."""


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


_finding = threading.Lock()


def device() -> CudaDevice:
    """Return the GPU, through the bindings that EDGEKD_CUDA names, else cuda-python, else pycuda.

    Raises:
        BackendError: There are no bindings, no driver or no GPU.
        ConfigError: EDGEKD_CUDA names something else.
    """
    with _finding:  # else two concurrent threads would create two
        return find()


@functools.cache
def find() -> CudaDevice:
    """Find the GPU; `device` calls this in one thread at a time."""
    makers: dict[str, Callable[[], CudaDevice | None]] = {"cuda-python": _cuda_python, "pycuda": _pycuda}
    requested = os.environ.get(CHOICE)
    if requested and requested not in makers:
        raise ConfigError(f"{CHOICE}={requested}: no such bindings", fix=nearest(requested, makers))
    for name in [requested] if requested else makers:
        if found := makers[name]():
            return found
    what = f"{requested} is not installed" if requested else "neither cuda-python nor pycuda is installed"
    raise BackendError(what, fix="pip install 'edgekd[tensorrt]', or 'edgekd[pycuda]'")


def _cuda_python() -> CudaDevice | None:
    for module in ("cuda.bindings.runtime", "cuda.cudart"):  # the second up to cuda-python 12.5
        try:
            return CudaPython(importlib.import_module(module))
        except ImportError:
            continue
    return None


def _pycuda() -> CudaDevice | None:
    if importlib.util.find_spec("pycuda") is None:
        return None
    from edgekd.backends.cuda.pycuda import PyCuda

    try:
        return PyCuda(importlib.import_module("pycuda.driver"))
    except ImportError as error:  # installed, but linked to a driver that is missing
        raise BackendError(f"pycuda cannot be loaded: {error}", fix=GET_DRIVER) from error
