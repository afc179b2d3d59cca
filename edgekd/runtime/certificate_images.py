"""The images of a certificate: those that choose settings (path), and those that test them and chose nothing (test)."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from edgekd.artifacts.metadata import ModelMetadata
from edgekd.artifacts.training_images import unseen
from edgekd.data.folders import check, scan
from edgekd.data.images import require_unchanged
from edgekd.data.pictures import Picture, find_pictures
from edgekd.data.split import Item, Split
from edgekd.data.splitting import divide, group_keys
from edgekd.errors import DataError
from edgekd.types import Labels, Progress

log = logging.getLogger(__name__)
Image: TypeAlias = Item | Picture
PATH_SHARE = 0.4
"""Share of the groups that choose the settings; the others test them."""


@dataclass(frozen=True)
class CertificateImages:
    """Images of a certificate, in a folder.

    Attributes:
        folder: The data folder.
        path: Images that choose settings and temperatures; empty for a fixed setting.
        test: Images that chose nothing.
        group: Rule that names the groups, or `none`.
        warnings: What weakens a certificate on these images.
        are_apart: True if the test images are a subset of their own; else further images go to both parts.
    """

    folder: Path
    path: tuple[Image, ...]
    test: tuple[Image, ...]
    group: str
    warnings: tuple[str, ...] = ()
    are_apart: bool = False

    @property
    def digest(self) -> str:
        """Digest of all images, whatever their division."""
        return digest_of([*self.path, *self.test])


def digest_of(images: Sequence[Image]) -> str:
    """Return a digest of the content of images, whatever their order."""
    return hashlib.sha256("\n".join(sorted(i.digest for i in images)).encode()).hexdigest()


def labels_of(images: Sequence[Image]) -> Labels | None:
    """Return the class indices (N,) of images; None if one of them has none."""
    labels = [i.label for i in images if isinstance(i, Item)]
    return np.array(labels, np.int64) if len(labels) == len(images) else None


def groups_of(images: Sequence[Image]) -> npt.NDArray[np.int64] | None:
    """Return an index (N,) of each image's group; None if no two images are known to be of one group."""
    names, index = np.unique([i.group or f"/{i.path}" for i in images], return_inverse=True)
    return None if len(names) == len(images) else np.asarray(index, np.int64)


def images_of_split(data: Path, split: Split, *, group: str | None = None, seed: int) -> CertificateImages:
    """Take the images of a split: the subset `val` chooses, and `certify` tests; without one, `val` is divided.

    Args:
        data: The data folder.
        split: The split of the run that the network comes from.
        group: Rule that names the groups; None for that of the split. With `none`, images count as independent.
        seed: Seed of the division.

    Raises:
        ArtifactError: The split has no validation images.
        DataError: Images are missing or have changed.
    """
    warnings = []
    val, apart = split.subset("val"), split.subsets.get("certify", ())
    if group == "none" and any(i.group for i in val):
        warnings.append("--group none: images of one picture count as independent; other pictures are not promised")
    if group is not None:
        val, apart = (_regrouped(items, group) for items in (val, apart))
    if apart:
        path, test = val, apart
    else:
        path, test = divide(val, PATH_SHARE, seed)
        warnings.append(
            "the test images are validation images, which also chose the epoch and passed the gate of compile; "
            "images of a subset of their own (--split ratio:3,1,1,1) choose nothing"
        )
    if split.leaking and group != "none":
        warnings.append(
            f"the split is random, but {split.leaking} of {split.groups} pictures have images in several subsets: "
            "nothing is promised for images of other pictures; split by group"
        )
    require_unchanged([*path, *test], data)
    return CertificateImages(data, tuple(path), tuple(test), group or split.group, tuple(warnings), bool(apart))


def _regrouped(items: tuple[Item, ...], group: str) -> tuple[Item, ...]:
    keys = [""] * len(items) if group == "none" else group_keys([i.path for i in items], group)
    return tuple(dataclasses.replace(i, group=key) for i, key in zip(items, keys))


def images_of_folder(
    data: Path,
    metadata: ModelMetadata,
    *,
    group: str | None,
    with_labels: bool,
    seed: int | None,
    progress: Progress | None = None,
) -> CertificateImages:
    """Take the images of a folder that the network has not learned from, and whose groups it has not learned from.

    Args:
        data: The folder; of class folders if labels are needed, else of pictures anywhere below it.
        metadata: Metadata of the network.
        group: Rule that names the groups; None for that of the training images.
        with_labels: Read the labels.
        seed: Seed of the division into path and test; None to test a fixed setting on all images.
        progress: Called with the images checked and their number.

    Raises:
        DataError: No image is left, unusable files, or groups that are needed and not known.
    """
    known, warnings = metadata.training_images, []
    if group is None:
        group = known.group if known and known.group != "labels" else "none"
    found = _labelled(data, metadata, group, progress) if with_labels else _pictures(data, group, progress)
    if known is None:
        warnings.append("the network does not list its training images, so it is not checked that none is among these")
    images = unseen(found, known)
    if not images:
        what = f"the network has learned from all {len(found)} images in {data}, or from others of their groups"
        raise DataError(what, fix="give images that it has not seen; a run's own data needs --split")
    if left_out := len(found) - len(images):
        log.info("%d of %d images are left out: they, or others of their group, were trained on", left_out, len(found))
    path, test = ((), images) if seed is None else divide(images, PATH_SHARE, seed)
    return CertificateImages(data, tuple(path), tuple(test), group, tuple(warnings))


def _pictures(data: Path, group: str, progress: Progress | None) -> tuple[Image, ...]:
    return find_pictures(data, group=group, exclude_bad=True, progress=progress)  # how many is logged


def _labelled(data: Path, metadata: ModelMetadata, group: str, progress: Progress | None) -> tuple[Image, ...]:
    items = check(scan(data, classes=metadata.classes), exclude_bad=True, progress=progress).folder.items
    keys = group_keys([i.path for i in items], group)
    return tuple(Item(i.path, i.label, key, i.digest) for i, key in zip(items, keys))
