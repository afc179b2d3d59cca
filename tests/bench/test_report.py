from __future__ import annotations

import dataclasses
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.records import sample
from PIL import Image
from typer.testing import CliRunner

from edgekd.artifacts.certificate import Certificate, Evidence, Promise
from edgekd.bench import plots
from edgekd.bench.record import read_record, write_record
from edgekd.bench.report import html, write_report
from edgekd.bench.tables import markdown
from edgekd.cli.main import app
from edgekd.errors import ArtifactError, ConfigError, DataError

pytest.importorskip("matplotlib")
VOID = {"meta", "img", "br", "path", "use", "rect"}


class Balanced(HTMLParser):
    """Counts tags, checks that they close in order, and collects links and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for i, name in enumerate(sample().images):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40 + i, 30), (20 * i, 90, 120)).save(folder / name)
    return folder


def test_page_is_whole_and_stands_alone(data: Path, tmp_path: Path) -> None:
    write_report(sample(), tmp_path / "report.html", data=data)
    page = Balanced()
    page.feed((tmp_path / "report.html").read_text())
    assert page.open == []
    assert page.seen.count("svg") == 5
    assert page.seen.count("img") == 8
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert "round <b>, predicted long | thin" in page.text  # the first image is answered wrongly
    assert "NOT met" not in page.text
    assert "2 of 9 groups" in page.text
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_same_record_same_page(data: Path) -> None:
    assert html(sample(), data=data) == html(sample(), data=data)


def test_a_certificate_is_shown_in_words(data: Path, tmp_path: Path) -> None:
    evidence = Evidence(Promise("change", 0.01), "change", "binomial", "image", 810, 3, 0.0082, 0.04)
    found = Certificate((evidence,), 0.9, "without early exit", 810, *"abcd", warnings=("the images were spent",))
    write_record(tmp_path / "record.json", dataclasses.replace(sample(), certificate=found))
    record = read_record(tmp_path / "record.json")
    for page in (html(record, data=data), markdown(record)):
        assert "With 90 % certainty, for images like those tested (3 of 810 images, upper bound 0.82 %)" in page
        assert "at most 1 % of the answers differ from those of the same engine without early exit" in page
        assert "the images were spent" in page
    assert "Certificate" not in html(sample(), data=data)


def test_page_without_cascade(data: Path) -> None:
    record = sample()
    variants = tuple(v for v in record.variants if v.name in ("exit_0", "full"))
    page = html(dataclasses.replace(record, variants=variants, curve=(), targets=(), warnings=()), data=data)
    assert page.count("<svg") == 3
    assert "Confusion matrix of full" in page
    assert "Where images exit" not in page


def test_images_elsewhere_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"000\.png: no such file"):
        html(sample(), data=tmp_path)


@pytest.mark.parametrize("place", ["/etc/x.png", "../x.png", "a/../../x.png"])
def test_images_outside_the_data_folder_are_refused(place: str, data: Path, tmp_path: Path) -> None:
    write_record(path := tmp_path / "record.json", sample())
    path.write_text(path.read_text().replace(sample().images[0], place))
    with pytest.raises(ArtifactError, match="stay in the data folder"):
        html(read_record(path), data=data)


@pytest.mark.parametrize(("name", "start"), [("c.PNG", b"\x89PNG"), ("c.svg", b"<?xml"), ("c.pdf", b"%PDF")])
def test_a_picture_file_is_what_its_name_says(name: str, start: bytes, tmp_path: Path) -> None:
    for path in (tmp_path / name, tmp_path / f"again-{name}"):
        plots.write_confusion(sample().variants[1].metrics, path)
    assert (tmp_path / name).read_bytes().startswith(start)
    assert (tmp_path / name).read_bytes() == (tmp_path / f"again-{name}").read_bytes()
    if name == "c.PNG":
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 300


@pytest.mark.parametrize("name", ["model.safetensors", "x", "x.jpg", ".png"])
def test_other_names_of_pictures_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no suffix of a plot"):
        plots.picture_format(Path(name))
    before_all_else = CliRunner().invoke(app, ["evaluate", "nothing", "--plot", name])
    assert "no suffix of a plot" in before_all_else.output


def test_names_in_a_picture_are_drawn_as_they_are_or_as_code_points(
    caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """No box in place of a character, and one line says what is missing; dollars start no formula."""
    bow, nobody_has = "\u2312", "\U0010fffd"  # matplotlib brings a font for the first, beside the usual one
    record = sample()
    metrics = record.variants[0].metrics

    def drawn(*names: str) -> str:
        named = dataclasses.replace(metrics, per_class=dict.fromkeys(names, metrics.macro), discrimination={})
        return plots.confusion_svg(named)

    drawn("cost $a$ b", "$\\frac{1}{$", f"bow {bow}")
    assert not caplog.records
    picture = drawn("a", "b", f"c{nobody_has}")
    drawn("a", "b", f"c{nobody_has}")
    assert len(caplog.records) == 1
    assert picture == drawn("a", "b", r"c\udbff\udffd")
    assert not recwarn.list


def test_missing_matplotlib_is_said(tmp_path: Path) -> None:
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise ImportError('not here')")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(Path(__file__).parents[1])!r}]\n"
        "from helpers.records import sample\nfrom edgekd.bench.plots import trade_off\n"
        "from edgekd.errors import ConfigError\n"
        "try: trade_off(sample())\nexcept ConfigError as error: print(error.fix)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "edgekd[report]" in done.stdout
