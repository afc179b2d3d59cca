"""What commands must not write over, found out before they work, and what a shell may do to their streams."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faults.kills import tree
from helpers.cli import edgekd
from helpers.other_process import Other

from edgekd import files
from edgekd.bench.record import read_record
from edgekd.bench.report import html
from edgekd.files import atomic_write
from edgekd.serialization import to_json
from edgekd.training.sweep import summary

IMAGES = "--data cells --split run/split.json"
TRAIN = "train --data cells --model multi-exit-test_resnet --protocol demo --weights none --image-size 32"
BENCH = f"bench student.engine {IMAGES} --suite tiny.toml --no-report"


@pytest.fixture
def work(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the base with files of the user's own, as the working folder, in which no work may begin."""
    shutil.copytree(base, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "work" / "notes.md").write_text("## Notes\nyears of work\n")
    (tmp_path / "work" / "photo.png").write_bytes(next((base / "cells").rglob("*.png")).read_bytes())
    (tmp_path / "work" / "site").mkdir()
    for name in ("manifest.json", "summary.json", "gao2022-table3.json"):
        (tmp_path / "work" / "site" / name).write_text('{"name": "a page"}')
    for work in (
        "compiler.build.compile_engine",
        "bench.measure.bench",
        "compiler.exit_selection.tune_engine",
        "export.export",
    ):
        monkeypatch.setattr(f"edgekd.{work}", lambda *given, **more: pytest.fail("it began to work"))
    monkeypatch.setattr("edgekd.data.images.load_subset", lambda *given, **more: pytest.fail("it read images"))
    return tmp_path / "work"


def refused(line: str, said: str, work: Path) -> None:
    before = tree(work)
    text = edgekd(*line.split(), code=1)
    assert said in text
    assert "fix: " in text
    assert tree(work) == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("evaluate run --plot run/model.safetensors", "has no suffix of a plot"),
        ("evaluate run --plot student.onnx", "has no suffix of a plot"),
        ("evaluate run --plot photo.png", "is not a plot"),
        ("evaluate run --out student.onnx", "is not a file of edgekd evaluate"),
        ("evaluate run --out record.json", "is not a file of edgekd evaluate"),
        ("evaluate run --out site", "is a folder"),
        ("export run --out run/split.json", "is not a student.onnx"),
        ("export run --out run/model.safetensors", "is not a student.onnx"),
        ("export run --out student.engine/stage_0.onnx", "is not a student.onnx"),
        ("export run --out site", "is a folder"),
        ("predict student.engine cells --out record.json", "is not a file of edgekd predict"),
        ("predict student.engine cells --out record.csv", "is not a file of edgekd predict"),
        ("compile student.onnx --out run", "is not an engine"),
        ("compile student.onnx --out site", "is not an engine"),
        ("compile student.onnx --out notes.md", "is not an engine"),
        (f"{BENCH} --out record.json", "records are never changed"),
        (f"{BENCH} --out site", "records are never changed"),
        (f"{BENCH} --out notes.json", "is not a table of edgekd bench"),
        (f"{BENCH} --out new.md", "a table would replace it"),
        (f"{TRAIN} --out run", "already holds a run"),
        (f"{TRAIN} --out site", "is not empty and not a run folder"),
        (f"{TRAIN} --out site --resume", "is not empty and not a run folder"),
        (f"{TRAIN} --out notes.md", "is a file"),
        (f"{TRAIN} --out site --seeds 0,1", "is not a summary of a sweep"),
        ("reproduce gao2022-table3 --data cells --out site --runs runs", "is not a table of edgekd reproduce"),
        ("data synthetic --out site", "is not empty"),
        ("data synthetic --out notes.md", "is not empty"),
        ("data get kather2016 --out site", "is not empty"),
    ],
)
def test_nothing_of_another_kind_is_replaced(line: str, said: str, work: Path) -> None:
    refused(line, said, work)


@pytest.mark.parametrize(
    "line",
    [
        f"{TRAIN} --out cells",
        f"{TRAIN} --out cells/run",
        f"{TRAIN} --out link/run",
        f"{TRAIN} --seeds 0,1 --out cells/runs",
        f"compile student.onnx {IMAGES} --out cells/a.engine",
        "export run --data cells --out cells/student.onnx",
        "evaluate run --data cells --plot cells/halo/plot.png",
        f"{BENCH} --out cells/record.json",
        "reproduce gao2022-table3 --data cells --out new --runs cells/runs",
    ],
)
def test_no_output_lies_among_the_images(line: str, work: Path) -> None:
    (work / "link").symlink_to("cells")
    refused(line, "is in the data folder", work)


@pytest.mark.parametrize("where", ["notes.md/x", "/proc/x"])
@pytest.mark.parametrize(
    "line",
    [
        f"{TRAIN} --out ",
        f"{TRAIN} --seeds 0,1 --out ",
        f"compile student.onnx {IMAGES} --out ",
        "export run --out ",
        "evaluate run --plot ",
        "evaluate run --out ",
        f"{BENCH} --out ",
        "data synthetic --out ",
        "demo --out ",
    ],
)
def test_what_cannot_be_written_is_found_before_the_work(line: str, where: str, work: Path) -> None:
    refused(line + where, "error: ", work)


@pytest.mark.parametrize(
    ("line", "held"),
    [
        (f"{TRAIN} --out new", "new"),
        (f"{TRAIN} --seeds 0,1 --out new", "new"),
        (f"compile student.onnx {IMAGES} --out student.engine", "student.engine"),
        (f"tune student.engine {IMAGES} --latency-ms 9", "student.engine/manifest.json"),
        ("export run --out student.onnx", "student.onnx"),
        ("evaluate run --out new.json", "new.json"),
        (f"{BENCH} --out new.json", "new.json"),
        ("data synthetic --out new", "new"),
    ],
)
def test_two_commands_do_not_write_the_same(line: str, held: str, work: Path) -> None:
    other = Other(f"locked(Path({str(work / held)!r}))")
    try:
        refused(line, f"is being written by process {other.process.pid}", work)
    finally:
        other.kill()


def test_an_engine_with_more_in_its_folder_is_not_replaced(work: Path) -> None:
    (work / "student.engine" / "notes.txt").write_text("why this one")
    refused("compile student.onnx", "notes.txt would be lost", work)


def test_every_output_is_known_again(base: Path, tmp_path: Path) -> None:
    """What is written may be written again."""
    root = Path(__file__).parents[2] / "benchmarks" / "results" / "papers"
    record = read_record(base / "record.json")
    (tmp_path / "page.html").write_text(html(record, data=base / "cells"))
    atomic_write(tmp_path / "summary.json", to_json(summary({})))
    edgekd("evaluate", base / "run", "--plot", tmp_path / "plot.png", "--out", tmp_path / "measures.json")
    assert files.PLOT.matches(tmp_path / "plot.png")
    assert files.NETWORK.matches(base / "student.onnx")
    assert files.ENGINE.matches(base / "student.engine" / "manifest.json")
    assert files.MARKDOWN.matches(base / "record.md")
    assert files.CSV.matches(base / "record.csv")
    assert files.PAGE.matches(tmp_path / "page.html")
    assert files.SUMMARY.matches(tmp_path / "summary.json")
    assert files.MEASURES.matches(tmp_path / "measures.json")
    assert all(files.RESULT.matches(path) for path in root.glob("*.json"))
    assert all(files.PAPER.matches(path) for path in root.glob("*-table*.md"))


def test_compiling_onto_a_link_keeps_it(base: Path, tmp_path: Path) -> None:
    """A link to the engine in use is a common way to name it: the folder behind it is replaced."""
    (tmp_path / "far").mkdir()
    shutil.copytree(base / "student.engine", tmp_path / "far" / "engine")
    before = (tmp_path / "far" / "engine" / "manifest.json").read_bytes()
    (tmp_path / "link").symlink_to("far/engine")
    words = ["--backend", "onnxruntime", "--set", "batch_sizes=[1]", "--out", tmp_path / "link"]
    edgekd("compile", base / "student.onnx", *words)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / "engine" / "manifest.json").read_bytes() != before
    assert sorted(p.name for p in tmp_path.rglob("*") if "engine" in p.name) == ["engine"]


PREDICT = "python -m edgekd predict student.engine cells --csv"
PRINT = "\"from edgekd import signals; signals.streams(); print('caf\\u00e9 \\u2013 \\udcff')\""


@pytest.mark.parametrize(
    ("line", "code", "lines", "said"),
    [
        (f"{PREDICT} >&-", 0, 0, ""),
        (f"{PREDICT} 2>&-", 0, 151, ""),
        (f"{PREDICT} <&-", 0, 151, ""),
        (f"{PREDICT} >&- 2>&- <&-", 0, 0, ""),
        (f"{PREDICT} > /dev/full", 1, 0, "error: No space left on device: standard output"),
        ("python -m edgekd devices > /dev/full", 1, 0, "the printed output is truncated"),
        ("python -m edgekd --help > /dev/full", 1, 0, "the printed output is truncated"),
        ("python -m edgekd predict none cells 2> /dev/full", 1, 0, ""),
        (f"PYTHONIOENCODING=ascii python -c {PRINT}", 0, 1, ""),
        (f"LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 python -c {PRINT}", 0, 1, ""),
        ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 python -m edgekd devices", 0, 0, ""),
    ],
)
def test_streams_that_are_closed_full_or_ascii(line: str, code: int, lines: int, said: str, base: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(line, shell=True, cwd=base, capture_output=True, text=True, env=os.environ | {"PATH": path})
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert said in done.stderr
    assert len(done.stdout.splitlines()) == lines or not lines
