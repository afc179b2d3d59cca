"""docs/: commands have the options they are shown with, links lead somewhere, quoted messages are the program's."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from edgekd.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def commands(page: Path, start: str) -> list[list[str]]:
    """Every command in its sh blocks that begins so, as words."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ")
    found = re.findall(rf"(?:^\s*|&& )({start}.*?)(?=$|&&)", lines, re.MULTILINE)
    return [shlex.split(command, comments=True) for command in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_of_edgekd(page: Path) -> None:
    known = get_command(app).commands  # type: ignore[attr-defined]
    found = commands(page, "edgekd ")
    for words in found:
        options = {name for param in known[words[1]].params for name in (*param.opts, *param.secondary_opts)}
        assert {w.partition("=")[0] for w in words[2:] if w.startswith("--")} <= options, words
    assert len(found) == {"jetson.md": 9}.get(page.name, 0)


def test_commands_of_the_benchmark() -> None:
    page = ROOT / "docs" / "tensorrt.md"
    ((_, script, *words),) = commands(page, "python benchmarks/")
    said = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(word in said for word in words if word.startswith("--"))
    ((script, *_),) = commands(page, "benchmarks/")
    assert (ROOT / script).stat().st_mode & 0o100


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
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
        "NVIDIA's driver knows CUDA",
        "CUDA finds no GPU here",
        "was built by TensorRT",
        "cannot build",
        "the recipe requests",
    ):
        assert part in (ROOT / "docs" / "jetson.md").read_text()
        assert part in sources


def test_what_the_image_copies() -> None:
    text = (ROOT / "docs" / "Dockerfile.jetson").read_text()
    for line in re.findall(r"^COPY --chown=\S+ (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in line.split()), line
    assert "torch" not in text.replace("no torch", "").replace("not f('torch')", "")
