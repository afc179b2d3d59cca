"""What of this machine an engine depends on."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgekd.errors import ConfigError

PROC = Path("/proc")
_WITHOUT_VNNI = ("SSE41", "AVX", "AVX2", "AVX512_CORE")


def visible_cores() -> int:
    """The cores that the scheduler may put this process on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores() -> int:
    """The cores that this process can keep busy: by affinity and by the CPU quotas of its cgroups, rounded up."""
    return max(1, min([visible_cores(), *map(math.ceil, _quotas())]))


def default_threads() -> int:
    """`cores`, or fewer if OMP_NUM_THREADS says so."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # "4,2": two in each of four
    return min(cores(), int(asked)) if asked.isdecimal() and int(asked) else cores()


def checked_threads(threads: int | None) -> int:
    """The number asked for, or the default if None.

    Raises:
        ConfigError: less than one.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"threads: {threads}", fix="1 or more; leave it out to use all cores")
    return threads or default_threads()


def host() -> dict[str, Any]:
    """System, architecture, CPU model, cores, and whether 8-bit products cannot saturate (see `exact_int8`)."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": _cpuinfo("model name") or platform.processor() or "unknown",
        "cores": cores(),
        "exact_int8": exact_int8(),
    }


def exact_int8() -> bool:
    """Whether unsigned times signed 8-bit sums are exact here.

    x86 without VNNI adds pairs of products in 16 bits, which saturate unless weights keep to 7 bits.
    Where the flags cannot be read (x86 without /proc), the answer is no.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "x86"):
        return True
    return not kept_from_vnni() and bool({"avx512_vnni", "avx_vnni", "amx_int8"} & cpu_flags())


def kept_from_vnni() -> bool:
    """Whether ONEDNN_MAX_CPU_ISA keeps OpenVINO to instructions older than VNNI."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _WITHOUT_VNNI


def cpu_flags() -> set[str]:
    """What the CPU can, by Linux's names; empty where it does not say."""
    return set(_cpuinfo("flags").split())


def _cpuinfo(key: str) -> str:
    path = PROC / "cpuinfo"
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _quotas() -> Iterator[float]:
    """Cores' worth of time that this process's cgroups and those around them may take; nothing for no limit."""
    for group, top in _cgroups():
        for folder in (group, *group.parents):
            quota = _quota(folder)
            if quota is not None:
                yield quota
            if folder == top:
                break


def _quota(folder: Path) -> float | None:
    """Of one cgroup, version 2 (`cpu.max`) or 1 (`cpu.cfs_*`)."""
    try:
        if (folder / "cpu.max").is_file():
            most, period = (folder / "cpu.max").read_text().split()
        else:
            most, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(most) / int(period) if most not in ("max", "-1") else None
    except (OSError, ValueError):  # the root of version 2 has no such file
        return None


def _cgroups() -> Iterator[tuple[Path, Path]]:
    """(this process's cgroup, the topmost one that can be seen) for each hierarchy that counts CPU time."""
    try:
        mounts = (PROC / "self/mountinfo").read_text().splitlines()
        groups = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    paths = {
        controller: path for _, names, path in (g.split(":", 2) for g in groups) for controller in names.split(",")
    }
    for mount in mounts:  # id, parent, device, root, mount point, options, …, "-", type, source, options
        fields, _, kind = mount.partition(" - ")
        root, point = (name.replace("\\040", " ") for name in fields.split()[3:5])
        type_, _, options = kind.split(" ", 2)
        controller = {"cgroup": "cpu", "cgroup2": ""}.get(type_)
        if controller not in paths or (type_ == "cgroup" and "cpu" not in options.split(",")):
            continue
        # A container may see the names of the host and its own cgroup alone, mounted as the root.
        inside = os.path.relpath(paths[controller], root)
        yield Path(point) if inside.startswith("..") else Path(point) / inside, Path(point)
