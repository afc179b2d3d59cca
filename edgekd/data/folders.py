"""Finding the images in a folder, labelled or not, and checking every one before training."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
    "certify": "certify",
    "certification": "certify",
}
"""Subset by the name (in any case) of a folder above the class folders."""
IGNORED_FOLDERS = frozenset(
    {"$recycle.bin", "#recycle", "@eadir", "@recycle", "__macosx", "lost+found", "system volume information"}
)
"""Folders made by operating systems and storage devices, in lower case; ignored like hidden ones."""
IGNORED_SUFFIXES = frozenset({"", ".csv", ".dat", ".db", ".ini", ".json", ".md", ".txt", ".xml"})
"""Suffixes of files that are common beside images; ignored and counted like hidden ones."""
SHOWN = 20
"""Largest number of list entries that an error prints before it gives the number of the others."""


@dataclass(frozen=True)
class Found:
    """One image file.

    Attributes:
        path: POSIX path relative to the data folder.
        label: Class index.
        subset: Subset that its folder or the CSV file assigns, if any.
        group: The picture that it was cut from, if a CSV file gives it.
        digest: SHA-256 of the file, once checked.
    """

    path: str
    label: int
    subset: Subset | None = None
    group: str = ""
    digest: str = ""


@dataclass(frozen=True)
class Folder:
    """Images, labelled except for those of `scan_pictures`.

    Attributes:
        root: The data folder.
        classes: Class names; none without labels.
        items: The images.
        bad: Reasons by path of the unusable files.
        ignored: Number of ignored files.
        labels: Name of the CSV file with the labels; empty for class folders.
    """

    root: Path
    classes: tuple[str, ...]
    items: tuple[Found, ...]
    bad: Mapping[str, str]
    ignored: int
    labels: str = ""


@dataclass(frozen=True)
class Checked:
    """A folder whose images are all usable.

    Attributes:
        folder: The usable images.
        excluded: Reasons by path of the excluded files.
        fingerprint: SHA-256 over the paths and decoded pixels.
    """

    folder: Folder
    excluded: dict[str, str]
    fingerprint: str


def scan(data: Path, *, classes: Sequence[str] | None = None) -> Folder:
    """Find the images in class folders, with or without train/, val/, test/ and certify/ above those.

    Class folders are searched recursively. Folders with one of the data layouts contribute the class and the images
    that the layout gives.

    Args:
        data: The data folder.
        classes: Classes of a network that will be evaluated on the images; default: the folder names, sorted.

    Raises:
        DataError: A missing or empty folder, a single class, class folders without images, or unknown classes.
    """
    if not data.is_dir():
        raise DataError(f"no folder at {data}", fix="give --data the folder that holds one folder per class")
    tops = _tops(data)
    folders = [(subset, name, path) for subset, top in tops for name, path in _class_folders(top)]
    names = _class_names(data, folders, classes)
    found = _Collector(data)
    empty = [path for subset, name, path in folders if not found.add(path, names.index(name), subset)]
    if empty:
        raise DataError(f"no images in {join_limited(map(str, empty))}", fix="fill or remove these class folders")
    for top in dict.fromkeys((data, *(top for _, top in tops))):
        found.add_stray(top)
    return Folder(data, names, tuple(found.items), found.bad, found.ignored)


def scan_pictures(data: Path) -> Folder:
    """Find the images anywhere below a folder, whatever its folders are called: all have the label 0.

    Of a folder with one of the data layouts, only the images that the layout gives are taken.

    Args:
        data: The data folder.

    Raises:
        DataError: No folder, a folder without images, or one that cannot be read.
    """
    if not data.is_dir():
        raise DataError(f"no folder at {data}", fix="give --data a folder of images")
    found = _Collector(data)
    images_folder = functools.cache(lambda folder: class_folder(folder)[1])
    for file in _files(data):
        if all(file.is_relative_to(images_folder(data / above)) for above in file.relative_to(data).parents):
            found.add_file(file, 0, None)
    if not found.items:
        raise DataError(f"no images in {data}", fix="give --data a folder of images")
    return Folder(data, (), tuple(found.items), found.bad, found.ignored)


def image_files(folder: Path) -> list[Path]:
    """List the images under a folder; `scan` uses it for class folders, `edgekd predict` for any folder.

    Images are recognised by their suffix in any case; hidden files are ignored. Links to files and folders are
    followed, but not upwards, and each folder is visited once. Broken links are listed, so that they are reported.

    Raises:
        DataError: A folder is not readable.
    """
    return [file for file in _files(folder) if _is_image(file)]


def _files(folder: Path) -> Iterator[Path]:
    seen = {_identity(above) for above in folder.resolve().parents}
    for root, folders, files in os.walk(folder, onerror=_unreadable, followlinks=True):
        if (here := _identity(Path(root))) in seen:
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if not _is_ignored(name))
        yield from (Path(root, name) for name in sorted(files))


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _unreadable(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename} cannot be read ({error.strerror})", fix="correct its permissions or remove it")


def _is_image(file: Path) -> bool:
    broken = file.is_symlink() and not file.exists()
    return not file.name.startswith(".") and (broken or file.suffix.lower() in EXTENSIONS)


def _is_ignored(folder: str) -> bool:
    return folder.startswith(".") or folder.lower() in IGNORED_FOLDERS


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if not _is_ignored(p.name))
    except OSError as error:
        _unreadable(error)


def _tops(data: Path) -> list[tuple[Subset | None, Path]]:
    """Return the folders of class folders, with their subset: train/, val/, … or else `data` itself."""
    folders = [p for p in _visible(data) if p.is_dir()]
    subsets = [p for p in folders if p.name.lower() in SUBSETS and any(c.is_dir() for c in _visible(p))]
    if not subsets:
        return [(None, data)]
    if others := [p.name for p in folders if p not in subsets]:
        raise DataError(
            f"{data} has {join_limited(others)} beside {join_limited(p.name for p in subsets)}",
            fix="keep only train/, val/, test/ and certify/ there, or only class folders",
        )
    return [(SUBSETS[p.name.lower()], p) for p in subsets]


def _class_folders(top: Path) -> Iterator[tuple[str, Path]]:
    return map(class_folder, filter(Path.is_dir, _visible(top)))


def _class_names(
    data: Path, folders: Sequence[tuple[Subset | None, str, Path]], known: Sequence[str] | None
) -> tuple[str, ...]:
    if not folders:
        raise DataError(f"{data} has no class folders", fix="put the images of each class into a folder of their own")
    found = {name for _, name, _ in folders}
    trained = {name for subset, name, _ in folders if subset in (None, "train")}
    names = tuple(known) if known is not None else tuple(sorted(trained or found))
    if unknown := sorted(found - set(names)):
        where = [str(path) for _, name, path in folders if name == unknown[0]]
        raise DataError(
            f"unknown class {join_limited(map(repr, unknown))} in {where[0]}", fix=nearest(unknown[0], names)
        )
    if len(names) < 2:
        raise DataError(f"{data} has only one class: {names[0]}", fix="give --data the folder above the class folders")
    return names


class _Collector:
    """Sorts files into images, unusable files and ignored ones."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.items: list[Found] = []
        self.bad: dict[str, str] = {}
        self.ignored = 0

    def add(self, folder: Path, label: int, subset: Subset | None) -> int:
        """Add everything under a class folder; return the number of images."""
        before = len(self.items)
        for file in _files(folder):
            self.add_file(file, label, subset)
        return len(self.items) - before

    def add_file(self, path: Path, label: int, subset: Subset | None) -> None:
        kind = path.suffix.lower()
        if _is_image(path):
            self.items.append(Found(_name(path, self.data), label, subset))
        elif kind in IGNORED_SUFFIXES or path.name.startswith("."):
            self.ignored += 1
        else:
            self.bad[_name(path, self.data)] = f"not an image (*{kind})"

    def add_stray(self, top: Path) -> None:
        """Record images beside the class folders as unusable."""
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


def join_limited(names: Iterable[str]) -> str:
    """Join names as `a, b, c and 17 more`, at most SHOWN of them."""
    listed = list(names)
    more = len(listed) - SHOWN
    return ", ".join(listed[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def check(folder: Folder, *, exclude_bad: bool = False, progress: Progress | None = None) -> Checked:
    """Decode every image once and report all that are unreadable, empty, animated, too small or large, or duplicates.

    Duplicates are found by their pixels as 8-bit RGB. Of duplicates with one label the first is kept, a test image
    before a training image, so that the test subset never depends on what is excluded; duplicates with different
    labels are all unusable.

    Args:
        folder: Result of `scan`, `scan_pictures` or `read_labels`.
        exclude_bad: Exclude unusable files.
        progress: Called with the images checked and their number.

    Raises:
        DataError: Unusable files (unless `exclude_bad`), or a class without any usable image.
    """
    hashes, bad = _decode(folder, progress)
    pixels = {path: digests.pixels for path, digests in hashes.items()}
    bad = {**folder.bad, **bad, **_duplicates(folder, pixels)}
    if bad and not exclude_bad:
        lines = [f"  {path}: {reason}" for path, reason in sorted(bad.items())]
        more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise DataError(
            "\n".join([f"{len(bad)} files in {folder.root} cannot be used:", *lines[:SHOWN], *more]),
            fix="repair or remove them, or exclude them with --exclude-bad",
        )
    items = tuple(dataclasses.replace(i, digest=hashes[i.path].file) for i in folder.items if i.path not in bad)
    if not items:
        raise DataError(f"no usable image is left in {folder.root}", fix="repair the files, or give another folder")
    if gone := {i.label for i in folder.items} - {i.label for i in items}:
        classes = join_limited(folder.classes[label] for label in sorted(gone))
        raise DataError(f"no usable image is left of {classes}", fix="repair the files, or remove the class folder")
    if bad:
        log.warning("%d files in %s are excluded", len(bad), folder.root)
    return Checked(dataclasses.replace(folder, items=items, bad={}), bad, _fingerprint(items, pixels))


class _Digests(NamedTuple):
    """SHA-256 of an image file and of its pixels, or the reason why it cannot be used."""

    file: str = ""
    pixels: str = ""
    reason: str = ""


def _decode(folder: Folder, progress: Progress | None) -> tuple[dict[str, _Digests], dict[str, str]]:
    """Return the digests by path of all images that can be decoded, and the reasons for the others."""
    hashes, bad = {}, {}
    with ThreadPoolExecutor(default_threads()) as pool:
        results = pool.map(functools.partial(_digests, folder.root), folder.items)
        for done, (item, digests) in enumerate(zip(folder.items, results), 1):
            if digests.reason:
                bad[item.path] = digests.reason
            else:
                hashes[item.path] = digests
            if progress:
                progress(done, len(folder.items))
    return hashes, bad


def _digests(root: Path, item: Found) -> _Digests:
    path = root / item.path
    try:
        with opened(path) as image:
            pixels = hashlib.sha256(repr(image.size).encode())
            rows = max(1, STRIP // image.width)
            for top in range(0, image.height, rows):
                pixels.update(image.crop((0, top, image.width, min(top + rows, image.height))).tobytes())
    except DataError as error:
        reason = error.what.removeprefix(f"{path}: ")
        return _Digests(reason="empty" if reason.startswith("not an image") and not path.stat().st_size else reason)
    return _Digests(sha256(path), pixels.hexdigest())


def _duplicates(folder: Folder, hashes: Mapping[str, str]) -> dict[str, str]:
    same: dict[str, list[Found]] = defaultdict(list)
    order: list[Subset | None] = ["test", "certify", "val", "train", None]
    for item in sorted(folder.items, key=lambda i: order.index(i.subset)):
        if item.path in hashes:
            same[hashes[item.path]].append(item)
    bad = {}
    for items in same.values():
        for item in items:
            other = next((o for o in items if o.label != item.label), items[0])
            if other is not item:
                bad[item.path] = _duplicate_of(other, item, folder.classes)
    return bad


def _duplicate_of(other: Found, item: Found, classes: Sequence[str]) -> str:
    label = f", labelled {classes[other.label]}" if other.label != item.label else ""
    return f"duplicate of {other.path}{label}"


def _fingerprint(items: Iterable[Found], hashes: Mapping[str, str]) -> str:
    lines = sorted(f"{item.path} {hashes[item.path]}\n" for item in items)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
