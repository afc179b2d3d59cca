"""Every reader on mutated inputs of fixed seeds; `python tests/faults/fuzz.py` is the long run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

COUNT = 25


@pytest.mark.slow
def test_no_reader_falls(base: Path, tmp_path: Path) -> None:
    """No traceback, hang, crash, wrong accept, nonsense, or code that ran."""
    script, findings = Path(__file__).with_name("fuzz.py"), tmp_path / "findings.jsonl"
    command = [sys.executable, str(script), "--base", str(base), "--count", str(COUNT), "--out", str(findings)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + findings.read_text()
    summary = json.loads(done.stdout)
    assert len(summary) == 22
    assert all(sum(kinds.values()) == COUNT for kinds in summary.values())
    assert all(kinds.get("refused") for kinds in summary.values())
