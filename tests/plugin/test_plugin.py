"""A package of somebody else's that brings one entry of each registry, installed and used through the commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgekd import config
from edgekd.artifacts.manifest import MANIFEST
from edgekd.training.protocol import Protocol

RUN = """
import json, sys
from edgekd.cli.main import app
for words in json.loads(sys.argv[1]):
    print("$", *words, flush=True)
    try:
        app(words, prog_name="edgekd")
    except SystemExit as end:
        if end.code:
            raise
"""

CONFORM = """
from pathlib import Path
from edgekd.backends.base import find_backend
from edgekd.testing import check_backend
assert check_backend(find_backend("reference"), Path(".")) == {"fp32": ""}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the package is installed into, as pip does it anywhere."""
    source = tmp_path_factory.mktemp("source") / "cytokit"
    shutil.copytree(Path(__file__).parent / "cytokit", source)
    folder = tmp_path_factory.mktemp("site")
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, str(source)], check=True)
    return folder


def finding(*places: Path) -> dict[str, str]:
    """The environment of a process that finds packages in `places`."""
    paths = [*map(str, places), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def edgekd(commands: list[str], work: Path, *places: Path, code: int = 0) -> str:
    """Run commands in turn in one process that finds packages in `places`; what it printed."""
    words = json.dumps([command.split() for command in commands])
    environment = finding(*places) | {"CYTOKIT_ARCHIVE": str(work / "plates.zip")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, words], cwd=work, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def archive(cells: Path, work: Path) -> None:
    """The cells as a zip file in the package's layout: plate-CLASS/images/wellSLIDE-NUMBER.png."""
    for file in cells.glob("*/*.png"):
        slide, _, number = file.name.partition("_")
        target = work / "set" / f"plate-{file.parent.name}" / "images" / f"well{slide}-{number}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    shutil.make_archive(str(work / "plates"), "zip", work / "set")


@pytest.mark.slow
def test_each_kind_of_entry_works_from_outside(installed: Path, cells: Path, tmp_path: Path) -> None:
    archive(cells, tmp_path)
    short = "--weights none --epochs 1 --image-size 32 --batch-size 16 --workers 0 --precision 32-true"
    split = "--data plates --split student/split.json"
    text = edgekd(
        [
            "data get plates --out plates",
            "models list two-exits",
            f"train --data plates --model two-exits --group well --out teacher {short}",
            f"distill --data plates --student two-exits --method logits --teacher teacher --out student {short}",
            "export student --out student.onnx",
            f"compile student.onnx --backend reference --set max_accuracy_drop=100 {split} --out student.engine",
            f"tune student.engine --confidence gini --max-accuracy-drop 100 {split}",
            "predict student.engine plates/plate-halo/images --csv",
            "doctor",
        ],
        tmp_path,
        installed,
    )
    made = config.load(Protocol, "protocols", str(tmp_path / "student" / "protocol.toml"))
    assert (made.network, made.method) == ("two-exits", "logits")
    division = json.loads((tmp_path / "student" / "split.json").read_text())
    assert (division["group"], division["leaking"]) == ("plates", 0)
    assert "halo" in division["classes"]
    manifest = json.loads((tmp_path / "student.engine" / MANIFEST).read_text())
    assert (manifest["backend"], manifest["metadata"]["policy"]["confidence"]) == ("reference", "gini")
    assert len([line for line in text.splitlines() if "plate-halo/images/well" in line]) == 12
    assert "reference" in text.partition("$ doctor")[2]

    without = edgekd(["predict student.engine plates"], tmp_path, code=1)
    assert "no measure 'gini' in edgekd or an installed package" in without


def test_the_backend_passes_the_conformance_suite(installed: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", CONFORM], cwd=tmp_path, env=finding(installed), check=True)
