"""Find the labelled images in a folder, and look at every one before anything is trained on them."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

from edgekd.data.layouts import class_folder
from edgekd.data.preprocess import EXTENSIONS, STRIP, opened
from edgekd.data.split import Subset
from edgekd.errors import DataError, nearest
from edgekd.files import sha256
from edgekd.host import default_threads
from edgekd.types import Progress

log = logging.getLogger(__name__)

SUBSETS: dict[str, Subset] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Names of folders above class folders, in any case, and the subset that their images belong to."""
PASSED_OVER = frozenset(
    {"$recycle.bin", "#recycle", "@eadir", "@recycle", "__macosx", "lost+found", "system volume information"}
)
"""Folders that a system or storage device makes (in lower case): nothing in them counts, nor in hidden ones."""
BYSTANDERS = frozenset({"", ".csv", ".dat", ".db", ".ini", ".json", ".md", ".txt", ".xml"})
"""Files of these kinds lie beside images everywhere: passed over and counted, as hidden ones are."""
SHOWN = 20
"""Lines of a list that an error prints before it says how many more there are."""


@dataclass(frozen=True)
class Found:
    """One image file: posix path relative to the data folder, class index, and the subset its folder puts it in.

    group: the picture it was cut from, where a CSV file says so. digest: SHA-256 of the file, once it was checked.
    """

    path: str
    label: int
    subset: Subset | None = None
    group: str = ""
    digest: str = ""


@dataclass(frozen=True)
class Folder:
    """Labelled images. bad: files that cannot be used, and why. ignored: how many files were passed over.

    labels: name of the CSV file that gave the labels; empty if folders did.
    """

    root: Path
    classes: tuple[str, ...]
    items: tuple[Found, ...]
    bad: Mapping[str, str]
    ignored: int
    labels: str = ""


@dataclass(frozen=True)
class Checked:
    """A folder whose images can all be used. fingerprint: SHA-256 over their paths and decoded pixels."""

    folder: Folder
    excluded: dict[str, str]
    fingerprint: str


def scan(data: Path, *, classes: Sequence[str] | None = None) -> Folder:
    """Find the images in class folders, with or without train/, val/ and test/ above those.

    A class folder is searched to its bottom. In SIPaKMeD's original layout im_X/im_X/CROPPED is class X, and the
    cluster images beside CROPPED are left out.
    classes: those of a network that will be evaluated here; without it, the folders' names in sorted order.

    Raises:
        DataError: no folder, nothing in it, a single class, class folders without images, or unknown classes.
    """
    if not data.is_dir():
        raise DataError(f"no folder at {data}", fix="give --data the folder that holds one folder per class")
    tops = _tops(data)
    folders = [(subset, name, path) for subset, top in tops for name, path in _class_folders(top)]
    names = _class_names(data, folders, classes)
    sorted_out = _Sorting(data)
    empty = [path for subset, name, path in folders if not sorted_out.add(path, names.index(name), subset)]
    if empty:
        raise DataError(f"no images in {some(map(str, empty))}", fix="fill or remove these class folders")
    for top in dict.fromkeys((data, *(top for _, top in tops))):
        sorted_out.loose(top)
    return Folder(data, names, tuple(sorted_out.items), sorted_out.bad, sorted_out.ignored)


def image_files(folder: Path) -> list[Path]:
    """The images under a folder: what `scan` takes in class folders, and `edgekd predict` in any folder.

    By the ends of their names, in any case; hidden ones do not count. Links are followed, to files and to folders,
    but not upwards, and each folder is entered once. A link that leads nowhere counts, so that it will be named.

    Raises:
        DataError: a folder that cannot be read.
    """
    return [file for file in _files(folder) if _is_image(file)]


def _files(folder: Path) -> Iterator[Path]:
    seen = {_identity(above) for above in folder.resolve().parents}
    for root, folders, files in os.walk(folder, onerror=_unreadable, followlinks=True):
        if (here := _identity(Path(root))) in seen:
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if not _passed_over(name))
        yield from (Path(root, name) for name in sorted(files))


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _unreadable(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename} cannot be read ({error.strerror})", fix="mend its permissions or remove it")


def _is_image(file: Path) -> bool:
    broken = file.is_symlink() and not file.exists()
    return not file.name.startswith(".") and (broken or file.suffix.lower() in EXTENSIONS)


def _passed_over(folder: str) -> bool:
    return folder.startswith(".") or folder.lower() in PASSED_OVER


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if not _passed_over(p.name))
    except OSError as error:
        _unreadable(error)


def _tops(data: Path) -> list[tuple[Subset | None, Path]]:
    """The folders that hold class folders: train/, val/ and test/, else `data` itself."""
    folders = [p for p in _visible(data) if p.is_dir()]
    brought = [p for p in folders if p.name.lower() in SUBSETS and any(c.is_dir() for c in _visible(p))]
    if not brought:
        return [(None, data)]
    if strangers := [p.name for p in folders if p not in brought]:
        raise DataError(
            f"{data} has {some(strangers)} beside {some(p.name for p in brought)}",
            fix="leave only train/, val/ and test/ there, or only class folders",
        )
    return [(SUBSETS[p.name.lower()], p) for p in brought]


def _class_folders(top: Path) -> Iterator[tuple[str, Path]]:
    return map(class_folder, filter(Path.is_dir, _visible(top)))


def _class_names(
    data: Path, folders: Sequence[tuple[Subset | None, str, Path]], known: Sequence[str] | None
) -> tuple[str, ...]:
    if not folders:
        raise DataError(f"{data} has no class folders", fix="put the images of each class in a folder of its own")
    found = {name for _, name, _ in folders}
    trained = {name for subset, name, _ in folders if subset in (None, "train")}
    names = tuple(known) if known is not None else tuple(sorted(trained or found))
    if unknown := sorted(found - set(names)):
        where = [str(path) for _, name, path in folders if name == unknown[0]]
        raise DataError(f"unknown class {some(map(repr, unknown))} in {where[0]}", fix=nearest(unknown[0], names))
    if len(names) < 2:
        raise DataError(f"{data} has one class only: {names[0]}", fix="give --data the folder above the class folders")
    return names


class _Sorting:
    """Files sorted into images, bad ones and bystanders."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.items: list[Found] = []
        self.bad: dict[str, str] = {}
        self.ignored = 0

    def add(self, folder: Path, label: int, subset: Subset | None) -> int:
        """Take everything under a class folder; the number of images is returned."""
        before = len(self.items)
        for file in _files(folder):
            self._file(file, label, subset)
        return len(self.items) - before

    def _file(self, path: Path, label: int, subset: Subset | None) -> None:
        kind = path.suffix.lower()
        if _is_image(path):
            self.items.append(Found(_name(path, self.data), label, subset))
        elif kind in BYSTANDERS or path.name.startswith("."):
            self.ignored += 1
        else:
            self.bad[_name(path, self.data)] = f"not an image (*{kind})"

    def loose(self, top: Path) -> None:
        """Complain of images that lie beside the class folders."""
        for path in (p for p in _visible(top) if not p.is_dir()):
            if _is_image(path):
                self.bad[_name(path, self.data)] = "in no class folder"
            else:
                self.ignored += 1


def _name(path: Path, data: Path) -> str:
    name = path.relative_to(data).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"the name of {name!r} in {data} is not UTF-8", fix="rename it") from None
    return name


def some(names: Iterable[str]) -> str:
    """`a, b, c and 17 more`, at most SHOWN of them."""
    listed = list(names)
    more = len(listed) - SHOWN
    return ", ".join(listed[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def check(folder: Folder, *, exclude_bad: bool = False, progress: Progress | None = None) -> Checked:
    """Decode every image once; name everything that is unreadable, empty, animated, too small or large, or a copy.

    Copies are found by their pixels as 8-bit RGB. Of copies with one label the first stays, a test image before a
    training image, so that what is left out never changes what is measured on; copies under two labels all go.

    Raises:
        DataError: files that cannot be used (unless exclude_bad), or a class that has none left without them.
    """
    looks, bad = _decode(folder, progress)
    pixels = {path: look.pixels for path, look in looks.items()}
    bad = {**folder.bad, **bad, **_copies(folder, pixels)}
    if bad and not exclude_bad:
        lines = [f"  {path}: {reason}" for path, reason in sorted(bad.items())]
        more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise DataError(
            "\n".join([f"{len(bad)} of the files in {folder.root} cannot be used:", *lines[:SHOWN], *more]),
            fix="mend or remove them, or leave them out with --exclude-bad",
        )
    items = tuple(dataclasses.replace(i, digest=looks[i.path].file) for i in folder.items if i.path not in bad)
    if gone := {i.label for i in folder.items} - {i.label for i in items}:
        classes = some(folder.classes[label] for label in sorted(gone))
        raise DataError(f"no usable image is left of {classes}", fix="mend the files, or remove the class folder")
    if bad:
        log.warning("%d of the files in %s are left out", len(bad), folder.root)
    return Checked(dataclasses.replace(folder, items=items, bad={}), bad, _fingerprint(items, pixels))


class _Look(NamedTuple):
    """What decoding an image once tells: SHA-256 of the file and of its pixels, or the reason why it cannot be used."""

    file: str = ""
    pixels: str = ""
    reason: str = ""


def _decode(folder: Folder, progress: Progress | None) -> tuple[dict[str, _Look], dict[str, str]]:
    """The images that can be decoded, and reasons for those that cannot."""
    looks, bad = {}, {}
    with ThreadPoolExecutor(default_threads()) as pool:
        results = pool.map(partial(_look_at, folder.root), folder.items)
        for done, (item, look) in enumerate(zip(folder.items, results), 1):
            if look.reason:
                bad[item.path] = look.reason
            else:
                looks[item.path] = look
            if progress:
                progress(done, len(folder.items))
    return looks, bad


def _look_at(root: Path, item: Found) -> _Look:
    path = root / item.path
    try:
        with opened(path) as image:
            pixels = hashlib.sha256(repr(image.size).encode())
            rows = max(1, STRIP // image.width)
            for top in range(0, image.height, rows):
                pixels.update(image.crop((0, top, image.width, min(top + rows, image.height))).tobytes())
    except DataError as error:
        reason = error.what.removeprefix(f"{path}: ")
        return _Look(reason="empty" if reason.startswith("not an image") and not path.stat().st_size else reason)
    return _Look(sha256(path), pixels.hexdigest())


def _copies(folder: Folder, hashes: Mapping[str, str]) -> dict[str, str]:
    same: dict[str, list[Found]] = defaultdict(list)
    order: list[Subset | None] = ["test", "val", "train", None]
    for item in sorted(folder.items, key=lambda i: order.index(i.subset)):
        if item.path in hashes:
            same[hashes[item.path]].append(item)
    bad = {}
    for items in same.values():
        for item in items:
            other = next((o for o in items if o.label != item.label), items[0])
            if other is not item:
                bad[item.path] = _same_as(other, item, folder.classes)
    return bad


def _same_as(other: Found, item: Found, classes: Sequence[str]) -> str:
    label = f", labelled {classes[other.label]}" if other.label != item.label else ""
    return f"same picture as {other.path}{label}"


def _fingerprint(items: Iterable[Found], hashes: Mapping[str, str]) -> str:
    lines = sorted(f"{item.path} {hashes[item.path]}\n" for item in items)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
