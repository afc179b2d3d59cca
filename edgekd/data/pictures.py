"""Pictures without labels: finding, checking and grouping them, and loading them in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekd.data.folders import check, scan_pictures
from edgekd.data.images import load_batches
from edgekd.data.preprocess import Preprocess
from edgekd.data.splitting import group_keys
from edgekd.types import Array, Progress


@dataclass(frozen=True)
class Picture:
    """An image whose class is not known.

    Attributes:
        path: POSIX path relative to the data folder.
        group: The picture that it was cut from, if known.
        digest: SHA-256 of the file.
    """

    path: str
    group: str
    digest: str


def find_pictures(
    folder: Path, *, group: str = "none", exclude_bad: bool = False, progress: Progress | None = None
) -> tuple[Picture, ...]:
    """Find the images anywhere below a folder, and decode every one once.

    Args:
        folder: The data folder; the names of the folders in it have no meaning, except in data layouts.
        group: As for `make_split`. With `none`, too, groups are known if one of the data layouts names them.
        exclude_bad: Exclude unusable files and all but one of duplicates.
        progress: Called with the images checked and their number.

    Returns:
        The images, in the order of the folders.

    Raises:
        ConfigError: Invalid regular expression.
        DataError: No images, a pattern that does not match, or unusable files (unless `exclude_bad`).
    """
    found = scan_pictures(folder)
    group_keys([i.path for i in found.items], group)  # refused before anything is decoded
    items = check(found, exclude_bad=exclude_bad, progress=progress).folder.items
    keys = group_keys([i.path for i in items], group)
    return tuple(Picture(i.path, key, i.digest) for i, key in zip(items, keys))


def load_pictures(
    folder: Path,
    pictures: Sequence[Picture],
    preprocess: Preprocess,
    *,
    batch: int = 32,
    progress: Progress | None = None,
) -> Iterator[Array]:
    """Load images as batches of network input; see `load_batches`.

    Args:
        folder: The data folder.
        pictures: The images.
        preprocess: The network's preprocessing.
        batch: Number of images in each batch but the last.
        progress: Called with the images loaded and their number.
    """
    return load_batches([folder / p.path for p in pictures], preprocess, batch=batch, progress=progress)
