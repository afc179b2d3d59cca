"""Facts from nvidia-smi, by a program in its place that answers as it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd.backends.cuda.smi import power_and_clocks

FACTS = {"driver": "535.129.03", "power_limit": "700.00 W", "max_sm_clock": "1980 MHz"}


@pytest.mark.parametrize(
    ("script", "facts"),
    [
        ("echo '535.129.03, 700.00 W, 1980 MHz'", FACTS),
        ("echo '535.129.03, [N/A], [Not Supported]'", {"driver": "535.129.03"}),
        ("echo 'NVIDIA-SMI has failed'; exit 9", {}),
        ("", {}),
    ],
)
def test_power_and_clocks(script: str, facts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the GPU that CUDA uses, by its bus: with several, nvidia-smi numbers them otherwise."""
    program = tmp_path / "nvidia-smi"
    query = "--query-gpu=driver_version,power.limit,clocks.max.sm"
    program.write_text(f'#!/bin/sh\n[ "$1 $2" = "--id=0000:65:00.0 {query}" ] || exit 2\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert power_and_clocks("0000:65:00.0") == facts
    program.unlink()
    assert power_and_clocks("0000:65:00.0") == {}
