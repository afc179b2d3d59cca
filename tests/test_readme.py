"""The README's commands are run, its table is a record's, and what it says of names is true."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgekd.bench.record import read_record
from edgekd.bench.tables import markdown, pipe_table, summary_table, to_csv
from edgekd.data.synthetic import write_cells

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALLER = {
    "train": "--epochs 1 --image-size 32 --set batch_size=16 --set workers=0",
    "distill": "--epochs 1 --image-size 32 --set batch_size=16 --set workers=0",
    "compile": "--set max_accuracy_drop=100 --set calibration_images=16",
    "tune": "--keep-exits",
    "add-exits": "--views 1",
    "bench": "--suite quick --set min_seconds=0.02 --set warmup_seconds=0.01 --set min_count=[4,2] --set rounds=1",
}
"""What is added to the README's commands so that they end in seconds."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    """A folder with real cells, thirty a class, and the real ImageNet weights, as the README supposes."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("readme")
    for source in (shared / "data" / "sipakmed").iterdir():
        (folder / "sipakmed" / source.name).mkdir(parents=True)
        files = sorted(source.iterdir())
        for file in [files[0], *files[1 :: len(files) // 30]]:
            shutil.copy(file, folder / "sipakmed" / source.name / file.name)
        for name, kept in (("pictures", files[2::10]), ("new-pictures", files[3::10])):
            (folder / name).mkdir(exist_ok=True)
            for file in kept:
                shutil.copy(file, folder / name / f"{source.name}-{file.name}")
    subprocess.run([sys.executable, shared / "data" / "unpack.py", folder, "weights"], check=True)
    return folder


@pytest.mark.slow
def test_the_path_command_by_command(place: Path) -> None:
    """Every command of the README's shell blocks, in order, on real images, made smaller."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    commands = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    commands = [c for c in commands if c.startswith("edgekd ")]
    assert {c.split()[1] for c in commands} >= {"add-exits", "compile", "tune", "certify", "predict"}
    for command in commands:
        smaller = f"{command} {SMALLER.get(command.split()[1], '')}"
        smaller = re.sub(r"(--max-\S+) [0-9.]+", r"\1 90", smaller)
        if "add-exits classifier.onnx" in command:
            shutil.copy(place / "plain.onnx", place / "classifier.onnx")
            (place / "classes.txt").write_text("\n".join(sorted(p.name for p in (place / "sipakmed").iterdir())))
        done = subprocess.run(smaller, shell=True, cwd=place, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{smaller}\n{done.stdout}{done.stderr}"
    assert (place / "record.html").is_file()


@pytest.mark.slow
def test_python_blocks(place: Path) -> None:
    """After the commands: the README's Python."""
    for block in blocks("python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=place, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_tables_are_the_records() -> None:
    """Each table of numbers in the README, and each page beside a record, is rendered from the record that it names."""
    named = re.findall(r"<!-- summary of (\S+) -->\n(.*?)\n\n", README, flags=re.DOTALL)
    assert len(named) == 2
    for path, text in named:
        record = read_record(ROOT / path)
        assert text.strip() == pipe_table(summary_table(record)).strip(), path
        assert (ROOT / path).with_suffix(".md").read_text() == markdown(record)
        assert (ROOT / path).with_suffix(".csv").read_text() == to_csv(record)


def test_the_certified_table_is_that_of_the_records() -> None:
    spec = importlib.util.spec_from_file_location("certified", ROOT / "benchmarks" / "certified.py")
    assert spec is not None
    assert spec.loader is not None
    certified = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(certified)
    folder = ROOT / "benchmarks" / "results" / "certified"
    names = {
        "SIPaKMeD, exits on the frozen network": "sipakmed-frozen",
        "SIPaKMeD, student trained jointly": "sipakmed-joint",
        "Kather 2016, exits on the frozen network": "kather-frozen",
        "MobileNetV3 from timm (fp32), exits on the frozen network": "mobilenetv3-timm",
    }
    table = certified.table({name: read_record(folder / f"{file}.json") for name, file in names.items()})
    assert f"<!-- benchmarks/results/certified.md -->\n{table.strip()}\n\n" in README
    assert folder.with_suffix(".md").read_text().strip() == table.strip()


def test_links_and_make_targets_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_demo_keeps_what_is_there(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from edgekd.cli.main import app

    write_cells(tmp_path / "full" / "cells", count=10, size=16)
    assert "is not empty" in CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "full")]).output
