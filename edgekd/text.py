"""Text output: numbers, aligned columns, and untrusted names (classes, files, devices) escaped for their medium."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections.abc import Iterable, Sequence

from rich.cells import cell_len


def percent(fraction: float | None, *, digits: int = 2) -> str:
    """Format a fraction as `97.41`, or as `n/a` where it is undefined."""
    return "n/a" if fraction is None else f"{100 * fraction:.{digits}f}"


def plus_minus(mean: float | None, sd: float | None, *, scale: float = 100.0) -> str:
    """Format a mean and its deviation as `97.41 ± 0.30`.

    Args:
        mean: The mean; None for no runs, which gives an empty text.
        sd: Standard deviation; None for a single run, which omits it.
        scale: Factor for both; the default converts fractions to percent.
    """
    if mean is None:
        return ""
    return f"{scale * mean:.2f}" + ("" if sd is None else f" ± {scale * sd:.2f}")


def aligned(rows: Sequence[Sequence[str]], *, remarks: bool = False) -> str:
    """Align columns with spaces, by their width on a terminal: the first to the left, the others to the right.

    Args:
        rows: Cells of each row, the header first.
        remarks: The last column is free text and is not padded.
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
"""Control characters, line breaks, bidirectional marks, invisible characters and undecodable bytes."""


def visible(text: str) -> str:
    """Return one line in which every character is visible; control and invisible characters are escaped as in JSON."""
    return _UNSEEN.sub(lambda match: code_point(match.group()), text)


def code_point(character: str) -> str:
    r"""Escape one character as JSON does, for example as `\u001b`."""
    return json.dumps(character)[1:-1].replace("\x7f", r"\u007f")


def terminal(text: str) -> str:
    """Escape text for a terminal like `visible`, but keep line breaks and tabs. JSON keeps its meaning."""
    return re.sub(r"[^\n\t]+", lambda part: visible(part.group()), text)


def csv_cell(text: str) -> str:
    """Escape a CSV cell so that no spreadsheet evaluates it as a formula.

    The text is made `visible`, and an apostrophe is prepended to text that starts with = + - @ (also in full width) or
    an apostrophe: the original is the cell without one leading apostrophe.
    """
    text = visible(text)
    return "'" + text if re.match(r"\s*[=+\-@'＝＋－＠]", text) else text


def csv_line(cells: Iterable[object]) -> str:
    """Format one line of CSV: text as `csv_cell`, numbers unchanged, None as an empty cell."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow([csv_cell(c) if isinstance(c, str) else c for c in cells])
    return out.getvalue()


def markdown(text: str) -> str:
    """Escape text for a line or table cell of Markdown: it cannot form a column, tag, link, emphasis or formula."""
    text = re.sub(r"[\\`*|~$]", r"\\\g<0>", visible(text))
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # not inside a word, where it has no meaning
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;")
    text = re.sub(r"\](?=[\[(:])", r"\\]", text)
    return re.sub(r"(?i)://|\bwww\.", lambda link: link.group()[:-1] + "\\" + link.group()[-1], text)


def markup(text: str) -> str:
    """Escape text for HTML, including quoted attributes."""
    return html.escape(visible(text))
