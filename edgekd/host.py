"""What of this machine an engine depends on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def default_threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host() -> dict[str, Any]:
    """System, architecture, CPU model, cores, and whether 8-bit products cannot saturate (see `exact_int8`)."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": _cpuinfo("model name") or platform.processor() or "unknown",
        "cores": default_threads(),
        "exact_int8": exact_int8(),
    }


def exact_int8() -> bool:
    """Whether unsigned times signed 8-bit sums are exact here.

    x86 without VNNI adds pairs of products in 16 bits, which saturate unless weights keep to 7 bits.
    Where the flags cannot be read (x86 without /proc), the answer is no.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "x86"):
        return True
    return bool({"avx512_vnni", "avx_vnni", "amx_int8"} & set(_cpuinfo("flags").split()))


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
