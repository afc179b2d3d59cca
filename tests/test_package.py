"""The built wheel: its file list, and that it works where only the light set is installed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.missing import hide

from edgekd.extras import extras, missing

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_wheel_holds_the_package_and_the_tomls_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"edgekd", "edgekd-0.1.0.dist-info"}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "edgekd").rglob("*.py")}
    assert sources <= set(names)
    for kind in ("compile", "devices", "benchmarks/suites"):
        wanted = {f"edgekd/_data/{kind}/{p.name}" for p in (ROOT / kind).glob("*.toml")}
        assert wanted
        assert wanted == {n for n in names if n.startswith(f"edgekd/_data/{kind}/")}
    others = {n for n in names if not n.endswith(".py") and "_data" not in n and "dist-info" not in n}
    assert others == {
        "edgekd/py.typed",
        "edgekd/bench/report.html",
        *(f"edgekd/backends/tensorrt/ptx/{p.name}" for p in (ROOT / "edgekd/backends/tensorrt/ptx").glob("*.ptx")),
        *(f"edgekd/training/protocols/{p.name}" for p in (ROOT / "edgekd/training/protocols").glob("*.toml")),
        *(f"edgekd/reproduce/tables/{p.name}" for p in (ROOT / "edgekd/reproduce/tables").glob("*.toml")),
    }


def test_the_jetson_image_copies_what_the_wheel_needs(wheel: Path, tmp_path: Path) -> None:
    """A wheel built from the Dockerfile's COPY lines alone, read as docs/jetson/emulate.py reads them, is the same."""
    spec = importlib.util.spec_from_file_location("emulate", ROOT / "docs/jetson/emulate.py")
    assert spec
    assert spec.loader
    emulate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulate)
    steps = emulate.instructions((ROOT / "docs/Dockerfile.jetson").read_text())
    for word, rest in steps:
        if word == "COPY":
            emulate.copy(tmp_path, *rest.split())
    ((source,),) = [
        re.findall(r"pip install \S+ '/(\w+)\[jetson\]'", rest) for word, rest in steps if "[jetson]" in rest
    ]
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, tmp_path / source]
    subprocess.run(command, check=True, capture_output=True)
    (own,) = tmp_path.glob("*.whl")
    assert set(zipfile.ZipFile(own).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_wheel_runs_from_elsewhere_and_without_torch(wheel: Path, student_onnx: Path, tmp_path: Path) -> None:
    """Unpacked alone, with torch and its kin made unimportable: compile and predict as on a small device."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        f"import sys; {hide(('torch', 'torchvision', 'timm', 'safetensors'))}"
        f"sys.path.insert(0, {str(tmp_path / 'site')!r});"
        "import edgekd; assert 'site' in edgekd.__file__; from edgekd.__main__ import main; main()"
    )

    def edgekd(*words: str) -> str:
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    from PIL import Image

    Image.new("RGB", (40, 40), "pink").save(tmp_path / "cell.png")
    assert "orin-nano" in edgekd("devices")
    assert edgekd("config", "show", "int8") == (ROOT / "compile" / "int8.toml").read_text()
    edgekd("compile", str(student_onnx), "--backend", "onnxruntime", "--out", "s.engine")
    assert "cell.png" in edgekd("predict", "s.engine", "cell.png")


WITHOUT = {
    "train": ("torch", "torchvision", "timm", "safetensors", "lightning_fabric", "torchmetrics", "onnxsim"),
    "cpu": ("onnxruntime", "openvino"),
    "report": ("matplotlib",),
}


def bare(*words: str, missing: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command where the extras named are not installed."""
    modules = [module for extra in missing for module in WITHOUT[extra]]
    code = f"{hide(modules)}from edgekd.__main__ import main; main()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, student_onnx: Path) -> Path:
    """student.onnx and images of its classes."""
    from edgekd.data.synthetic import write_cells

    folder = tmp_path_factory.mktemp("place")
    (folder / "student.onnx").write_bytes(student_onnx.read_bytes())
    write_cells(folder / "drawn", count=10, size=24)
    (folder / "cells").mkdir()
    for name, drawn in zip("abcde", sorted((folder / "drawn").iterdir())):
        drawn.rename(folder / "cells" / name)
    (folder / "run").mkdir()
    (folder / "run" / "protocol.toml").touch()
    (folder / "run" / "split.json").touch()
    return folder


NEEDS = {
    "train --data cells --model resnet18 --out r": "train",
    "distill --data cells --out r": "train",
    "evaluate run --data cells": "train",
    "evaluate student.onnx --data cells --plot p.png": "report",
    "export run --out s.onnx": "train",
    "reproduce gao2022-table3 --data cells": "train",
    "models list": "train",
    "models show resnet18": "train",
    "models cost resnet18": "train",
    "bench student.onnx --data cells --out r.json": "report",
    "evaluate student.onnx --data cells": "cpu",
    "predict student.onnx cells": "cpu",
    "compile student.onnx --backend openvino": "cpu",
    "compile student.onnx --backend onnxruntime": "cpu",
}


@pytest.mark.parametrize("line", NEEDS)
def test_a_command_that_lacks_an_extra_names_it(line: str, place: Path) -> None:
    done = bare(*line.split(), missing=[NEEDS[line]], cwd=place)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr
    assert f"edgekd[{NEEDS[line]}]" in done.stderr


@pytest.mark.parametrize(
    "line",
    ["evaluate student.onnx --data cells", "predict student.onnx cells", "devices", "doctor", "data get x --out d"],
)
def test_other_commands_work_without_torch_and_matplotlib(line: str, place: Path) -> None:
    done = bare(*line.split(), missing=["train", "report"], cwd=place)
    assert "Traceback" not in done.stderr
    assert "edgekd[" not in done.stderr
    assert (done.returncode == 0) == ("get" not in line), done.stderr


def test_extras_are_those_of_the_project() -> None:
    """What `edgekd doctor` lists and errors name is read from the installed metadata."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    written = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {extra: {re.split("[>=<;]", line)[0] for line in lines} for extra, lines in written.items()}
    found = {extra: set(own) for extra, own in extras().items()}
    assert {"train", "cpu", "report"} <= found.keys() <= names.keys() - {"dev"}
    assert all(names[extra] == own for extra, own in found.items())
    assert missing(ModuleNotFoundError(name="edgekd.nothing")) is None
