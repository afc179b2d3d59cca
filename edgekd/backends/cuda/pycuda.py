"""CUDA through pycuda."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.backends.cuda.base import (
    GET_DRIVER,
    SCHEDULE,
    CudaDevice,
    Graph,
    Memory,
    chosen_schedule,
    out_of_memory_fix,
)
from edgekd.errors import BackendError

LIBRARY = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
"""The driver's library."""
_SCHEDULES = {"spin": 1, "yield": 2, "block": 4}
"""Values of CU_CTX_SCHED_*."""


def set_schedule(choice: str) -> None:
    """Set how the host waits for the GPU, which pycuda offers for no primary context.

    Raises:
        BackendError: The driver refuses it.
    """
    driver, gpu = ctypes.CDLL(LIBRARY), ctypes.c_int()
    code = driver.cuDeviceGet(ctypes.byref(gpu), 0) or driver.cuDevicePrimaryCtxSetFlags_v2(gpu, _SCHEDULES[choice])
    if code:
        raise BackendError(f"CUDA reports error {code} for {SCHEDULE}={choice}", fix=f"set {SCHEDULE}=auto")


class PyCuda(CudaDevice):
    """CUDA through pycuda, which lacks CUDA graphs, in the primary context, which TensorRT uses, too.

    pycuda frees what goes out of scope in another thread than the one that found the GPU only while the context is
    current; else it warns and leaks it. So edgekd frees everything itself, inside `with`.

    Args:
        driver: The module `pycuda.driver`.
    """

    bindings = "pycuda"
    distributions = ("pycuda",)
    can_capture = False

    def __init__(self, driver: Any) -> None:
        super().__init__()
        self._cu = driver
        try:
            driver.init()
            count = driver.Device.count()
        except driver.Error as error:
            raise BackendError(f"CUDA does not start: {error}", fix=GET_DRIVER) from error
        if not count:
            raise BackendError("CUDA finds no GPU", fix="look at nvidia-smi and CUDA_VISIBLE_DEVICES")
        gpu = driver.Device(0)
        self.schedule = chosen_schedule(integrated=bool(gpu.get_attribute(driver.device_attribute.INTEGRATED)))
        if self.schedule != "auto":  # before the context is created
            set_schedule(self.schedule)
        self._context = gpu.retain_primary_context()
        self.name, (major, minor) = gpu.name(), gpu.compute_capability()
        self.sm, self.pci_bus_id = f"{major}.{minor}", gpu.pci_bus_id()
        known = driver.get_driver_version()
        built = driver.get_version()
        self.cuda = {"runtime": f"{built[0]}.{built[1]}", "driver": f"{known // 1000}.{known % 1000 // 10}"}
        with self:
            self._streams = [driver.Stream()]
        self.stream = int(self._streams[0].handle)
        weakref.finalize(self, _clear, self._context, self._streams)

    def __enter__(self) -> CudaDevice:
        super().__enter__()
        try:
            self._context.push()
        except self._cu.Error as error:
            super().__exit__(None, None, None)
            raise BackendError(f"CUDA reports {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._context.pop()
        except self._cu.Error as broken:  # after an error of the GPU; the first error tells more
            error = error or broken
        finally:
            super().__exit__(kind, error, trace)
        if isinstance(error, self._cu.Error):
            raise BackendError(f"CUDA reports {error}") from error

    @property
    def _stream(self) -> Any:
        return self._streams[0]

    def free_bytes(self) -> int:
        return int(self._cu.mem_get_info()[0])

    def allocate(self, size: int) -> Memory:
        try:
            block = self._cu.mem_alloc(size)
        except self._cu.MemoryError as error:
            raise BackendError(f"CUDA reports {error}", fix=out_of_memory_fix(size)) from error
        self._cu.memset_d8_async(int(block), 0, size, self._stream)
        self.synchronize()
        return Memory(int(block), size, functools.partial(self._free, block))

    def _free(self, block: Any) -> None:
        with self:
            block.free()

    def pinned(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        try:
            array: npt.NDArray[Any] = self._cu.pagelocked_empty(shape, dtype)
        except self._cu.MemoryError as error:
            size = math.prod(shape) * np.dtype(dtype).itemsize
            raise BackendError(f"CUDA reports {error}", fix=out_of_memory_fix(size)) from error
        weakref.finalize(array, self._free, array.base)
        return array

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        self._cu.memcpy_htod_async(address, array, self._stream)

    def download(self, array: npt.NDArray[Any], address: int) -> None:
        self._cu.memcpy_dtoh_async(array, address, self._stream)

    def move(self, to: int, source: int, size: int) -> None:
        self._cu.memcpy_dtod_async(to, source, size, self._stream)

    def synchronize(self) -> None:
        self._stream.synchronize()

    def capture(self, work: Callable[[], None]) -> Graph:
        raise BackendError("pycuda has no CUDA graphs", fix="pip install cuda-python")

    def launch(self, graph: Graph) -> None:
        raise BackendError("pycuda has no CUDA graphs", fix="pip install cuda-python")


def _clear(context: Any, streams: list[Any]) -> None:
    """Destroy the stream inside its context, wherever this is called from."""
    context.push()
    streams.clear()
    context.pop()
