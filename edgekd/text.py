"""Text output: numbers, aligned columns, and names from outside (classes, files, devices) escaped for their medium."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections.abc import Iterable, Sequence

from rich.cells import cell_len


def percent(fraction: float | None, *, digits: int = 2) -> str:
    """`97.41`, or `n/a` where the measure is not defined."""
    return "n/a" if fraction is None else f"{100 * fraction:.{digits}f}"


def plus_minus(mean: float | None, sd: float | None, *, scale: float = 100.0) -> str:
    """`97.41 ± 0.30` of fractions; without the second if there is one run, empty if there is none."""
    if mean is None:
        return ""
    return f"{scale * mean:.2f}" + ("" if sd is None else f" ± {scale * sd:.2f}")


def aligned(rows: Sequence[Sequence[str]], *, remarks: bool = False) -> str:
    """Columns padded with spaces, as wide as a terminal shows them: the first to the left, the others to the right.

    remarks: the last column is text, and not padded.
    """
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*rows)]
    if remarks:
        widths[-1] = 0
    lines = ("  ".join(_padded(cell, w, left=c == 0) for c, (cell, w) in enumerate(zip(row, widths))) for row in rows)
    return "\n".join(map(str.rstrip, lines) if remarks else lines)


def _padded(cell: str, width: int, *, left: bool) -> str:
    spaces = " " * (width - cell_len(cell))
    return cell + spaces if left else spaces + cell


_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""Control characters, line breaks, marks that turn the direction of writing, invisible ones, undecodable bytes."""


def visible(text: str) -> str:
    """One line in which every character shows: what moves the cursor, hides or is no text is escaped as in JSON."""
    return _UNSEEN.sub(lambda match: code_point(match.group()), text)


def code_point(character: str) -> str:
    r"""`\u001b` and the like, as in JSON."""
    return json.dumps(character)[1:-1].replace("\x7f", r"\u007f")


def terminal(text: str) -> str:
    """Text for a terminal: `visible`, but for line breaks and tabs. JSON keeps its meaning."""
    return re.sub(r"[^\n\t]+", lambda part: visible(part.group()), text)


def csv_cell(text: str) -> str:
    """A CSV cell that no spreadsheet runs as a formula.

    `visible`; an apostrophe is put before = + - @ (also in full width) and before an apostrophe, so that the text is
    the cell without one leading apostrophe.
    """
    text = visible(text)
    return "'" + text if re.match(r"\s*[=+\-@'＝＋－＠]", text) else text


def csv_line(cells: Iterable[object]) -> str:
    """One line of CSV: text as `csv_cell`, numbers as they are, None empty."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow([csv_cell(c) if isinstance(c, str) else c for c in cells])
    return out.getvalue()


def markdown(text: str) -> str:
    """Text in a line or table cell of Markdown: no column, tag, link, emphasis or formula comes of it."""
    text = re.sub(r"[\\`*|~$]", r"\\\g<0>", visible(text))
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # inside a word it is no emphasis
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;")
    text = re.sub(r"\](?=[\[(:])", r"\\]", text)
    return re.sub(r"(?i)://|\bwww\.", lambda link: link.group()[:-1] + "\\" + link.group()[-1], text)


def markup(text: str) -> str:
    """Text in HTML, in quoted attributes too."""
    return html.escape(visible(text))
