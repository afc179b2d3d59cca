"""The built wheel: its file list, and that it works where only the light set is installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
        *(f"edgekd/training/protocols/{p.name}" for p in (ROOT / "edgekd/training/protocols").glob("*.toml")),
        *(f"edgekd/reproduce/tables/{p.name}" for p in (ROOT / "edgekd/reproduce/tables").glob("*.toml")),
    }


def test_wheel_runs_from_elsewhere_and_without_torch(wheel: Path, student_onnx: Path, tmp_path: Path) -> None:
    """Unpacked alone, with torch and its kin made unimportable: compile and predict as on a small device."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'torchvision', 'timm', 'safetensors')));"
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
    edgekd("compile", str(student_onnx), "--backend", "onnxruntime", "--out", "s.engine")
    assert "cell.png" in edgekd("predict", "s.engine", "cell.png")
