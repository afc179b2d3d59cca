"""The machine: its description for manifests and records, and the cores that a process may use."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from edgekd._version import __version__
from edgekd.errors import ConfigError

ROOT = Path("/")
"""Folder below which /proc, /sys, /etc and /var are read."""
PACKAGES = ("numpy", "pillow", "onnx")
"""Distributions that every engine and every measurement depends on."""
_WITHOUT_VNNI = ("SSE41", "AVX", "AVX2", "AVX512_CORE")


@dataclass(frozen=True)
class HostInfo:
    """A machine and its software, as kept with everything that was built or measured there.

    Attributes:
        system: Operating system ("Linux").
        release: Version of its kernel.
        machine: Architecture ("x86_64").
        cpu: Model name.
        cores: Cores that the process could keep busy (see `cores`).
        exact_int8: True if sums of 8-bit products cannot saturate (see `exact_int8`).
        memory_mib: Physical memory; 0 where the system does not report it.
        governor: Frequency governor of the first core, or "unreadable".
        max_mhz: Highest frequency of the first core that is allowed, or "unreadable".
        python: Version of Python.
        versions: Distribution to its version.
        facts: Further facts that the system reports, by name: board, L4T release, power mode, driver, GPU clocks.
        backends: Backend to the facts that it reports: versions, device, clocks.
    """

    system: str
    release: str
    machine: str
    cpu: str
    cores: int
    exact_int8: bool
    memory_mib: int
    governor: str
    max_mhz: str
    python: str
    versions: dict[str, str]
    facts: dict[str, str] = field(default_factory=dict)
    backends: dict[str, dict[str, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(
            [
                f"{self.cpu}, {self.cores} cores, {self.memory_mib} MiB, governor {self.governor}",
                *_pairs(self.facts),
                f"{self.system} {self.release} {self.machine}, Python {self.python}",
                *_pairs(self.versions),
                *(f"{name} ({', '.join(_pairs(facts))})" for name, facts in self.backends.items()),
            ]
        )


def _pairs(facts: Mapping[str, str]) -> list[str]:
    return [f"{name} {value}" for name, value in facts.items()]


def host_info(packages: Iterable[str] = (), backends: Mapping[str, Mapping[str, str]] | None = None) -> HostInfo:
    """Describe this machine.

    Args:
        packages: Distributions whose versions are added to those of `PACKAGES`; those not installed are omitted.
        backends: Backend to the facts that it reports.
    """
    names = dict.fromkeys((*PACKAGES, *packages))
    return HostInfo(
        system=platform.system(),
        release=platform.release(),
        machine=platform.machine(),
        cpu=cpu_model(),
        cores=cores(),
        exact_int8=exact_int8(),
        memory_mib=_memory_mib(),
        governor=_read(f"{_CPUFREQ}/scaling_governor") or "unreadable",
        max_mhz=_read(f"{_CPUFREQ}/scaling_max_freq").removesuffix("000") or "unreadable",
        python=platform.python_version(),
        versions={"edgekd": __version__, **{name: found for name in names if (found := installed_version(name))}},
        facts=_facts(),
        backends={name: dict(facts) for name, facts in (backends or {}).items()},
    )


def cpu_model() -> str:
    """Return the model name of the CPU."""
    return _cpuinfo("model name") or _cpuinfo("Model") or platform.processor() or platform.machine() or "unknown"


def installed_version(package: str) -> str | None:
    """Return the version of a distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def load_average() -> tuple[float, float, float]:
    """Return the number of running or runnable processes, averaged over 1, 5 and 15 minutes."""
    one, five, fifteen = os.getloadavg()
    return round(one, 2), round(five, 2), round(fifteen, 2)


_CPUFREQ = "sys/devices/system/cpu/cpu0/cpufreq"


def _memory_mib() -> int:
    if not hasattr(os, "sysconf"):  # Windows
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20


def _facts() -> dict[str, str]:
    """Return the facts of boards and NVIDIA's drivers that are in files; unreadable ones are omitted."""
    driver = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", _read("proc/driver/nvidia/version"))
    found = {
        "board": board(),
        "L4T": ".".join(map(str, l4t_release())),
        "power mode": _power_mode(),
        "NVIDIA driver": driver[1] if driver else "",
        "GPU MHz": _gpu_mhz(),
    }
    return {name: value for name, value in found.items() if value}


def board() -> str:
    """Return what the device tree calls this machine; empty if it has none, as PCs."""
    return _read("proc/device-tree/model")


def l4t_release() -> tuple[int, ...]:
    """Return the release of a Jetson's Linux for Tegra, (36, 4, 3); empty on other machines."""
    found = re.search(r"R(\d+) .*REVISION: ([\d.]+)", _read("etc/nv_tegra_release"))
    return tuple(int(n) for n in f"{found[1]}.{found[2]}".split(".") if n) if found else ()


def _power_mode() -> str:
    """Return a Jetson's mode as nvpmodel keeps it: its number, and its name if the configuration has one.

    Before the mode has ever been changed, nothing is kept, and the configuration's default applies.
    """
    configuration = _read("etc/nvpmodel.conf")
    mode = re.search(r"pmode:0*(\d+)", _read("var/lib/nvpmodel/status"))
    mode = mode or re.search(r"^\s*<\s*PM_CONFIG\s+DEFAULT=(\d+)", configuration, re.MULTILINE)
    if not mode:
        return ""
    name = re.search(rf"^\s*<\s*POWER_MODEL\s+ID={mode[1]}\s+NAME=(\S+)", configuration, re.MULTILINE)
    return f"{mode[1]} ({name[1]})" if name else mode[1]


def _gpu_mhz() -> str:
    """Return the range of frequencies that a Jetson's GPU is allowed, which nvpmodel and jetson_clocks set."""
    folders = (ROOT / "sys/class/devfreq").glob("*")
    for name in sorted(folder.name for folder in folders):  # 17000000.gpu, .ga10b, .gv11b; on Thor gpu-gpc-0
        limits = [_read(f"sys/class/devfreq/{name}/{end}_freq") for end in ("min", "max")]
        if re.search(r"\.g[pav]|^gpu-gpc", name) and all(map(str.isdecimal, limits)):
            return "-".join(str(int(hz) // 1_000_000) for hz in limits)
    return ""


def _read(path: str) -> str:
    """Return a small system file's text without the NUL or line break at its end; empty if it cannot be read."""
    try:
        return (ROOT / path).read_text(errors="replace").strip("\0\n ")
    except OSError:
        return ""


def visible_cores() -> int:
    """Return the number of cores that the scheduler may run this process on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores() -> int:
    """Return how many cores this process can keep busy, by affinity and its cgroups' CPU quotas (rounded up)."""
    return max(1, min([visible_cores(), *map(math.ceil, _quotas())]))


def default_threads() -> int:
    """Return `cores`, or OMP_NUM_THREADS if that is lower."""
    limit = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # "4,2": two in each of four
    return min(cores(), int(limit)) if limit.isdecimal() and int(limit) else cores()


def checked_threads(threads: int | None) -> int:
    """Return the requested number of threads, or the default if it is None.

    Raises:
        ConfigError: Less than one.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"threads: {threads}", fix="1 or more; omit it to use all cores")
    return threads or default_threads()


def exact_int8() -> bool:
    """Return True if sums of unsigned times signed 8-bit products are exact on this CPU.

    x86 without VNNI adds pairs of products in 16 bits, which saturate unless weights keep to 7 bits.
    Where the flags cannot be read (x86 without /proc), it returns False.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "x86"):
        return True
    return not kept_from_vnni() and bool({"avx512_vnni", "avx_vnni", "amx_int8"} & cpu_flags())


def kept_from_vnni() -> bool:
    """Return True if ONEDNN_MAX_CPU_ISA restricts OpenVINO to instructions older than VNNI."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _WITHOUT_VNNI


def cpu_flags() -> set[str]:
    """Return the CPU's features by Linux's names; empty where they cannot be read."""
    return set(_cpuinfo("flags").split())


def _cpuinfo(key: str) -> str:
    lines = _read("proc/cpuinfo").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _quotas() -> Iterator[float]:
    """Yield the CPU quotas, in cores, of this process's cgroups and of those around them."""
    for group, top in _cgroups():
        for folder in (group, *group.parents):
            quota = _quota(folder)
            if quota is not None:
                yield quota
            if folder == top:
                break


def _quota(folder: Path) -> float | None:
    """Read the quota of one cgroup, version 2 (`cpu.max`) or 1 (`cpu.cfs_*`), in cores; None for no limit."""
    try:
        if (folder / "cpu.max").is_file():
            most, period = (folder / "cpu.max").read_text().split()
        else:
            most, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(most) / int(period) if most not in ("max", "-1") else None
    except (OSError, ValueError):  # the root of version 2 has no such file
        return None


def _cgroups() -> Iterator[tuple[Path, Path]]:
    """Yield this process's cgroup and the topmost visible one, for each hierarchy that controls CPU time."""
    try:
        mounts = (ROOT / "proc/self/mountinfo").read_text().splitlines()
        groups = (ROOT / "proc/self/cgroup").read_text().splitlines()
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
