"""Energy of the processor packages from RAPL counters, where this user may read them; else None, never 0."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


def domains(root: Path = POWERCAP) -> list[Path]:
    """List the package domains (`intel-rapl:0`; AMD's have the same names) whose counters this user may read."""
    return [d for d in sorted(root.glob("intel-rapl:?")) if _read(d / "energy_uj") is not None]


def counters(packages: list[Path]) -> dict[Path, int]:
    """Read each package's counter in microjoules."""
    return {d: int((d / "energy_uj").read_text()) for d in packages}


def joules(before: Mapping[Path, int], after: Mapping[Path, int]) -> float:
    """Return the energy in joules between two readings, in which a counter may have wrapped around once."""
    total = 0
    for package, start in before.items():
        spent = after[package] - start
        total += spent if spent >= 0 else spent + int((package / "max_energy_range_uj").read_text())
    return total / 1e6


def idle_watts(packages: list[Path], *, seconds: float = 2.0) -> float | None:
    """Measure the power of the packages in watts while this process sleeps; None where there is none to read."""
    if not packages:
        return None
    before, start = counters(packages), time.perf_counter()
    time.sleep(seconds)
    return joules(before, counters(packages)) / (time.perf_counter() - start)


def _read(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
