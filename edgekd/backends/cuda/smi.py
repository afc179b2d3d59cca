"""Power limit and clocks of a GPU from nvidia-smi; on a Jetson `edgekd.host` reads nvpmodel's files."""

from __future__ import annotations

import shutil
import subprocess

QUERIES = {"power_limit": "power.limit", "max_sm_clock": "clocks.max.sm"}
"""Fact to the property that nvidia-smi is queried for."""


def power_and_clocks() -> dict[str, str]:
    """Return the power limit and the highest SM clock.

    Returns:
        The facts that nvidia-smi reports; empty if nvidia-smi is missing or fails, or if several GPUs differ, because
        CUDA numbers them differently.
    """
    program = shutil.which("nvidia-smi")
    if not program:
        return {}
    command = [program, f"--query-gpu={','.join(QUERIES.values())}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    gpus = {tuple(map(str.strip, line.split(","))) for line in done.stdout.splitlines()}
    if len(gpus) != 1:
        return {}
    return {fact: value for fact, value in zip(QUERIES, gpus.pop()) if value and not value.startswith("[")}  # [N/A]
