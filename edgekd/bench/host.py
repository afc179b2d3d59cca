"""The machine and the software that a number was measured with."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from edgekd._version import __version__
from edgekd.host import cores

PACKAGES = ("numpy", "pillow", "onnx", "onnxruntime", "openvino")
_CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")


@dataclass(frozen=True)
class Host:
    """cores: those this process may use. governor, max_mhz: "unreadable" where the system does not tell."""

    cpu: str
    cores: int
    memory_mib: int
    governor: str
    max_mhz: str
    os: str
    machine: str
    python: str
    versions: dict[str, str]


def host() -> Host:
    """This machine, and the versions of what does the work."""
    return Host(
        cpu=_cpu(),
        cores=cores(),
        memory_mib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        governor=_sys("scaling_governor"),
        max_mhz=_sys("scaling_max_freq").removesuffix("000"),
        os=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        python=platform.python_version(),
        versions={"edgekd": __version__, **{p: v for p in PACKAGES if (v := _version(p))}},
    )


def load_average() -> tuple[float, float, float]:
    """Processes wanting the processor, over 1, 5 and 15 minutes."""
    one, five, fifteen = os.getloadavg()
    return round(one, 2), round(five, 2), round(fifteen, 2)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return named[0] if named else platform.processor() or platform.machine()


def _sys(name: str) -> str:
    try:
        return (_CPUFREQ / name).read_text().strip()
    except OSError:
        return "unreadable"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
