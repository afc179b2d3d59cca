"""Each command's last line, `next: …`, is a command that runs: from synthetic cells to answers."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from helpers.cli import edgekd

SMALLER = {
    "data": "--count 120 --size 24",
    "train": "--epochs 1 --image-size 32 --batch-size 16 --workers 0 --precision 32-true --seed 3",
    "distill": "",  # it is told what train was
    "compile": "--set max_accuracy_drop=100 --set calibration_images=16 --backend onnxruntime",
    "tune": "--keep-exits",
    "bench": "--set min_seconds=0.02 --set warmup_seconds=0.01 --set min_count=[4,2] --set rounds=1 --no-report",
}


def test_printed_commands_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    (tmp_path / "a place").mkdir()
    monkeypatch.chdir(tmp_path / "a place")
    words, ran = ["data", "synthetic", "--out", "my cells"], []
    while words:
        ran.append(words)
        said = edgekd(*words, *shlex.split(SMALLER.get(words[0], ""))).splitlines()
        following = [line for line in said if line.startswith("next: edgekd ")]
        words = shlex.split(following[0])[2:] if following else []
    names = [words[0] for words in ran]
    assert names == ["data", "train", "distill", "export", "compile", "tune", "bench", "predict"]
    distill = shlex.join(ran[2])
    assert "--weights runs/teacher" in distill  # a ResNet18, as the student's backbone is
    for given in ("--data 'my cells'", "--protocol demo", "--image-size 32", "--workers 0", "--precision 32-true"):
        assert given in distill
    assert "my cells" in shlex.join(ran[4])
