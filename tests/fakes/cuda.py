"""A CUDA that is strict and slow to act: nothing that is enqueued happens before the stream is synchronised.

Until then, host memory that a copy will be written to holds NaN, and so does device memory that nothing was written
to. What real CUDA answers with garbage or a crash raises `RuleBroken`: addresses outside of allocations, memory freed
while in use, copies from memory that is not pinned, overlapping copies, two threads on the stream at once.
"""

from __future__ import annotations

import ctypes
import enum
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

POISON = 0xFF
"""Every byte of it makes NaN, in 32 bits and in 16."""
ALIGNMENT = 256


class RuleBroken(AssertionError):
    """The code under test did what real CUDA or TensorRT punishes."""


class Error(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class Op(NamedTuple):
    """What happens, the device memory that it touches, and what happens as soon as it is enqueued."""

    act: Callable[[], object]
    touches: tuple[int, ...]
    at_once: Callable[[], object]


class Cuda:
    """One GPU with one stream.

    driver, bindings: CUDA versions that the driver and cuda-python know, as 12020; no driver is 0.
    """

    def __init__(self, *, driver: int = 12090, count: int = 1, bindings: int = 12090, integrated: bool = False) -> None:
        self.driver, self.count, self.bindings, self.integrated = driver, count, bindings, integrated
        self.schedule = 0  # how the host waits
        self.leaked: list[str] = []  # what pycuda could not free, because its context was not current
        self.name, self.sm = "Orin", (8, 7)
        self.total = 8 << 30
        self.limit: int | None = None  # bytes that may be allocated
        self.can_capture = True
        self.blocks: dict[int, npt.NDArray[np.uint8]] = {}
        self.freed: set[int] = set()
        self.pinned: dict[int, Any] = {}
        self.queue: list[Op] = []
        self.owner: int | None = None
        self.capturing: list[Op] | None = None
        self.invalid = False
        self.live: set[int] = set()  # handles of streams, graphs and launchable graphs
        self.graphs: Any = None  # of the bindings in use
        self.launches = self.syncs = self.plain = self.runs = 0
        self.copied: list[str] = []  # kind of every copy as it is enqueued
        self._next = 0x7F0000000000
        self._handle = 0x5000

    # memory

    def allocate(self, size: int) -> int | None:
        """None where there is too little."""
        if self.limit is not None and sum(map(len, self.blocks.values())) + size > self.limit:
            return None
        address = self._next
        self._next += (size // ALIGNMENT + 2) * ALIGNMENT
        self.blocks[address] = np.full(size, POISON, np.uint8)
        return address

    def forbidden(self) -> bool:
        """A call that invalidates a capture under way."""
        self.invalid = self.invalid or self.capturing is not None
        return self.capturing is not None

    def set_schedule(self, flags: int) -> None:
        if self.live:
            raise RuleBroken("the way of waiting is set after a context exists")
        self.schedule = flags

    def free(self, address: int) -> None:
        if address not in self.blocks:
            raise RuleBroken(f"{address:#x} is freed and was not allocated, or is freed twice")
        end = address + len(self.blocks[address])
        if any(address <= touched < end for op in self.queue for touched in op.touches):
            raise RuleBroken("memory is freed while work that uses it is under way")
        del self.blocks[address]
        self.freed.add(address)

    def bytes_at(self, address: int, size: int) -> npt.NDArray[np.uint8]:
        for start, block in self.blocks.items():
            if start <= address < start + len(block):
                if address + size > start + len(block):
                    raise RuleBroken(f"{size} bytes at {address:#x} reach beyond their {len(block)} bytes")
                return block[address - start : address - start + size]
        raise RuleBroken(f"{address:#x} is no device memory" + (", it was freed" if self.freed else ""))

    def allocate_pinned(self, size: int) -> int:
        block = (ctypes.c_ubyte * size)()
        ctypes.memset(block, POISON, size)
        self.pinned[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def pinned_at(self, address: int, size: int) -> npt.NDArray[np.uint8]:
        for start, block in self.pinned.items():
            if start <= address and address + size <= start + len(block):
                return np.frombuffer(block, np.uint8)[address - start : address - start + size]
        raise RuleBroken("a copy that should be asynchronous uses host memory that is not pinned")

    # the stream

    def handle(self) -> int:
        self._handle += 0x10
        self.live.add(self._handle)
        return self._handle

    def alive(self, handle: int) -> None:
        if handle not in self.live:
            raise RuleBroken(f"{handle:#x} is no live stream or graph")

    def enqueue(
        self, act: Callable[[], object], stream: int, *touches: int, at_once: Callable[[], object] = lambda: None
    ) -> None:
        self.alive(stream)
        op = Op(act, touches, at_once)
        if self.capturing is not None:
            self.capturing.append(op)
            return
        me = threading.get_ident()
        if self.queue and self.owner != me:
            raise RuleBroken("two threads use the stream at once")
        self.owner = me
        op.at_once()
        self.queue.append(op)

    def synchronize(self, stream: int) -> Error:
        self.alive(stream)
        if self.capturing is not None:
            self.invalid = True
            return Error.cudaErrorStreamCaptureUnsupported
        self.syncs += 1
        queue, self.queue = self.queue, []
        for op in queue:
            op.act()
        return Error.cudaSuccess

    def copy_in(self, to: int, source: int, size: int, stream: int) -> None:
        self.bytes_at(to, size), self.pinned_at(source, size)
        self.copied.append("in")
        self.enqueue(lambda: np.copyto(self.bytes_at(to, size), self.pinned_at(source, size)), stream, to)

    def copy_out(self, to: int, source: int, size: int, stream: int) -> None:
        self.bytes_at(source, size), self.pinned_at(to, size)
        self.copied.append("out")

        def act() -> None:
            np.copyto(self.pinned_at(to, size), self.bytes_at(source, size))

        self.enqueue(act, stream, source, at_once=lambda: self.pinned_at(to, size).fill(POISON))

    def copy_within(self, to: int, source: int, size: int, stream: int) -> None:
        self.bytes_at(to, size), self.bytes_at(source, size)
        if abs(to - source) < size:
            raise RuleBroken("a copy within the device overlaps itself")
        self.copied.append("within")
        self.enqueue(lambda: np.copyto(self.bytes_at(to, size), self.bytes_at(source, size)), stream, to, source)

    def clear(self, address: int, value: int, size: int, stream: int) -> None:
        self.bytes_at(address, size)
        self.enqueue(lambda: self.bytes_at(address, size).fill(value), stream, address)
