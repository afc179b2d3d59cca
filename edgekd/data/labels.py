"""Labels from a CSV file, for images that are not in class folders."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgekd.data.folders import SUBSETS, Folder, Found, join_limited
from edgekd.data.split import check_relative
from edgekd.errors import DataError, nearest

REQUIRED, OPTIONAL = ("path", "label"), ("group", "subset")
FIX = "the first line names the columns: path, label and, optionally, group and subset"


def read_labels(data: Path, file: Path, *, classes: Sequence[str] | None = None) -> Folder:
    """Read the images that a CSV file lists.

    The file is UTF-8, separated by commas, semicolons or tabs. Its first line names the columns, in any order and case;
    other columns are ignored:

    - `path`: path of the image relative to `data`, with slashes.
    - `label`: name of its class.
    - `group`: picture (patient, slide) that it was cut from; for all images or none.
    - `subset`: train, val, test, certify, or another name of a subset's folder; for all images or none.

    Args:
        data: The data folder.
        file: The CSV file.
        classes: Classes of a network that will be evaluated on the images; default: the labels, sorted.

    Raises:
        DataError: A missing file, folder or column, or an invalid line, which is named.
    """
    if not data.is_dir():
        raise DataError(f"no folder at {data}", fix="give --data the folder that the paths are relative to")
    rows = list(_rows(file))
    if not rows:
        raise DataError(f"{file} lists no images", fix=FIX)
    names = tuple(classes) if classes is not None else tuple(sorted({row["label"] for _, row in rows}))
    if len(names) < 2:
        raise DataError(f"{file} has only one class: {names[0]}", fix="list images of two classes or more")
    seen: dict[str, int] = {}
    for line, row in rows:
        if row["label"] not in names:
            raise _wrong(file, line, f"unknown class {row['label']!r}", nearest(row["label"], names))
        if (first := seen.setdefault(row["path"], line)) != line:
            raise _wrong(file, line, f"{row['path']} is already in line {first}", "list each image once")
        for column in OPTIONAL:
            if bool(row[column]) != bool(rows[0][1][column]):
                raise _wrong(file, line, f"{column} is given for some images only", "give it for all images or none")
    items = (Found(r["path"], names.index(r["label"]), SUBSETS.get(r["subset"].lower()), r["group"]) for _, r in rows)
    return Folder(data, names, tuple(sorted(items, key=lambda item: item.path)), {}, 0, file.name)


def _rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield each line's number and its values by column, empty where the file lacks the column."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            head = stream.readline()
            separator = max(",;\t", key=head.count)
            reader = csv.reader(itertools.chain([head], stream), delimiter=separator, strict=True)
            columns = [name.strip().lower() for name in next(reader, [])]
            if lacking := [name for name in REQUIRED if columns.count(name) != 1]:
                raise _wrong(file, 1, f"not exactly one column {join_limited(lacking)}", FIX)
            for cells in filter(any, reader):
                yield reader.line_num, _row(file, reader.line_num, columns, cells)
    except FileNotFoundError:
        raise DataError(f"no labels file at {file}", fix="check the path") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})", fix="give --labels a CSV file") from None
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8", fix="save it as UTF-8 (in Excel: CSV UTF-8)") from None
    except csv.Error as error:
        raise _wrong(file, reader.line_num, str(error), "correct the line") from None


def _row(file: Path, line: int, columns: list[str], cells: list[str]) -> dict[str, str]:
    if len(cells) != len(columns):
        raise _wrong(
            file, line, f"{len(cells)} values in {len(columns)} columns", "quote values that contain a separator"
        )
    found = dict(zip(columns, map(str.strip, cells)))
    row = {name: found.get(name, "") for name in REQUIRED + OPTIONAL}
    if lacking := [name for name in REQUIRED if not row[name]]:
        raise _wrong(file, line, f"no {join_limited(lacking)}", "fill it in or remove the line")
    try:
        check_relative(row["path"])
    except ValueError as error:
        raise _wrong(file, line, str(error), "give the path relative to --data") from None
    if row["subset"] and row["subset"].lower() not in SUBSETS:
        raise _wrong(file, line, f"unknown subset {row['subset']!r}", nearest(row["subset"].lower(), SUBSETS))
    return row


def _wrong(file: Path, line: int, what: str, fix: str) -> DataError:
    return DataError(f"{file}, line {line}: {what}", fix=fix)
