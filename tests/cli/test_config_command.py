"""`edgekd config`: every shipped TOML file is listed, shown as it is, and copied to where a command reads it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from helpers.cli import edgekd as run

from edgekd import config
from edgekd.artifacts.recipe import Recipe
from edgekd.bench.suite import Suite

ROOT = Path(__file__).resolve().parents[2]
FILES = [p for folder in ("compile", "devices", "benchmarks/suites", "edgekd") for p in (ROOT / folder).rglob("*.toml")]


def edgekd(*words: str | Path, code: int = 0) -> str:
    return run("config", *words, code=code)


def test_list_has_every_file_and_a_line_about_it() -> None:
    lines = [line.split(maxsplit=1) for line in edgekd("list").splitlines() if line.startswith("  ")]
    assert Counter(name for name, _ in lines) == Counter(p.stem for p in FILES)  # no name twice, of whatever kind
    described = dict(lines)
    assert described["orin-nano"] == "Jetson Orin Nano 8 GB"  # a title
    assert described["gao2022-table2"] == "Comparison on SIPaKMeD"  # a caption
    assert described["garg2022"].startswith("Garg & Singh 2022: multi-part")  # the comment's first sentence,
    assert described["dla-int8"].endswith("run on the GPU.")  # of two lines,
    assert described["int8"].endswith("fastest on CPUs.")  # and not the second one


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_show_and_copy_keep_every_byte(path: Path, tmp_path: Path) -> None:
    assert edgekd("show", path.stem) == path.read_text(encoding="utf-8")
    assert "wrote" in edgekd("copy", path.stem, tmp_path / "new folder" / "mine.toml")
    assert (tmp_path / "new folder" / "mine.toml").read_bytes() == path.read_bytes()


def test_a_copy_is_read_by_the_command_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert edgekd("copy", "int8").strip() == "wrote int8.toml; use it with edgekd compile --recipe int8.toml"
    assert config.load(Recipe, "compile", "int8.toml") == config.load(Recipe, "compile", "int8")
    said = edgekd("copy", "quick", "my own.toml")
    assert said.strip() == "wrote my own.toml; use it with edgekd bench --suite 'my own.toml'"
    assert config.load(Suite, "benchmarks/suites", "my own.toml") == config.load(Suite, "benchmarks/suites", "quick")


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    mine, link = tmp_path / "mine.toml", tmp_path / "link.toml"
    mine.write_text("precision = 'fp32'  # mine\n")
    link.symlink_to(tmp_path / "nowhere.toml")
    for path in (mine, link, mine):
        assert "exists" in edgekd("copy", "int8", path, code=1)
    assert mine.read_text() == "precision = 'fp32'  # mine\n"
    assert "mine.toml" in edgekd("copy", "int8", tmp_path / "mine", code=1)  # no command would read that
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.toml", "mine.toml"]


def test_unknown_names_give_the_nearest() -> None:
    for command in ("show", "copy"):
        assert "Did you mean 'orin-nano'?" in edgekd(command, "orin-nan", code=1)
