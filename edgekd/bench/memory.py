"""Resident memory of this process, now and at its peak."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_mib() -> float:
    """Return the largest resident size so far in MiB.

    On Linux from VmHWM: getrusage's ru_maxrss is inherited through fork and exec, so a child of a large parent
    would report its parent.
    """
    if _STATUS.is_file():
        return _status_mib("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def resident_mib() -> float:
    """Return the present resident size in MiB; where the system does not report it, the largest so far."""
    return _status_mib("VmRSS") if _STATUS.is_file() else peak_mib()


def _status_mib(key: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) / 1024
