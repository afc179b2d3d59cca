"""The GPU's own clock, and its power through NVML, which comes with the driver."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

MILLI = 1e-3


class NotMeasured(Exception):
    """A value that this machine cannot measure, and the reason."""


def spans(gpu: Any, work: Callable[[], object], *, seconds: float, least: int = 20) -> list[float]:
    """Time `work` repeatedly between two CUDA events, in ms; the first tenth of the time is warm-up."""
    start, stop = _events(gpu, 2)
    found: list[float] = []
    began = time.perf_counter()
    while len(found) < least or time.perf_counter() < began + 1.1 * seconds:
        gpu.do(gpu.runtime.cudaEventRecord(start, gpu.stream))
        work()
        gpu.do(gpu.runtime.cudaEventRecord(stop, gpu.stream))
        gpu.synchronize()
        elapsed = gpu.do(gpu.runtime.cudaEventElapsedTime(start, stop))
        if time.perf_counter() > began + 0.1 * seconds:
            found.append(float(elapsed))
    return found


def gaps(gpu: Any, stages: Sequence[Any], run_stages: Callable[[], object], *, seconds: float) -> list[float]:
    """Measure the GPU's idle time between consecutive stages, in ms, while `run_stages` runs all of them.

    A gap covers the host's wake-up, the exit decision and the launch: the events are nodes of the stages' graphs, so
    launch latency counts towards the gap and not the stage.
    """
    starts, stops = _events(gpu, len(stages)), _events(gpu, len(stages))
    for stage, start, stop in zip(stages, starts, stops):
        stage.launch = _watched(gpu, stage, start, stop)
    found: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        run_stages()
        gpu.synchronize()
        pairs = zip(stops, starts[1:])
        found += [float(gpu.do(gpu.runtime.cudaEventElapsedTime(stop, start))) for stop, start in pairs]
    for stage in stages:
        del stage.launch  # restores the method
    return found


def _watched(gpu: Any, stage: Any, start: Any, stop: Any) -> Callable[[int], None]:
    """Return a launch of the stage for one image, as a graph that begins and ends with an event."""

    def record(event: Any) -> None:
        external = gpu.runtime.cudaEventRecordExternal  # a node of the graph, not an edge to another capture
        gpu.do(gpu.runtime.cudaEventRecordWithFlags(event, gpu.stream, external))

    def work() -> None:
        record(start)
        stage.batch(1).enqueue()
        record(stop)

    graph = gpu.capture(work)
    return lambda count: gpu.launch(graph)


def _events(gpu: Any, count: int) -> list[Any]:
    if not hasattr(gpu, "runtime"):
        raise NotMeasured(f"CUDA events are not read through {gpu.bindings} here: use cuda-python")
    return [gpu.do(gpu.runtime.cudaEventCreate()) for _ in range(count)]


def facts(gpu: Any) -> dict[str, Any]:
    """Return the GPU and the CUDA versions."""
    return {"gpu": gpu.name, "sm": gpu.sm, "cuda": gpu.cuda, "bindings": gpu.bindings}


class Meter:
    """Power, clocks and temperature of the GPU that CUDA uses, read through NVML.

    Raises:
        NotMeasured: NVML is missing (as on Jetsons) or does not report power.
    """

    def __init__(self, gpu: Any) -> None:
        try:
            self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            raise NotMeasured("NVML is not installed") from None
        self._do("nvmlInit_v2")
        bus = gpu.do(gpu.runtime.cudaDeviceGetPCIBusId(32, 0))
        bus = bus if isinstance(bus, bytes) else bytes(bus)
        self._device = ctypes.c_void_p()
        self._do("nvmlDeviceGetHandleByPciBusId_v2", bus.split(b"\0")[0], ctypes.byref(self._device))
        self._millijoules()

    def _do(self, name: str, *arguments: Any) -> None:
        try:
            code = getattr(self._nvml, name)(*arguments)
        except AttributeError:
            raise NotMeasured(f"NVML of this driver has no {name}") from None
        if code:
            raise NotMeasured(f"NVML: {name} returned {code}")

    def _query(self, name: str, kind: Any, *before: Any) -> Any:
        value = kind()
        self._do(name, self._device, *before, ctypes.byref(value))
        return value.value

    def _millijoules(self) -> int:
        return int(self._query("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong))

    def watts(self, work: Callable[[], object]) -> tuple[float, float]:
        """Return the mean power in W while `work` runs, and its duration in seconds."""
        before, began = self._millijoules(), time.perf_counter()
        work()
        seconds = time.perf_counter() - began
        return MILLI * (self._millijoules() - before) / seconds, seconds

    def state(self) -> dict[str, Any]:
        """Return clocks in MHz, temperature in °C and the power limit in W."""
        return {
            "sm_mhz": self._query("nvmlDeviceGetClockInfo", ctypes.c_uint, 1),
            "memory_mhz": self._query("nvmlDeviceGetClockInfo", ctypes.c_uint, 2),
            "celsius": self._query("nvmlDeviceGetTemperature", ctypes.c_uint, 0),
            "limit_watts": MILLI * self._query("nvmlDeviceGetEnforcedPowerLimit", ctypes.c_uint),
        }
