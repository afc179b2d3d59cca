"""The interface to CUDA: memory, one stream, one GPU, captured graphs."""

from __future__ import annotations

import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy.typing as npt

from edgekd.backends.cuda.scratch import Scratch
from edgekd.errors import ConfigError, nearest
from edgekd.host import installed_version

GET_DRIVER = "install NVIDIA's driver; a container needs --gpus all, on a Jetson --runtime nvidia"
SCHEDULE = "EDGEKD_CUDA_SCHEDULE"
"""Environment variable that says how the host waits for the GPU; one of `SCHEDULES`."""
SCHEDULES = {"auto": "Auto", "spin": "Spin", "yield": "Yield", "block": "BlockingSync"}
"""Choice to the name of CUDA's flag."""
_WITHOUT_WHEEL = {"11": "11.8", "12.7": "12.6"}
"""CUDA versions of drivers for which there is no cuda-python, and the one to use instead."""


def pinned_bindings(cuda: str) -> str:
    """Return the requirement on cuda-python for a driver that supports this CUDA version.

    Up to 12.8 its wheels call the driver directly; from 12.9 on they contain CUDA's runtime, which refuses an older
    driver on Jetsons even within one major version.

    Args:
        cuda: CUDA version of the driver, such as "12.6".
    """
    minor = _WITHOUT_WHEEL.get(cuda.partition(".")[0]) or _WITHOUT_WHEEL.get(cuda, cuda)
    return f"cuda-python=={minor}.*"


def chosen_schedule(*, integrated: bool) -> str:
    """Return how the host shall wait for the GPU: as EDGEKD_CUDA_SCHEDULE says, else by spinning on integrated GPUs.

    On Jetsons CUDA's own choice depends on the power profile and may sleep, which delays each stage by the time of a
    wake-up.

    Raises:
        ConfigError: EDGEKD_CUDA_SCHEDULE is none of `SCHEDULES`.
    """
    requested = os.environ.get(SCHEDULE) or ("spin" if integrated else "auto")
    if requested not in SCHEDULES:
        raise ConfigError(f"{SCHEDULE}={requested}: no such way to wait", fix=nearest(requested, SCHEDULES))
    return requested


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
        distributions: Distributions that contain them.
        can_capture: True if the bindings support CUDA graphs.
        name: Name of the GPU.
        sm: Compute capability, such as "8.7".
        pci_bus_id: Its PCI bus, such as "0000:65:00.0".
        cuda: CUDA versions of the `runtime` and of the `driver`.
        stream: Handle of the stream.
        schedule: How the host waits for the GPU; one of `SCHEDULES`.
    """

    bindings: str
    distributions: tuple[str, ...]
    can_capture = True
    name: str
    sm: str
    pci_bus_id: str
    cuda: dict[str, str]
    stream: int
    schedule: str

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._scratch: weakref.ref[Scratch] | None = None

    @property
    def scratch(self) -> Scratch:
        """Scratch memory of all engines; it exists as long as an engine keeps it."""
        found = self._scratch() if self._scratch else None
        if found is None:
            found = Scratch(self)
            self._scratch = weakref.ref(found)
        return found

    def facts(self) -> dict[str, str]:
        """Return what measurements on this GPU depend on, for manifests and records."""
        version = next(filter(None, map(installed_version, self.distributions)), "unknown")
        return {
            "gpu": self.name,
            "sm": self.sm,
            "cuda_runtime": self.cuda["runtime"],
            "cuda_driver": self.cuda["driver"],
            "cuda_bindings": f"{self.bindings} {version}",
            "cuda_schedule": self.schedule,
        }

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
