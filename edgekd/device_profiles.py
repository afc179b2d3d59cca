"""Device profiles, in devices/*.toml."""

from __future__ import annotations

from dataclasses import dataclass

from edgekd import config


@dataclass(frozen=True)
class DeviceProfile:
    """The data sheet of a device.

    Attributes:
        title: Its full name.
        sm: CUDA compute capability.
        memory_gb: Memory in GB.
        bandwidth_gb_s: Memory bandwidth in GB/s.
        fp16_tflops: Dense FP16 TFLOPS; 0 if it has none.
        int8_tops: Dense INT8 TOPS; 0 if it has none.
        dla: Number of deep learning accelerators.
        power_modes: Names of its power modes.
        source: Source of the numbers.
        board: Part of what the device tree calls the board, by which a machine is recognised; empty if it is not.
        batch_sizes: Batch sizes that `edgekd compile` builds for there unless others are requested; empty for the
            recipe's.
    """

    title: str
    sm: float
    memory_gb: float
    bandwidth_gb_s: float
    fp16_tflops: float
    int8_tops: float
    dla: int
    power_modes: tuple[str, ...]
    source: str
    board: str = ""
    batch_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for key in ("sm", "memory_gb", "bandwidth_gb_s", "fp16_tflops", "int8_tops", "dla"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}: {getattr(self, key)} is negative")


def profile_of(board: str) -> tuple[str, DeviceProfile] | None:
    """Return the first shipped profile of a board, by name, with that name; None if there is none.

    Args:
        board: What the device tree calls it, such as "NVIDIA Jetson Orin Nano Developer Kit"; empty if there is none.
    """
    for name in config.names("devices"):
        profile = config.load(DeviceProfile, "devices", name)
        if profile.board and profile.board in board:
            return name, profile
    return None


def table() -> list[tuple[str, ...]]:
    """Return the rows of `edgekd devices`, the header first."""
    rows: list[tuple[str, ...]] = [
        ("name", "device", "SM", "memory GB", "GB/s", "FP16 TFLOPS", "INT8 TOPS", "DLA", "power modes", "source")
    ]
    for name in config.names("devices"):
        d = config.load(DeviceProfile, "devices", name)
        numbers = [f"{v:g}" for v in (d.sm, d.memory_gb, d.bandwidth_gb_s, d.fp16_tflops, d.int8_tops, d.dla)]
        rows.append((name, d.title, *numbers, ", ".join(d.power_modes), d.source))
    return rows
