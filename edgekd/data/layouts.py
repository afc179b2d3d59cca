"""Data layouts: the folders of published data sets, the grouping of their images, and their download."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from edgekd.data.archives import unzip
from edgekd.registry import Registry
from edgekd.types import Progress

Unpack: TypeAlias = Callable[[Path, Path, Progress | None], None]
"""Writes an archive (first path) as class folders into a folder (second path)."""


@dataclass(frozen=True)
class Source:
    """A downloadable archive.

    Attributes:
        url: Its address.
        md5: Its published MD5 checksum.
        unpack: Writes it as class folders; by default it is a zip file of these.
    """

    url: str
    md5: str
    unpack: Unpack = unzip

    @property
    def name(self) -> str:
        """File name of the archive."""
        return PurePosixPath(self.url).name


@dataclass(frozen=True)
class DataLayout:
    """One data set's layout. Every attribute but the name is optional: class folders need no layout at all.

    Attributes:
        name: Name for `edgekd data get` and `--group`.
        class_folder: Maps a folder below the data folder to its class name and the folder of its images, or to None
            if it does not have this layout.
        group_pattern: Regular expression, searched in each image's relative path; the captured text names the picture
            that the image was cut from, so that a split can keep its images together.
        group_name: Another name for `--group`: what the pattern identifies.
        source: Archive that `edgekd data get` downloads.
        how_to_get: For a data set that may not be redistributed: reason, and where to request it.
    """

    name: str
    class_folder: Callable[[Path], tuple[str, Path] | None] | None = None
    group_pattern: str = ""
    group_name: str = ""
    source: Source | None = None
    how_to_get: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        re.compile(self.group_pattern)


def class_folder(folder: Path) -> tuple[str, Path]:
    """Return the class name of a folder and the folder of its images, by the first layout that it has."""
    for layout in DATA_LAYOUTS.values():
        if layout.class_folder and (found := layout.class_folder(folder)):
            return found
    return folder.name, folder


def group_patterns() -> dict[str, str]:
    """Return the group patterns by layout name."""
    return {layout.name: layout.group_pattern for layout in DATA_LAYOUTS.values() if layout.group_pattern}


def group_names() -> dict[str, str]:
    """Return the layout names by group name, such as `cluster`."""
    return {layout.group_name: layout.name for layout in DATA_LAYOUTS.values() if layout.group_name}


def _sipakmed_folder(folder: Path) -> tuple[str, Path] | None:
    """Recognise im_X/im_X/CROPPED as class X; the cluster images beside CROPPED are ignored."""
    if not folder.name.startswith("im_"):
        return None
    cropped = [p for p in (folder / folder.name / "CROPPED", folder / "CROPPED") if p.is_dir()]
    return (folder.name.removeprefix("im_"), cropped[0]) if cropped else None


def _write_cifar100(archive: Path, folder: Path, progress: Progress | None) -> None:
    """Write train/<class>/00000.png and so on with torchvision, which checks every file of the archive."""
    from torchvision.datasets import CIFAR100

    work = folder / ".torchvision"
    work.mkdir()
    shutil.copy(archive, work / CIFAR100.filename)
    subsets = {subset: CIFAR100(work, train=subset == "train", download=True) for subset in ("train", "test")}
    total, done = sum(map(len, subsets.values())), 0
    for subset, images in subsets.items():
        for name in images.classes:
            (folder / subset / name).mkdir(parents=True)
        for number, (image, label) in enumerate(images):
            image.save(folder / subset / images.classes[label] / f"{number:05d}.png")
            done += 1
            if progress:
                progress(done, total)
    shutil.rmtree(work)


SIPAKMED_LAYOUT = DataLayout(
    "sipakmed",
    class_folder=_sipakmed_folder,
    group_pattern=r"(?:^|/)(?:im_)?(?!CROPPED/)([^/]+)(?:/CROPPED)?/(\d{3})_\d{2}\.[^./]+$",  # class, cluster
    group_name="cluster",
    how_to_get=(
        "SIPaKMeD may not be redistributed: its authors provide it for research",
        "request it at https://www.cs.uoi.gr/~marina/sipakmed.html, unpack it, and give that folder as --data",
    ),
)
KATHER2016_LAYOUT = DataLayout(
    "kather2016",
    group_pattern=r"CRC-Prim-HE-\d+",
    group_name="slide",
    source=Source(
        "https://zenodo.org/records/53169/files/Kather_texture_2016_image_tiles_5000.zip",
        "0ddbebfc56344752028fda72602aaade",
    ),
)
CIFAR100_LAYOUT = DataLayout(
    "cifar100",
    source=Source(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", _write_cifar100
    ),
)
DATA_LAYOUTS: Registry[DataLayout] = Registry(
    "data layout",
    "data_layouts",
    DataLayout,
    {name: f"edgekd.data.layouts:{name.upper()}_LAYOUT" for name in ("sipakmed", "kather2016", "cifar100")},
)
