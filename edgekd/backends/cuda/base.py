"""The interface to CUDA: memory, one stream, one GPU, captured graphs."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy.typing as npt

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
