"""Hostile names in every view: terminal, CSV, Markdown, HTML and pictures show them, and do nothing else."""

from __future__ import annotations

import csv
import dataclasses
import html.parser
import io
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.records import sample
from PIL import Image
from rich.cells import cell_len
from typer.testing import CliRunner

import edgekd
from edgekd import text
from edgekd.bench import report, tables, text_tables
from edgekd.bench.compare import compare
from edgekd.bench.record import Record
from edgekd.cli import common
from edgekd.cli.main import app
from edgekd.reproduce.report import Cell, Result, RowResult
from edgekd.reproduce.report import markdown as paper_page
from edgekd.reproduce.report import text as paper_text

NAMES = {
    "tag": '<img src=x onerror="alert(1)">',
    "attribute": '" onmouseover="alert(1)',
    "end of a picture": "</text></svg><script>alert(2)</script>",
    "template": "${body} $title %s {0}",
    "formulas": "$\\frac{1}{$",
    "formula of a sheet": "=cmd|' /C calc'!A0",
    "at": "@SUM(1+1)",
    "plus": "+1+1",
    "minus": "-1+1",
    "full width": "＝1+1",
    "apostrophe": "'quoted",
    "pipes": "a|b\n| x | y |",
    "carriage return": "a\rb",
    "escape": "\x1b[2J\x1b]0;owned\x07\x1b[31m",
    "control": "\x9b31m\x00\x7f",
    "direction": "\u202ecod.exe\u2066\u200f",
    "line separator": "a\u2028b\x85c\x0bd",
    "tag characters": "a\U000e0041\ufeff\u200b",
    "surrogate": "b\udcff",
    "link": "[x](javascript:alert(1)) **b** `c` ![i](http://e.x/i) <http://e.x> www.e.x",
    "long": "x" * 3000,
    "cjk": "細胞",
}
PAGES = ("tag", "attribute", "end of a picture", "template", "formulas", "escape")
"""A page takes long to draw: these alone."""
STEERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
PLACES: dict[str, Callable[[Record, str], Record]] = {
    "class": lambda r, name: dataclasses.replace(
        r,
        classes=(name, *r.classes[1:]),
        variants=tuple(
            dataclasses.replace(
                v,
                metrics=dataclasses.replace(
                    v.metrics,
                    **{
                        kind: {name if c == r.classes[0] else c: one for c, one in getattr(v.metrics, kind).items()}
                        for kind in ("per_class", "discrimination")
                    },
                ),
            )
            for v in r.variants
        ),
    ),
    "network": lambda r, name: dataclasses.replace(
        r, variants=tuple(dataclasses.replace(v, network=name, engine=name) for v in r.variants)
    ),
    "variant": lambda r, name: dataclasses.replace(
        r, variants=(*r.variants[:-1], dataclasses.replace(r.variants[-1], name=name))
    ),
    "host": lambda r, name: dataclasses.replace(
        r,
        host=dataclasses.replace(
            r.host, cpu=name, release=name, versions={name: name}, facts={name: name}, backends={name: {name: name}}
        ),
    ),
    "texts": lambda r, name: dataclasses.replace(r, command=name, scenario=name, created=name, warnings=(name,)),
    "targets": lambda r, name: dataclasses.replace(
        r, targets=tuple(dataclasses.replace(t, name=name, unit=name) for t in r.targets)
    ),
    "engine": lambda r, name: dataclasses.replace(
        r, engine=dataclasses.replace(r.engine, name=name, precision={name: 1.0})
    ),
    "split": lambda r, name: dataclasses.replace(
        r, split=dataclasses.replace(r.split, method=name, group=name, fingerprint=name)
    ),
}


@pytest.mark.parametrize("kind", NAMES)
def test_markdown_and_comparisons(kind: str) -> None:
    for put in PLACES.values():
        record = put(sample(), NAMES[kind])
        check_markdown(tables.markdown(record), tables.markdown(put(sample(), "name")))
        check_markdown(compare({"a.json": sample(), NAMES[kind]: record}, force=True), "")


def check_markdown(page: str, harmless: str) -> None:
    assert not STEERS.search(page)
    if harmless:
        assert page.count("\n|") == harmless.count("\n|")
        assert page.count("\n") == harmless.count("\n")
    for table in re.findall(r"(?:^\|.*\n)+", page + "\n", re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert not re.search(r"<\w|(?<!\\)\]\(|://|(?<!\\)[`*$]|www\.", page)


@pytest.mark.parametrize("kind", NAMES)
def test_csv(kind: str) -> None:
    for put in PLACES.values():
        made = tables.to_csv(put(sample(), NAMES[kind]))
        rows = list(csv.reader(io.StringIO(made, newline="")))
        assert len({len(row) for row in rows}) == 1
        assert len(made.splitlines()) == len(rows) == 11
        assert not STEERS.search(made)
        assert not any(re.match(r"[=+\-@＝\t\r]", cell) for row in rows[1:] for cell in (*row[:3], row[-1]))


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_csv_cell_is_read_back_without_one_apostrophe(name: str) -> None:
    ((cell,),) = csv.reader(io.StringIO(text.csv_line([name]), newline=""))
    assert cell.removeprefix("'") == text.visible(name)
    assert text.csv_line([name, 1, -0.5, None]).endswith(",1,-0.5,\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in sample().images:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30)).save(folder / name)
    return folder


class Seen(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.bad: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "object", "embed", "form", "base", "link"):
            self.bad.append(tag)
        for name, value in attrs:
            elsewhere = name in ("src", "href", "xlink:href") and value and not value.startswith(("data:image/", "#"))
            if name.startswith("on") or elsewhere:
                self.bad.append(f"{tag} {name}")


@pytest.mark.parametrize("kind", PAGES)
def test_pages(kind: str, data: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Every place at once."""
    pytest.importorskip("matplotlib")
    record = sample()
    for put in PLACES.values():
        record = put(record, NAMES[kind])
    page, seen = report.html(record, data=data), Seen()
    seen.feed(page)
    assert seen.bad == []
    assert not STEERS.search(page)
    assert not recwarn.list


@pytest.mark.parametrize("kind", NAMES)
def test_aligned_text(kind: str) -> None:
    record = PLACES["class"](sample(), NAMES[kind])
    result = record.variants[1].metrics
    for shown in (text_tables.text_table({NAMES[kind]: result}), text_tables.confusion_text(result)):
        assert not STEERS.search(shown)
    assert len({cell_len(line) for line in text_tables.confusion_text(result).splitlines()}) == 1


@pytest.mark.parametrize("kind", NAMES)
def test_tables_of_papers(kind: str) -> None:
    name = NAMES[kind]
    line = RowResult(name, "partly", name, {"accuracy": Cell(1.0, None)}, (name,))
    result = Result("t", name, name, (name,), name, name, {name: name}, (line, line), (sample().host,))
    check_markdown(paper_page(result), "")
    assert len(paper_page(result).splitlines()) == len(
        paper_page(dataclasses.replace(result, notes=("n",))).splitlines()
    )
    assert not STEERS.search(text.terminal(paper_text(result)))


def test_the_terminal(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is said, logged, printed or named in an error; line breaks and JSON stay what they are."""
    for name in NAMES.values():
        common.echo(name)
        common.say(name)
        record = logging.LogRecord("edgekd", logging.INFO, "", 0, "%s", (name,), None)
        print(common.LogFormatter("%(message)s").format(record))
    said = "".join(capsys.readouterr())
    assert not STEERS.search(said)
    assert "a|b\n| x" in said
    assert text.terminal('{"a": "\x9b\x7f"}') == r'{"a": "\u009b\u007f"}'
    assert not STEERS.search(CliRunner().invoke(app, ["evaluate", "\x1b[2J\x9b"]).output)


def test_commands_print_by_nothing_else() -> None:
    """One place sees to the terminal: `edgekd.cli.common`."""
    for source in Path(edgekd.__file__).parent.rglob("*.py"):
        found = re.findall(r"(?m)^.*\b(?:typer\.s?echo|print)\(.*$", source.read_text())
        if source.name == "common.py":
            found = [line for line in found if "terminal(" not in line]
        assert found == (["        typer.echo(__version__)"] if source.parts[-2:] == ("cli", "main.py") else [])
