"""Energy from fake trees of /sys, laid out as the kernel does on a PC and on Jetsons."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edgekd.bench import energy
from edgekd.bench.energy import find_meter, idle_watts, integral

ORIN_NANO = {"1-0040": {1: ("VDD_IN", 5000, 800), 2: ("VDD_CPU_GPU_CV", 5000, 100), 3: ("VDD_SOC", 5000, 220)}}
"""I2C address, channel: label, mV, mA."""
AGX_ORIN = {
    "1-0040": {1: ("VDD_GPU_SOC", 20000, 120), 2: ("VDD_CPU_CV", 20000, 40), 3: ("VIN_SYS_5V0", 5000, 700)},
    "1-0041": {1: ("NC", 0, 0), 2: ("VDDQ_VDD2_1V8AO", 5000, 60), 3: ("NC", 0, 0)},
}
THOR = {"2-0040": {1: ("VDD_GPU", 20000, 400), 2: ("VDD_CPU_SOC_MSS", 20000, 600), 3: ("VIN_SYS_5V0", 5000, 900)}}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(energy, "ROOT", tmp_path)
    monkeypatch.setattr(energy, "PERIOD_S", 0.005)
    return tmp_path


def jetson(root: Path, chips: dict[str, dict[int, tuple[str, int, int]]]) -> Path:
    """The sensors' files; returns the folder of the first chip's."""
    folders = []
    for number, (address, channels) in enumerate(chips.items()):
        folder = root / "sys/bus/i2c/drivers/ina3221" / address / "hwmon" / f"hwmon{number + 1}"
        folder.mkdir(parents=True)
        folders.append(folder)
        for channel, (label, mv, ma) in channels.items():
            (folder / f"in{channel}_label").write_text(f"{label}\n")
            (folder / f"in{channel}_input").write_text(f"{mv}\n")
            (folder / f"curr{channel}_input").write_text(f"{ma}\n")
        (folder / "in7_label").write_text("sum of shunt voltages\n")
        (folder / "in7_input").write_text("12\n")
    return folders[0]


@pytest.mark.parametrize(
    ("chips", "source", "watts"),
    [
        (ORIN_NANO, "VDD_IN (INA3221, ", 4.0),
        (AGX_ORIN, "sum of VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0 (INA3221, ", 6.7),
    ],
)
def test_power_of_a_jetson(
    root: Path, chips: dict[str, dict[int, tuple[str, int, int]]], source: str, watts: float
) -> None:
    jetson(root, chips)
    meter = find_meter()
    assert meter is not None
    assert meter.source.startswith(source)
    assert idle_watts(meter, seconds=0.02) == pytest.approx(watts)


def test_energy_follows_the_power(root: Path) -> None:
    folder = jetson(root, ORIN_NANO)
    meter = find_meter()
    assert meter is not None
    end = meter.start()
    time.sleep(0.05)
    (folder / "curr1_input").write_text("2400\n")
    time.sleep(0.05)
    spent = end()
    assert spent is not None
    assert spent.seconds >= 0.1
    assert 4.0 < spent.watts < 12.0


def test_a_sensor_that_is_lost_is_not_zero(root: Path) -> None:
    folder = jetson(root, ORIN_NANO)
    meter = find_meter()
    assert meter is not None
    end = meter.start()
    (folder / "in1_input").unlink()
    assert end() is None
    assert idle_watts(meter, seconds=0.0) is None


def test_integral_by_hand() -> None:
    assert integral([(0, 2.0), (1, 4.0), (3, 4.0)]) == 11.0
    assert integral([(0, 2.0), (1, None), (3, 4.0)]) == 9.0
    assert integral([(0, None), (1, 2.0), (3, 4.0)]) is None
    assert integral([(0, 2.0)]) is None


def test_a_part_of_the_board_is_not_its_energy(root: Path) -> None:
    """On Thor, VIN is another chip's; one rail of a board without a sensor for the whole says nothing."""
    assert find_meter() is None
    jetson(root, THOR)
    assert find_meter() is None
    assert idle_watts(None) is None


def test_a_sensor_that_this_user_may_not_read(root: Path) -> None:
    (jetson(root, ORIN_NANO) / "curr1_input").unlink()
    assert find_meter() is None


def test_counters_of_processor_packages(root: Path) -> None:
    package = root / "sys/class/powercap/intel-rapl:0"
    package.mkdir(parents=True)
    (package / "energy_uj").write_text("nonsense")
    assert find_meter() is None
    (package / "max_energy_range_uj").write_text("1000000\n")
    (package / "energy_uj").write_text("400000\n")
    meter = find_meter()
    assert meter is not None
    assert meter.source == "processor packages (RAPL)"
    assert idle_watts(meter, seconds=0.01) == 0.0  # a counter that stands still
    end = meter.start()
    (package / "energy_uj").write_text("900000\n")
    spent = end()
    assert spent is not None
    assert spent.joules == 0.5
    end = meter.start()
    (package / "energy_uj").write_text("100000\n")  # wrapped around
    spent = end()
    assert spent is not None
    assert spent.joules == pytest.approx(0.2)
    end = meter.start()
    (package / "energy_uj").unlink()
    assert end() is None
