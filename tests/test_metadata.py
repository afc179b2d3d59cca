"""What package indexes and citation tools read: versions, licence and authors say the same in both files."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
CITATION = (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_citation_agrees_with_the_project() -> None:
    for key in ("version", "license"):
        (stated,) = re.findall(rf"^{key}: (.+)$", CITATION, re.MULTILINE)
        assert f'\n{key} = "{stated}"\n' in PROJECT
    (author,) = re.findall(r'^authors = \[\{ name = "(.+)" \}\]$', PROJECT, re.MULTILINE)
    assert f"authors:\n  - name: {author}\n" in CITATION


def test_every_paper_with_a_protocol_is_cited() -> None:
    papers = [
        p.stem for p in (ROOT / "edgekd" / "training" / "protocols").glob("*.toml") if re.search(r"\d{4}$", p.stem)
    ]
    assert len(papers) == 3
    for name in papers:
        assert f"`--protocol {name}`" in CITATION


def test_python_versions_go_from_the_least_that_is_required_without_a_gap() -> None:
    minors = [int(minor) for minor in re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', PROJECT)]
    (least,) = re.findall(r'^requires-python = ">=3\.(\d+)"$', PROJECT, re.MULTILINE)
    assert minors == list(range(int(least), minors[-1] + 1))
    assert f'target-version = "py3{least}"' in PROJECT
    assert f'python_version = "3.{least}"' in PROJECT
