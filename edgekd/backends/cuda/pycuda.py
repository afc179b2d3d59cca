"""CUDA through pycuda."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy.typing as npt

from edgekd.backends.cuda.base import GET_DRIVER, CudaDevice, Graph, Memory, out_of_memory_fix
from edgekd.errors import BackendError


class PyCuda(CudaDevice):
    """CUDA through pycuda, which lacks CUDA graphs, in the primary context, which TensorRT uses, too."""

    bindings = "pycuda"
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
        self._context = gpu.retain_primary_context()
        self.name, (major, minor) = gpu.name(), gpu.compute_capability()
        self.sm = f"{major}.{minor}"
        known = driver.get_driver_version()
        built = driver.get_version()
        self.cuda = {"runtime": f"{built[0]}.{built[1]}", "driver": f"{known // 1000}.{known % 1000 // 10}"}
        with self:
            self._stream = driver.Stream()
        self.stream = int(self._stream.handle)

    def __enter__(self) -> CudaDevice:
        super().__enter__()
        self._context.push()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.pop()
        super().__exit__(kind, error, trace)
        if isinstance(error, self._cu.Error):
            raise BackendError(f"CUDA reports {error}") from error

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
        array: npt.NDArray[Any] = self._cu.pagelocked_empty(shape, dtype)
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
