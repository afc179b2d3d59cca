"""Images for certification: no command but `evaluate --subset certify` reads them, so they may be missing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.cli import edgekd

from edgekd.artifacts.metadata import read_onnx
from edgekd.artifacts.training_images import unseen
from edgekd.data.pictures import find_pictures
from edgekd.data.split import Split, read_split
from edgekd.data.synthetic import write_cells
from edgekd.errors import ConfigError

RATIO = "ratio:3,1,1,1"


@pytest.mark.slow
def test_nothing_that_is_trained_calibrated_tuned_or_measured_reads_them(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from helpers.tiny_protocol import TINY

    from edgekd.training.train import train

    data, run, student, engine = (tmp_path / name for name in ("cells", "run", "student.onnx", "student.engine"))
    write_cells(data, count=150, size=24)
    shutil.copytree(data, tmp_path / "whole")

    def remove(split: Split) -> None:
        for item in split.subset("certify"):
            (data / item.path).unlink()

    def evaluated(subset: str) -> int:
        edgekd("evaluate", run, "--data", data, "--subset", subset, "--out", tmp_path / "metrics.json")
        return int(np.sum(json.loads((tmp_path / "metrics.json").read_text())["metrics"]["exit_0"]["confusion"]))

    train(data, run, protocol=replace(TINY, split=RATIO, group="cluster"), on_split=remove)
    split = read_split(run)
    assert len(split.subset("certify")) >= 5
    files = ("--data", data, "--split", run)
    edgekd("export", run, "--data", data, "--out", student)
    loose = ("--set", "max_accuracy_drop=100", "--set", "calibration_images=16", "--backend", "onnxruntime")
    edgekd("compile", student, "--recipe", "int8", *files, *loose, "--out", engine)
    edgekd("tune", engine, *files, "--max-accuracy-drop", "1", "--keep-exits")
    quick = ("min_seconds=0.02", "warmup_seconds=0.01", "min_count=[4,2]", "rounds=1")
    flags = [word for value in quick for word in ("--set", value)]
    edgekd("bench", engine, *files, "--no-report", *flags, "--out", tmp_path / "record.json")
    assert "lacks" in edgekd("evaluate", run, "--data", data, "--subset", "certify", code=1)
    assert evaluated("test") == len(split.subset("test"))

    shutil.rmtree(data)
    shutil.move(tmp_path / "whole", data)
    assert evaluated("certify") == len(split.subset("certify"))
    pictures = find_pictures(data, group="cluster")
    left = unseen(pictures, read_onnx(student)[1].training_images)
    assert {p.path for p in left} == {i.path for s in ("test", "certify") for i in split.subsets[s]}

    other = replace(TINY, split="ratio:3,1,0,2", weights=str(run))
    with pytest.raises(ConfigError, match=r"was trained on \d+ of the certify images"):
        train(data, tmp_path / "other", protocol=other)
