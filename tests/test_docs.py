"""docs/: the site builds, commands have the options they are shown with, links lead somewhere, messages are real."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from edgekd.backends.base import load_recipe
from edgekd.backends.cuda.base import pinned_bindings
from edgekd.backends.cuda.device import _CUDA_OF_L4T as CUDA_OF_L4T
from edgekd.cli.main import app
from edgekd.config import parse_overrides

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
SMALLER = {
    "data": "--count 120 --size 24",
    "train": "--epochs 1 --image-size 32 --batch-size 16 --workers 0 --precision 32-true",
    "distill": "--epochs 1 --image-size 32 --batch-size 16 --workers 0 --precision 32-true",
    "compile": "--set max_accuracy_drop=100 --set calibration_images=16",
    "tune": "--max-accuracy-drop 100 --keep-exits",
    "bench": "--set min_seconds=0.02 --set warmup_seconds=0.01 --set min_count=[4,2] --set rounds=1 --no-report",
}
"""What is added to the commands of the first page so that they end in seconds."""


def commands(page: Path, start: str) -> list[list[str]]:
    """Every command in its sh blocks that begins so, as words."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ")
    found = re.findall(rf"(?:^\s*|&& )({start}.*?)(?=$|&&)", lines, re.MULTILINE)
    return [shlex.split(command, comments=True) for command in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_of_edgekd(page: Path) -> None:
    found = commands(page, "edgekd ")
    for words in found:
        command = get_command(app)
        for word in words[1:]:
            command = getattr(command, "commands", {}).get(word, command)
        options = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
        assert {w.partition("=")[0] for w in words[2:] if w.startswith("--")} <= options, words
    assert len(found) == {"tensorrt.md": 3, "jetson.md": 8, "getting-started.md": 12, "ncnn.md": 3}.get(page.name, 0)


@pytest.mark.slow
def test_the_first_page_command_by_command(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    page = ROOT / "docs" / "getting-started.md"
    for words in commands(page, "edgekd "):
        smaller = [sys.executable, "-m", *words, *shlex.split(SMALLER.get(words[1], ""))]
        done = subprocess.run(smaller, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{smaller}\n{done.stdout}{done.stderr}"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)


def test_the_site_builds_and_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    """Strict: a warning, such as a link that leads nowhere or an argument that a docstring gets wrong, is an error."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    command = ["mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path, "-f", "docs/mkdocs/mkdocs.yml"]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pages = {str(path.relative_to(tmp_path)): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    packages = {path.parent.name for path in (ROOT / "edgekd").glob("*/__init__.py")} - {"cli"}
    assert {f"api/edgekd.{name}.html" for name in packages} | {"api/edgekd.html"} <= pages.keys()
    assert 'id="edgekd.runtime.classifier.Classifier.predict"' in pages["api/edgekd.runtime.html"]
    for name, text in pages.items():
        assert not re.search(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["'](?:https?:)?//""", text), name


def test_commands_of_the_benchmark() -> None:
    page = ROOT / "docs" / "tensorrt.md"
    ((_, script, *words),) = commands(page, "python benchmarks/")
    said = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(word in said for word in words if word.startswith("--"))
    ((script, *_),) = commands(page, "benchmarks/")
    assert (ROOT / script).stat().st_mode & 0o100


@pytest.mark.parametrize("page", [*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, link


def test_messages_that_are_explained() -> None:
    sources = "\n".join(p.read_text() for p in (ROOT / "edgekd").rglob("*.py"))
    for part in (
        "is not installed",
        "NVIDIA's driver supports CUDA",
        "CUDA finds no GPU",
        "was built by TensorRT",
        "cannot build",
        "the recipe requests",
    ):
        assert part in (ROOT / "docs" / "jetson.md").read_text()
        assert part in sources


def test_cuda_bindings_fit_each_jetpack() -> None:
    """The page's table, its commands, the Dockerfile and the advice of the code name the same version."""
    page, image = ((ROOT / "docs" / name).read_text() for name in ("jetson.md", "Dockerfile.jetson"))
    rows = re.findall(r"^\| ([\d.]+)[^|]*\|[^|]*\|[^|]*\| ([\d.]+) \|[^|]*\|([^|]*)\|$", page, re.MULTILINE)
    assert [cuda for _, cuda, _ in rows] == list(CUDA_OF_L4T.values())[::-1]
    pins = {jetpack: pinned_bindings(cuda) for jetpack, cuda, _ in rows}
    for jetpack, _, said in rows:
        assert f"`{pins[jetpack]}`" in said or jetpack == "5.1"
    assert f"cuda-python=={re.findall('cuda-python==(11[^ ]*)', page)[0]}".startswith(pins["5.1"].rstrip("*"))
    assert f"pip install '.[jetson]' '{pins['6.1']}'" in page
    assert "l4t-jetpack:r36.4.0\n" in image
    assert "CUDA_PYTHON=" + pins["6.1"].removeprefix("cuda-python==").removesuffix(".*") + "\n" in image
    older = pins["6.0"].removeprefix("cuda-python==").removesuffix(".*")
    assert f"l4t-jetpack:r36.3.0 --build-arg CUDA_PYTHON={older} ." in page
    assert set(re.findall(r"--build-arg (\w+)=", page)) == set(re.findall(r"^ARG (\w+)=", image, re.MULTILINE))


def test_settings_of_the_compile_commands() -> None:
    found = 0
    for page in PAGES:
        for words in commands(page, "edgekd compile "):
            settings = [value for option, value in itertools.pairwise(words) if option == "--set"]
            found += len(settings)
            load_recipe("fp16", overrides=parse_overrides(settings))
    assert found


def test_the_image_has_no_torch() -> None:
    text = (ROOT / "docs" / "Dockerfile.jetson").read_text()
    assert "torch" not in text.replace("no torch", "").replace("not f('torch')", "")
