"""Facts from nvidia-smi, by a program in its place that answers as it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd.backends.cuda.smi import power_and_clocks

FACTS = {"power_limit": "700.00 W", "max_sm_clock": "1980 MHz"}


@pytest.mark.parametrize(
    ("script", "facts"),
    [
        ("echo '700.00 W, 1980 MHz'", {"power_limit": "700.00 W", "max_sm_clock": "1980 MHz"}),
        (
            "echo '700.00 W, 1980 MHz'; echo '700.00 W, 1980 MHz'",
            {"power_limit": "700.00 W", "max_sm_clock": "1980 MHz"},
        ),
        ("echo '700.00 W, 1980 MHz'; echo '350.00 W, 1755 MHz'", {}),
        ("echo '[N/A], [Not Supported]'", {}),
        ("echo 'NVIDIA-SMI has failed'; exit 9", {}),
        ("", {}),
    ],
)
def test_power_and_clocks(script: str, facts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\n[ "$1" = --query-gpu=power.limit,clocks.max.sm ] || exit 2\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert power_and_clocks() == facts
    program.unlink()
    assert power_and_clocks() == {}
