"""Names from outside (of classes, files, devices) made harmless for the medium they are written to."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections.abc import Iterable

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
