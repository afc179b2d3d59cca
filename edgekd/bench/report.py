"""A record as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from string import Template

from PIL import ImageOps

from edgekd.bench import plots
from edgekd.bench.comparisons import accuracy_note, accuracy_table
from edgekd.bench.record import Record, Variant
from edgekd.bench.tables import (
    Table,
    certificate_notes,
    class_tables,
    host_text,
    main_variant,
    notes,
    table,
    title,
)
from edgekd.bench.targets import target_text
from edgekd.data.preprocess import open_image
from edgekd.files import atomic_write
from edgekd.text import markup, percent

TEMPLATE = Path(__file__).with_name("report.html")
THUMBNAILS = 7
"""Number of images shown for each exit."""
SIDE = 128


def write_report(record: Record, path: Path, *, data: Path) -> None:
    """Write the page.

    Args:
        record: The record.
        path: File to write.
        data: Folder of the record's images, for the thumbnails.

    Raises:
        ConfigError: matplotlib is missing.
        DataError: An image to show is missing.
    """
    atomic_write(path, html(record, data=data).encode())


def html(record: Record, *, data: Path) -> str:
    """Render the page; the same record and images give the same text."""
    shown, compared, classes = main_variant(record), accuracy_table(record), class_tables(record)
    certificate = certificate_notes(record)
    sections = [
        _section("Results", _table(table(record)), note=notes(record)),
        _section(*_targets(record)) if record.targets else "",
        _section("Certificate", _list([markup(line) for line in certificate])) if certificate else "",
        _section("Keep in mind", _list([markup(w) for w in record.warnings]), kind="warnings")
        if record.warnings
        else "",
        _section("Accuracy against latency", plots.trade_off(record)),
        _section("Accuracy on the same images", _table(compared), note=accuracy_note(record)) if compared else "",
        *(_cascade(record, shown, data) if shown.name == "cascade" else []),
        _section(f"Confusion matrix of {shown.name}", plots.confusion_svg(shown.metrics)),
        _section(f"Classes of {shown.name}", "\n".join(map(_table, classes))) if classes else "",
        _section(f"Calibration of {shown.name}", plots.reliability_svg(shown.metrics))
        if shown.metrics.reliability
        else "",
        _section("How it was measured", f'<p class="note">{markup(host_text(record))}</p>', note=_method(record)),
    ]
    lead = f"{shown.name}: {percent(shown.metrics.accuracy)} % accuracy, {shown.latency(1).mean:.2f} ms an image"
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=markup(title(record)), lead=markup(lead), body="\n".join(s for s in sections if s)
    )


def _section(heading: str, content: str, *, note: str = "", kind: str = "") -> str:
    small = f'\n<p class="note">{markup(note)}</p>' if note else ""
    return f'<section class="{kind}">\n<h2>{markup(heading)}</h2>\n{content}{small}\n</section>'


def _list(lines: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{line}</li>" for line in lines) + "</ul>"


def _table(cells: Table) -> str:
    header, rows = cells
    head = "".join(f"<th>{markup(c)}</th>" for c in header)
    body = "\n".join(_row(row) for row in rows)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def _row(cells: list[str]) -> str:
    mark = ' class="chosen"' if cells[0] == "cascade" else ""
    return f"<tr{mark}>" + "".join(f"<td>{markup(c)}</td>" for c in cells) + "</tr>"


def _targets(record: Record) -> tuple[str, str]:
    """Return heading and list of the derived figures, with verdicts where the suite has limits."""
    classes = {True: "met", False: "missed", None: ""}
    heading = "Key figures" if all(t.met is None for t in record.targets) else "Targets"
    return heading, _list([f'<span class="{classes[t.met]}">{markup(target_text(t))}</span>' for t in record.targets])


def _method(record: Record) -> str:
    precision = ", ".join(f"{k} {100 * v:.0f} %" for k, v in record.engine.precision.items())
    read_back = f" Precision read back from the engine: {precision}." if precision else ""
    return f"{record.scenario}{read_back}" + (f" Command: {record.command}" if record.command else "")


def _cascade(record: Record, cascade: Variant, data: Path) -> list[str]:
    return [
        _section("Latency of the cascade", plots.distribution(cascade)),
        _section("Where images exit", plots.exit_shares(cascade, record.labels, record.classes)),
        _section("Images that exit early and late", _thumbnails(record, cascade, data)),
    ]


def _thumbnails(record: Record, cascade: Variant, data: Path) -> str:
    """Show some images of each exit, spread over the test images and so over the classes."""
    sections = []
    for exit_ in sorted(set(cascade.exits)):
        exited = [i for i, e in enumerate(cascade.exits) if e == exit_]
        chosen = exited[:: -(-len(exited) // THUMBNAILS)]
        figures = "\n".join(_figure(record, cascade, i, data) for i in chosen)
        sections.append(f'<p>Exit {exit_}: {len(exited)} images</p>\n<div class="thumbs">\n{figures}\n</div>')
    return "\n".join(sections)


def _figure(record: Record, cascade: Variant, index: int, data: Path) -> str:
    truth, prediction = record.classes[record.labels[index]], record.classes[cascade.predictions[index]]
    right = truth == prediction
    caption = markup(truth) if right else f"{markup(truth)}, predicted {markup(prediction)}"
    name = record.images[index]
    image = ImageOps.fit(open_image(data / name), (SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=80)
    source = f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
    mark = "" if right else ' class="wrong"'
    picture = f'<img src="{source}" alt="{markup(name)}">'
    return f"<figure{mark}>{picture}<figcaption>{caption}</figcaption></figure>"
