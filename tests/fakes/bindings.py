"""CUDA's Python bindings over the fake GPU: the calls that edgekd uses, and no others."""

from __future__ import annotations

import ctypes
import enum
import threading
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from fakes.cuda import POISON, Cuda, Error, Op, RuleBroken


class Subset(NamedTuple):
    """Of a graph: an operation, or a body that runs if a condition holds."""

    op: Op | None
    condition: int = 0
    body: int = 0


class Graphs:
    """Every graph and launchable graph by its handle."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._parts: dict[int, list[Subset]] = {}
        self._nodes: dict[int, int] = {}  # node to its graph
        self._owners: dict[int, int] = {}  # condition to the graph that it was made for
        self.conditions: dict[int, int] = {}

    def create(self, parts: list[Subset]) -> int:
        handle = self._cuda.handle()
        self._parts[handle] = list(parts)
        return handle

    def parts(self, graph: int) -> list[Subset]:
        self._cuda.alive(graph)
        return self._parts[graph]

    def add(self, graph: int, after: list[int], parts: list[Subset]) -> int:
        if self.parts(graph) and not after:
            raise RuleBroken("a node depends on nothing, and may run before those that it needs")
        if any(self._nodes[node] != graph for node in after):
            raise RuleBroken("a node depends on one of another graph")
        if any(part.condition and self._owners[part.condition] != graph for part in parts):
            raise RuleBroken("a condition is used in another graph than the one it was made for")
        self._parts[graph] += parts
        node = self._cuda.handle()
        self._nodes[node] = graph
        return node

    def condition(self, graph: int) -> int:
        handle = self._cuda.handle()
        self._owners[handle] = graph
        return handle

    def launch(self, parts: list[Subset], stream: int) -> None:
        """Graphs of operations alone are enqueued one by one; others decide as they run."""
        if all(part.op for part in parts):
            for op, *_ in parts:
                assert op is not None
                self._cuda.enqueue(op.act, stream, *op.touches, at_once=op.at_once)
            return
        self._cuda.enqueue(lambda: self._run(parts), stream)

    def _run(self, parts: list[Subset]) -> None:
        self.conditions.clear()  # undefined until a kernel sets them
        self._go(parts)

    def _go(self, parts: list[Subset]) -> None:
        for part in parts:
            if part.op:
                part.op.at_once()
                part.op.act()
                continue
            if part.condition not in self.conditions:
                raise RuleBroken("a condition is asked for that nothing has set")
            if self.conditions[part.condition]:
                self._go(self._parts[part.body])


class _Kind(enum.Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


def cuda_python(cuda: Cuda) -> types.ModuleType:
    """`cuda.bindings.runtime` on a fake GPU, with the calls that edgekd uses."""
    runtime = types.ModuleType("cuda.bindings.runtime")
    graphs = cuda.graphs = Graphs(cuda)

    def offer(call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*arguments: Any) -> Any:
            if not cuda.driver and cuda.bindings < 12090 and call.__name__ != "cudaRuntimeGetVersion":
                first = call.__name__ == "cudaGetDeviceCount"
                raise RuntimeError("Failed to dlopen libcuda.so.1" if first else 'Function "cuInit" not found')
            return call(*arguments)

        setattr(runtime, call.__name__, checked)
        return call

    @offer
    def cudaGetDeviceCount() -> Any:
        granularity = 1 if cuda.integrated else 1000
        if cuda.driver // granularity < cuda.bindings // granularity:
            return Error.cudaErrorInsufficientDriver, None
        return (Error.cudaSuccess, cuda.count) if cuda.count else (Error.cudaErrorNoDevice, None)

    @offer
    def cudaDriverGetVersion() -> Any:
        return Error.cudaSuccess, cuda.driver

    @offer
    def cudaRuntimeGetVersion() -> Any:
        return Error.cudaSuccess, cuda.bindings

    @offer
    def cudaGetErrorString(error: Error) -> Any:
        return Error.cudaSuccess, error.name.removeprefix("cudaError").encode()

    @offer
    def cudaGetLastError() -> Any:
        return (Error.cudaSuccess,)

    @offer
    def cudaDeviceGetAttribute(attribute: str, device: int) -> Any:
        if attribute == "integrated":
            return Error.cudaSuccess, int(cuda.integrated)
        return Error.cudaSuccess, cuda.sm[attribute == "minor"]

    @offer
    def cudaSetDeviceFlags(flags: int) -> Any:
        cuda.set_schedule(flags)
        return (Error.cudaSuccess,)

    @offer
    def cudaDeviceGetPCIBusId(length: int, device: int) -> Any:
        return Error.cudaSuccess, b"0000:65:00.0".ljust(length, b"\0")

    @offer
    def cudaGetDeviceProperties(device: int) -> Any:
        return Error.cudaSuccess, types.SimpleNamespace(name=cuda.name.encode())

    @offer
    def cudaMemGetInfo() -> Any:
        used = sum(map(len, cuda.blocks.values()))
        return Error.cudaSuccess, cuda.total - used, cuda.total

    @offer
    def cudaMalloc(size: int) -> Any:
        if cuda.forbidden():
            return Error.cudaErrorStreamCaptureUnsupported, None
        address = cuda.allocate(size)
        return (Error.cudaErrorMemoryAllocation, None) if address is None else (Error.cudaSuccess, address)

    @offer
    def cudaFree(address: int) -> Any:
        if cuda.forbidden():
            return (Error.cudaErrorStreamCaptureUnsupported,)
        cuda.free(address)
        return (Error.cudaSuccess,)

    @offer
    def cudaMemsetAsync(address: int, value: int, size: int, stream: int) -> Any:
        cuda.clear(address, value, size, stream)
        return (Error.cudaSuccess,)

    @offer
    def cudaHostAlloc(size: int, flags: int) -> Any:
        return Error.cudaSuccess, cuda.allocate_pinned(size)

    @offer
    def cudaFreeHost(address: int) -> Any:
        if cuda.forbidden():
            return (Error.cudaErrorStreamCaptureUnsupported,)
        ctypes.memset(cuda.pinned.pop(address), POISON, 1)
        return (Error.cudaSuccess,)

    @offer
    def cudaStreamCreateWithFlags(flags: int) -> Any:
        return Error.cudaSuccess, cuda.handle()

    @offer
    def cudaStreamSynchronize(stream: int) -> Any:
        return (cuda.synchronize(stream),)

    @offer
    def cudaMemcpyAsync(to: int, source: int, size: int, kind: _Kind, stream: int) -> Any:
        copy = {
            _Kind.cudaMemcpyHostToDevice: cuda.copy_in,
            _Kind.cudaMemcpyDeviceToHost: cuda.copy_out,
            _Kind.cudaMemcpyDeviceToDevice: cuda.copy_within,
        }[kind]
        copy(to, source, size, stream)
        return (Error.cudaSuccess,)

    @offer
    def cudaStreamBeginCapture(stream: int, mode: str) -> Any:
        cuda.alive(stream)
        cuda.capturing, cuda.invalid = [], not cuda.can_capture
        return (Error.cudaSuccess,)

    @offer
    def cudaStreamEndCapture(stream: int) -> Any:
        ops, cuda.capturing = cuda.capturing or [], None
        if cuda.invalid:
            return Error.cudaErrorStreamCaptureInvalidated, None
        return Error.cudaSuccess, graphs.create([Subset(op) for op in ops])

    @offer
    def cudaGraphCreate(flags: int) -> Any:
        return Error.cudaSuccess, graphs.create([])

    @offer
    def cudaGraphAddChildGraphNode(graph: int, after: list[int], count: int, child: int) -> Any:
        return Error.cudaSuccess, graphs.add(graph, after, graphs.parts(child))

    @offer
    def cudaGraphConditionalHandleCreate(graph: int, default: int, flags: int) -> Any:
        return Error.cudaSuccess, graphs.condition(graph)

    @offer
    def cudaGraphAddNode(graph: int, after: list[int], count: int, asked: Any) -> Any:
        inner = asked.conditional
        assert (asked.type, inner.type, inner.size, len(after)) == ("conditional", "if", 1, count)
        body = graphs.create([])
        inner.phGraph_out = [body]
        return Error.cudaSuccess, graphs.add(graph, after, [Subset(None, inner.handle, body)])

    @offer
    def cudaGraphInstantiateWithFlags(graph: int, flags: int) -> Any:
        return Error.cudaSuccess, graphs.create(graphs.parts(graph))

    @offer
    def cudaGraphLaunch(launchable: int, stream: int) -> Any:
        cuda.launches += 1
        graphs.launch(graphs.parts(launchable), stream)
        return (Error.cudaSuccess,)

    @offer
    def cudaGraphDestroy(graph: int) -> Any:
        cuda.alive(graph)
        cuda.live.remove(graph)
        return (Error.cudaSuccess,)

    @offer
    def cudaGraphExecDestroy(launchable: int) -> Any:
        return cudaGraphDestroy(launchable)

    @offer
    def cudaGraphNodeParams() -> Any:
        return types.SimpleNamespace(conditional=types.SimpleNamespace())

    names: dict[str, Any] = {
        "cudaMemcpyKind": _Kind,
        "cudaStreamCaptureMode": types.SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread"),
        "cudaDeviceAttr": types.SimpleNamespace(
            cudaDevAttrComputeCapabilityMajor="major",
            cudaDevAttrComputeCapabilityMinor="minor",
            cudaDevAttrIntegrated="integrated",
        ),
        "cudaDeviceScheduleSpin": 1,
        "cudaDeviceScheduleYield": 2,
        "cudaDeviceScheduleBlockingSync": 4,
        "cudaGraphNodeType": types.SimpleNamespace(cudaGraphNodeTypeConditional="conditional"),
        "cudaGraphConditionalNodeType": types.SimpleNamespace(cudaGraphCondTypeIf="if"),
        "cudaStreamNonBlocking": 1,
        "cudaHostAllocDefault": 0,
    }
    for name, value in names.items():
        setattr(runtime, name, value)
    return runtime


def cuda_driver(cuda: Cuda, kernel: Callable[..., None]) -> types.ModuleType:
    """`cuda.bindings.driver` as far as launching one kernel; `kernel` gets the addresses of real memory."""
    driver = types.ModuleType("cuda.bindings.driver")

    def launch(function: str, *rest: Any) -> Any:
        assert (function, rest[:7]) == ("decide", (1, 1, 1, 1, 1, 1, 0))
        stream, (values, kinds) = rest[7], rest[8]
        pointers = values[:3]

        def act() -> None:
            memory = [cuda.bytes_at(pointer, 4).ctypes.data for pointer in pointers]
            kernel(*(kind(v) for kind, v in zip(kinds, [*memory, *values[3:]])))

        cuda.enqueue(act, stream, *pointers)
        return (Error.cudaSuccess,)

    def load(code: bytes) -> Any:
        assert b".entry decide(" in code
        assert code.endswith(b"\0")  # or the driver reads on
        if hasattr(kernel, "load"):
            kernel.load(code)
        return Error.cudaSuccess, code

    driver.__dict__.update(
        cuModuleLoadData=load,
        cuModuleGetFunction=lambda module, name: (Error.cudaSuccess, name.decode()),
        cuLaunchKernel=launch,
    )
    return driver


def pycuda(cuda: Cuda) -> types.ModuleType:
    """`pycuda.driver` on a fake GPU; calls without a context on the calling thread's stack fail, as they do there."""
    driver = types.ModuleType("pycuda.driver")
    stacks = threading.local()

    class DriverError(Exception): ...

    class DriverMemoryError(DriverError): ...

    def current() -> None:
        if not getattr(stacks, "depth", 0):
            raise DriverError("cuMemcpy failed: invalid device context")

    class Context:
        def push(self) -> None:
            stacks.depth = getattr(stacks, "depth", 0) + 1

        def pop(self) -> None:
            current()
            stacks.depth -= 1

    class Device:
        def __init__(self, index: int) -> None: ...

        @staticmethod
        def count() -> int:
            return cuda.count

        def name(self) -> str:
            return cuda.name

        def compute_capability(self) -> tuple[int, int]:
            return cuda.sm

        def pci_bus_id(self) -> str:
            return "0000:65:00.0"

        def get_attribute(self, attribute: str) -> int:
            assert attribute == "integrated"
            return int(cuda.integrated)

        def retain_primary_context(self) -> Context:
            return Context()

    class Stream:
        def __init__(self) -> None:
            current()
            self.handle = cuda.handle()

        def __del__(self) -> None:
            if getattr(stacks, "depth", 0):
                cuda.live.discard(self.handle)
            else:
                cuda.leaked.append("stream")

        def synchronize(self) -> None:
            current()
            cuda.synchronize(self.handle)

    class Allocation:
        def __init__(self, address: int) -> None:
            self._address = address

        def __int__(self) -> int:
            return self._address

        def free(self) -> None:
            current()
            cuda.free(self._address)

    class HostAllocation:
        def __init__(self, size: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
            self._address: int | None = cuda.allocate_pinned(size)
            data = (self._address, False)
            self.__array_interface__ = {"version": 3, "shape": shape, "typestr": np.dtype(dtype).str, "data": data}

        def free(self) -> None:
            current()
            cuda.pinned.pop(self._address)
            self._address = None

        def __del__(self) -> None:
            if self._address and not getattr(stacks, "depth", 0):
                cuda.leaked.append("pinned memory")
            elif self._address:
                cuda.pinned.pop(self._address)

    def init() -> None:
        if not cuda.driver:
            raise DriverError("cuInit failed: no CUDA-capable device is detected")

    def mem_alloc(size: int) -> Allocation:
        current()
        address = cuda.allocate(size)
        if address is None:
            raise DriverMemoryError("cuMemAlloc failed: out of memory")
        return Allocation(address)

    def pagelocked_empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        current()
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if cuda.limit is not None and size > cuda.limit:
            raise DriverMemoryError("cuMemHostAlloc failed: out of memory")
        return np.asarray(HostAllocation(size, shape, dtype))

    def copying(copy: Callable[[int, int, int, int], None], to: Any, source: Any, stream: Stream) -> None:
        current()
        array = to if isinstance(to, np.ndarray) else source
        at = [x.ctypes.data if isinstance(x, np.ndarray) else x for x in (to, source)]
        copy(*at, array.nbytes, stream.handle)

    driver.__dict__.update(
        Error=DriverError,
        MemoryError=DriverMemoryError,
        Device=Device,
        Stream=Stream,
        device_attribute=types.SimpleNamespace(INTEGRATED="integrated"),
        init=init,
        get_version=lambda: (12, 6, 0),
        get_driver_version=lambda: cuda.driver,
        mem_get_info=lambda: (current(), (cuda.total, cuda.total))[1],
        mem_alloc=mem_alloc,
        pagelocked_empty=pagelocked_empty,
        memset_d8_async=lambda to, value, size, stream: (current(), cuda.clear(to, value, size, stream.handle))[1],
        memcpy_htod_async=lambda to, source, stream: copying(cuda.copy_in, to, source, stream),
        memcpy_dtoh_async=lambda to, source, stream: copying(cuda.copy_out, to, source, stream),
        memcpy_dtod_async=lambda to, source, size, stream: (
            current(),
            cuda.copy_within(to, source, size, stream.handle),
        )[1],
    )
    return driver
