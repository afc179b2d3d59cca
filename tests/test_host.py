"""What is read of a machine, real and fake: cores within (fake and real) cgroups, 8-bit sums, boards and drivers."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgekd import host
from edgekd.backends.base import all_backends
from edgekd.errors import ConfigError

V1 = "31 23 0:28 / {top} rw - tmpfs tmpfs rw\n32 31 0:29 {root} {top}/cpu,cpuacct rw - cgroup cgroup rw,cpuacct,cpu\n"
V2 = "30 23 0:26 {root} {top} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 16 cores without limits; its / is the folder that is returned."""
    monkeypatch.setattr(host, "ROOT", tmp_path)
    monkeypatch.setattr(host, "visible_cores", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def group(folder: Path, quota: str) -> None:
    """`max 100000` is version 2's way, `-1/100000` version 1's."""
    folder.mkdir(parents=True, exist_ok=True)
    if "/" in quota:
        most, period = quota.split("/")
        (folder / "cpu.cfs_quota_us").write_text(most + "\n")
        (folder / "cpu.cfs_period_us").write_text(period + "\n")
    else:
        (folder / "cpu.max").write_text(quota + "\n")


@pytest.mark.parametrize(
    ("mount", "at", "root", "mine", "quotas", "want"),
    [
        (V2, "", "/", "0::/", {}, 16),
        (V2, "", "/", "0::/", {"": "150000 100000"}, 2),  # a container's own; rounded up
        (V2, "", "/", "0::/user/me", {"": "max 100000", "user": "400000 100000", "user/me": "max 100000"}, 4),
        (V2, "", "/", "0::/user/me", {"user": "400000 100000", "user/me": "50000 100000"}, 1),
        (V2, "", "/", "0::/user/me", {"user": "100000 100000", "user/me": "800000 100000"}, 1),
        (V2, "", "/docker/7", "0::/docker/7/in", {"": "300000 100000", "in": "max 100000"}, 3),
        (V2, "", "/", "0::/docker/7", {"": "200000 100000"}, 2),  # the host's names, which are not mounted here
        (V2, "", "/", "0::/", {"": "9900000 100000"}, 16),
        (V2, "", "/", "0::/", {"": "damaged"}, 16),
        (
            V1,
            "cpu,cpuacct",
            "/",
            "4:memory:/x\n2:cpu,cpuacct:/a/b\n0::/",
            {"a": "250000/100000", "a/b": "-1/100000"},
            3,
        ),
        (V1, "cpu,cpuacct", "/", "2:cpu,cpuacct:/", {"": "-1/100000"}, 16),
        (V1, "cpu,cpuacct", "/docker/7", "2:cpu,cpuacct:/docker/7", {"": "20000/100000"}, 1),
    ],
)
def test_quotas_of_cgroups(
    many: Path, mount: str, at: str, root: str, mine: str, quotas: dict[str, str], want: int
) -> None:
    top = many / "sys fs/cgroup"
    (many / "proc/self/mountinfo").write_text(mount.format(root=root, top=str(top).replace(" ", "\\040")))
    (many / "proc/self/cgroup").write_text(mine + "\n")
    for name, quota in quotas.items():
        group(top / at / name, quota)
    assert host.cores() == host.default_threads() == want


@pytest.mark.parametrize(
    ("asked", "want"), [("3", 3), ("64", 16), ("4,2", 4), ("0", 16), ("-2", 16), ("many", 16), ("", 16), (None, 16)]
)
def test_omp_num_threads(many: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None, want: int) -> None:
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert (host.default_threads(), host.cores()) == (want, 16)


def test_affinity() -> None:
    one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    script = f"{one}; from edgekd import host; print(host.cores())"
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity here")
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "1\n"


def test_a_real_cgroup() -> None:
    """Half a core, granted to the group around the process's own."""
    folder = Path("/sys/fs/cgroup/cpu") / f"edgekd-{os.getpid()}"
    if not (folder.parent / "cpu.cfs_quota_us").is_file():
        pytest.skip("no version 1 cgroups here")
    inner = folder / "inner"
    try:
        inner.mkdir(parents=True)
        (folder / "cpu.cfs_quota_us").write_text("50000")
        script = "from edgekd import host; print(host.visible_cores(), host.cores(), host.default_threads())"
        enter = f"open({str(inner / 'cgroup.procs')!r}, 'w').write('0')"
        done = subprocess.run([sys.executable, "-c", f"{enter}; {script}"], capture_output=True, text=True, check=True)
    except PermissionError:
        pytest.skip("not allowed to make one")
    finally:
        for made in (inner, folder):
            if made.is_dir():
                made.rmdir()
    assert done.stdout.split() == [str(host.visible_cores()), "1", "1"]


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_that_cannot_be(threads: int) -> None:
    with pytest.raises(ConfigError, match=f"threads: {threads}"):
        host.checked_threads(threads)
    assert host.checked_threads(None) == host.default_threads()


@pytest.mark.parametrize(
    ("machine", "flags", "isa", "exact"),
    [
        ("x86_64", "fpu avx2 avx512f avx512_vnni", "", True),
        ("AMD64", "fpu avx2 avx_vnni", "", True),
        ("x86_64", "fpu avx2", "", False),
        ("x86_64", "fpu avx2 avx512f avx512_vnni", "avx2", False),
        ("x86_64", "fpu avx2 avx512f avx512_vnni", "ALL", True),
        ("x86_64", None, "", False),
        ("aarch64", "fp asimd", "", True),
    ],
)
def test_exact_int8(
    many: Path, monkeypatch: pytest.MonkeyPatch, machine: str, flags: str | None, isa: str, exact: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    if flags is not None:
        (many / "proc/cpuinfo").write_text(f"model name\t: Some CPU\nflags\t\t: {flags}\n")
    assert host.exact_int8() is exact


def test_this_machine() -> None:
    here = host.host_info(["numpy", "no-such-distribution"], {"some": {"version": "1"}})
    assert 1 <= here.cores <= (os.cpu_count() or 1)
    assert here.memory_mib > 100
    assert here.versions["numpy"] == np.__version__
    assert "no-such-distribution" not in here.versions
    assert str(here).startswith(f"{here.cpu}, {here.cores} cores, ")
    assert str(here).endswith(", some (version 1)")


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_facts_of_a_jetson(many: Path) -> None:
    """Its files as JetPack 6 writes them."""
    put(
        many,
        {
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
            "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet\n",
            "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
            "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
            "sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\n",
        },
    )
    here = host.host_info()
    assert here.cpu == "ARMv8 Processor rev 1 (v8l)"
    assert here.facts == {
        "board": "NVIDIA Jetson Orin Nano Developer Kit",
        "L4T": "36.4.3",
        "power mode": "2 (MAXN_SUPER)",
        "GPU MHz": "306-1020",
    }
    (many / "etc/nvpmodel.conf").unlink()
    assert host.host_info().facts["power mode"] == "2"


def test_facts_of_jetsons_that_differ(many: Path) -> None:
    """A Thor whose power mode was never changed, with the clocks that jetson_clocks fixed; a container's release."""
    modes = "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=120W >\n"
    put(
        many,
        {
            "etc/nv_tegra_release": "# R38 (release), REVISION: 2.2, GCID: 42205042, BOARD: generic, EABI: aarch64, "
            "DATE: Thu Sep 25 22:47:11 UTC 2025\n# KERNEL_VARIANT: oot\n",
            "etc/nvpmodel.conf": f"# < PM_CONFIG DEFAULT=9 > is a comment\n{modes}< PM_CONFIG DEFAULT=1 >\n",
            "sys/class/devfreq/gpu-gpc-0/min_freq": "1575000000\n",
            "sys/class/devfreq/gpu-gpc-0/max_freq": "1575000000\n",
            "sys/class/devfreq/a808d0000.vic/min_freq": "0\n",
            "sys/class/devfreq/a808d0000.vic/max_freq": "700000000\n",
        },
    )
    assert host.host_info().facts == {"L4T": "38.2.2", "power mode": "1 (120W)", "GPU MHz": "1575-1575"}
    put(many, {"etc/nv_tegra_release": "# R36 (release), REVISION: 3.0\n"})
    assert host.l4t_release() == (36, 3, 0)


def test_facts_of_other_machines(many: Path) -> None:
    """A Raspberry Pi names its CPU by its board; a desktop has NVIDIA's driver; another has none of it."""
    assert host.host_info().facts == {}
    put(
        many,
        {
            "proc/cpuinfo": "processor\t: 0\n\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "2400000\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
        },
    )
    here = host.host_info()
    assert (here.cpu, here.max_mhz, here.governor) == ("Raspberry Pi 5 Model B Rev 1.0", "2400", "ondemand")
    for line in (
        "NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu",
        "NVIDIA UNIX Open Kernel Module for x86_64  535.129.03",
    ):
        put(many, {"proc/driver/nvidia/version": f"NVRM version: {line}\nGCC version: 12\n"})
        assert host.host_info().facts == {"NVIDIA driver": "535.129.03"}


def test_a_jetson_does_not_take_tensorrt_from_pypi(many: Path) -> None:
    (backend,) = (b for b in all_backends() if b.name == "tensorrt")
    assert backend.install_command == "pip install 'edgekd[tensorrt]'"
    put(many, {"etc/nv_tegra_release": "# R36 (release), REVISION: 4.3\n"})
    assert "python3-libnvinfer" in backend.install_command
    assert "pip" not in backend.install_command
