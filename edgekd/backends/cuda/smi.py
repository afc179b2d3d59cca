"""Driver, power limit and clocks of a GPU from nvidia-smi; on a Jetson `edgekd.host` reads nvpmodel's files."""

from __future__ import annotations

import shutil
import subprocess

QUERIES = {"driver": "driver_version", "power_limit": "power.limit", "max_sm_clock": "clocks.max.sm"}
"""Fact to the property that nvidia-smi is queried for."""


def power_and_clocks(pci_bus_id: str) -> dict[str, str]:
    """Return the driver's version, the power limit and the highest SM clock.

    Args:
        pci_bus_id: The GPU, as CUDA names it: nvidia-smi numbers GPUs in another order.

    Returns:
        The facts that nvidia-smi reports; empty if it is missing or fails.
    """
    program = shutil.which("nvidia-smi")
    if not program:
        return {}
    command = [program, f"--id={pci_bus_id}", f"--query-gpu={','.join(QUERIES.values())}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = map(str.strip, done.stdout.partition("\n")[0].split(","))
    return {fact: value for fact, value in zip(QUERIES, values) if value and not value.startswith("[")}  # [N/A]
