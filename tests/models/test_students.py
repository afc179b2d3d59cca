"""The script of benchmarks/ that measures what int8 costs: a trained run and a network of random weights, small."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_protocol import TINY

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_students_script(cells: Path, tmp_path: Path) -> None:
    from edgekd.data.split import read_split
    from edgekd.training.train import train

    train(cells, tmp_path / "run", protocol=replace(TINY, network="squeezenet1_1"))
    settings = {"image-size": 48, "images": 12, "calibration": 8, "rounds": 2, "seconds": 0.02, "threads": 1}
    small = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    names = ["--names", "squeezenet1_1", "multi-exit-squeezenet1_1"]
    command = [sys.executable, ROOT / "benchmarks" / "students.py", cells, tmp_path / "run", *names, *small]
    done = subprocess.run([*command, "--out", tmp_path / "t"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run, untrained = json.loads((tmp_path / "t.json").read_text())["networks"]
    assert (run["network"], run["exits"], run["weights"]) == ("squeezenet1_1", 1, "trained (ratio:3,1,1, none)")
    assert (untrained["network"], untrained["exits"], untrained["weights"]) == ("multi-exit-squeezenet1_1", 4, "random")
    assert len(run["labels"]) == min(12, len(read_split(tmp_path / "run").subset("test")))
    assert [(r["backend"], r["precision"]) for r in run["results"]] == [
        ("onnxruntime", "fp32"),
        ("onnxruntime", "int8"),
        ("openvino", "fp32"),
        ("openvino", "int8"),
    ]
    assert all(len(r["samples_ms"]) == 2 and min(map(len, r["samples_ms"])) >= 10 for r in run["results"])
    rows = [line.split("|")[1:-1] for line in (tmp_path / "t.md").read_text().splitlines() if line.startswith("|")]
    right = np.array(run["results"][0]["predictions"]) == np.array(run["labels"])
    assert rows[2][8].strip() == f"{100 * right.mean():.2f}"
    assert rows[4][8].strip() == "–"
    again = subprocess.run([*command, "--out", tmp_path / "t"], capture_output=True, text=True, check=False)
    assert "records are never changed" in again.stderr
