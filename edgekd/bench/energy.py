"""Energy from RAPL counters or a Jetson's INA3221 power sensors, where this user may read them; else None, never 0."""

from __future__ import annotations

import itertools
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
"""Folder below which /sys is read."""
TOTAL_RAILS = ("VIN", "VDD_IN", "POM_5V_IN")
"""Labels of the rail that feeds the whole module, of which a board has one or none."""
PARTIAL_RAILS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
"""Labels of the rails that feed a Jetson AGX Orin together."""
PERIOD_S = 0.1
"""Time between two samples of a sensor, which averages over a shorter time; each takes the CPU well below 1 ms."""


@dataclass(frozen=True)
class Energy:
    """Energy in joules, and the seconds in which it was spent."""

    joules: float
    seconds: float

    @property
    def watts(self) -> float:
        """The mean power."""
        return self.joules / self.seconds


class Meter(ABC):
    """A source of energy measurements.

    Attributes:
        source: What is measured, and how.
    """

    source: str

    @abstractmethod
    def start(self) -> Callable[[], Energy | None]:
        """Begin to measure.

        Returns:
            A function to call once, at the end; it returns the energy since, or None if it could not be read.
        """


class Rapl(Meter):
    """Energy counters of the processor packages.

    Args:
        packages: Folders of the packages (`intel-rapl:0`; AMD's have the same names).
    """

    def __init__(self, packages: list[Path]) -> None:
        self.source = "processor packages (RAPL)"
        self._packages = packages

    def start(self) -> Callable[[], Energy | None]:
        start, before = time.perf_counter(), self._counters()

        def end() -> Energy | None:
            seconds, joules = time.perf_counter() - start, _joules(before, self._counters())
            return None if joules is None else Energy(joules, seconds)

        return end

    def _counters(self) -> dict[Path, int | None]:
        return {package: _read(package / "energy_uj") for package in self._packages}


def _joules(before: Mapping[Path, int | None], after: Mapping[Path, int | None]) -> float | None:
    """Return the energy between two readings in microjoules, in which a counter may have wrapped around once."""
    total = 0
    for package, start in before.items():
        end = after[package]
        if start is None or end is None:
            return None
        wrapped = _read(package / "max_energy_range_uj") or 0 if end < start else 0
        total += end - start + wrapped
    return total / 1e6


class Ina3221(Meter):
    """Power sensors on rails of a Jetson, sampled by a thread.

    Args:
        rails: Label of a rail to its files of voltage in mV and of current in mA; their power is summed.
    """

    def __init__(self, rails: Mapping[str, tuple[Path, Path]]) -> None:
        summed = "sum of " if len(rails) > 1 else ""
        self.source = f"{summed}{' + '.join(rails)} (INA3221, sampled every {1e3 * PERIOD_S:.0f} ms)"
        self._rails = tuple(rails.values())

    def start(self) -> Callable[[], Energy | None]:
        samples, ended = [(time.perf_counter(), self._watts())], threading.Event()

        def sample() -> None:
            while not ended.wait(PERIOD_S):
                samples.append((time.perf_counter(), self._watts()))

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()

        def end() -> Energy | None:
            ended.set()
            thread.join()
            samples.append((time.perf_counter(), self._watts()))
            joules = integral(samples)
            return None if joules is None else Energy(joules, samples[-1][0] - samples[0][0])

        return end

    def _watts(self) -> float | None:
        """Return the power of all rails; None if one cannot be read now."""
        total = 0
        for voltage, current in self._rails:
            mv, ma = _read(voltage), _read(current)
            if mv is None or ma is None:
                return None
            total += mv * ma
        return total / 1e6


def integral(samples: list[tuple[float, float | None]]) -> float | None:
    """Return the energy in joules of power samples (time in s, power in W), by the trapezoidal rule.

    Returns:
        None if fewer than two could be read, or the first or the last could not.
    """
    known = [(at, watts) for at, watts in samples if watts is not None]
    if len(known) < 2 or known[0][0] != samples[0][0] or known[-1][0] != samples[-1][0]:
        return None
    return sum((after - before) * (high + low) / 2 for (before, low), (after, high) in itertools.pairwise(known))


def find_meter() -> Meter | None:
    """Return what measures energy on this machine and may be read by this user; None if nothing does."""
    packages = [d for d in sorted(ROOT.glob("sys/class/powercap/intel-rapl:?")) if _read(d / "energy_uj") is not None]
    if packages:
        return Rapl(packages)
    rails = _rails()
    if total := next((name for name in TOTAL_RAILS if name in rails), None):
        return Ina3221({total: rails[total]})
    if all(name in rails for name in PARTIAL_RAILS):
        return Ina3221({name: rails[name] for name in PARTIAL_RAILS})
    return None


def _rails() -> dict[str, tuple[Path, Path]]:
    """Return the rails whose sensors can be read, by label."""
    found = {}
    for label in sorted(ROOT.glob("sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in*_label")):
        channel = label.name.removeprefix("in").removesuffix("_label")
        voltage, current = label.with_name(f"in{channel}_input"), label.with_name(f"curr{channel}_input")
        if _read(voltage) is not None and _read(current) is not None:
            found[label.read_text().strip()] = (voltage, current)
    return found


def idle_watts(meter: Meter | None, *, seconds: float = 2.0) -> float | None:
    """Measure the power in watts while this process sleeps; None where it cannot be measured."""
    if meter is None:
        return None
    end = meter.start()
    time.sleep(seconds)
    spent = end()
    return spent.watts if spent else None


def _read(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
