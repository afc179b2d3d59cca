"""Labels from a CSV file, for images that do not lie in class folders."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgekd.data.folders import SUBSETS, Folder, Found, some
from edgekd.data.split import check_relative
from edgekd.errors import DataError, nearest

REQUIRED, OPTIONAL = ("path", "label"), ("group", "subset")
FIX = "the first line names the columns: path, label and, if you like, group and subset"


def read_labels(data: Path, file: Path, *, classes: Sequence[str] | None = None) -> Folder:
    """The images that a CSV file lists.

    It is UTF-8, separated by commas, semicolons or tabs; its first line names the columns, in any order and case:
        path: of the image, relative to `data`, with slashes.
        label: the name of its class.
        group: the picture (patient, slide) it was cut from, for all images or none.
        subset: train, val or test, or another name of a subset's folder; for all images or none.
    Other columns are passed over.
    classes: those of a network that will be evaluated here; without it, the labels in sorted order.

    Raises:
        DataError: no such file or folder, no such columns, or what is wrong in which line.
    """
    if not data.is_dir():
        raise DataError(f"no folder at {data}", fix="give --data the folder that the paths are relative to")
    rows = list(_rows(file))
    if not rows:
        raise DataError(f"{file} lists no images", fix=FIX)
    names = tuple(classes) if classes is not None else tuple(sorted({row["label"] for _, row in rows}))
    if len(names) < 2:
        raise DataError(f"{file} has one class only: {names[0]}", fix="list images of two classes or more")
    seen: dict[str, int] = {}
    for line, row in rows:
        if row["label"] not in names:
            raise _wrong(file, line, f"unknown class {row['label']!r}", nearest(row["label"], names))
        if (first := seen.setdefault(row["path"], line)) != line:
            raise _wrong(file, line, f"{row['path']} is in line {first} already", "list each image once")
        for column in OPTIONAL:
            if bool(row[column]) != bool(rows[0][1][column]):
                raise _wrong(file, line, f"{column} is given for some images only", "give it for all images or none")
    items = (Found(r["path"], names.index(r["label"]), SUBSETS.get(r["subset"].lower()), r["group"]) for _, r in rows)
    return Folder(data, names, tuple(sorted(items, key=lambda item: item.path)), {}, 0, file.name)


def _rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Each line's number and its values in our columns, empty where it has none."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            head = stream.readline()
            separator = max(",;\t", key=head.count)
            reader = csv.reader(itertools.chain([head], stream), delimiter=separator, strict=True)
            columns = [name.strip().lower() for name in next(reader, [])]
            if lacking := [name for name in REQUIRED if columns.count(name) != 1]:
                raise _wrong(file, 1, f"there is not one column {some(lacking)}", FIX)
            for cells in filter(any, reader):
                yield reader.line_num, _row(file, reader.line_num, columns, cells)
    except FileNotFoundError:
        raise DataError(f"no file of labels at {file}", fix="check the path") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})", fix="give --labels a CSV file") from None
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8", fix="save it as UTF-8 (in Excel: CSV UTF-8)") from None
    except csv.Error as error:
        raise _wrong(file, reader.line_num, str(error), "mend the line") from None


def _row(file: Path, line: int, columns: list[str], cells: list[str]) -> dict[str, str]:
    if len(cells) != len(columns):
        raise _wrong(file, line, f"{len(cells)} values in {len(columns)} columns", "quote values that hold a separator")
    found = dict(zip(columns, map(str.strip, cells)))
    row = {name: found.get(name, "") for name in REQUIRED + OPTIONAL}
    if lacking := [name for name in REQUIRED if not row[name]]:
        raise _wrong(file, line, f"no {some(lacking)}", "fill it in or remove the line")
    try:
        check_relative(row["path"])
    except ValueError as error:
        raise _wrong(file, line, str(error), "give the path from --data downwards") from None
    if row["subset"] and row["subset"].lower() not in SUBSETS:
        raise _wrong(file, line, f"unknown subset {row['subset']!r}", nearest(row["subset"].lower(), SUBSETS))
    return row


def _wrong(file: Path, line: int, what: str, fix: str) -> DataError:
    return DataError(f"{file}, line {line}: {what}", fix=fix)
