"""split.json: which image is in which part, and its checked reading."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from edgekd.errors import ArtifactError
from edgekd.serialization import SCHEMA, read_json

Subset = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Item:
    """One image: posix path relative to the data folder, class index, and the picture it was cut from.

    digest: SHA-256 of the file; without one it is not checked when it is read.
    """

    path: str
    label: int
    group: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        check_relative(self.path)


def check_relative(path: str) -> None:
    """Whether this is the plain posix path of a file below some folder.

    Raises:
        ValueError: it is absolute, leads upwards or to the folder itself, is no Unicode, or could be written shorter.
    """
    parts = PurePosixPath(path).parts
    if not parts or path != "/".join(parts) or ".." in parts or "\0" in path:
        raise ValueError(f"path: {path!r} is no plain path below the data folder")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"path: {path!r} is not UTF-8") from None


@dataclass(frozen=True)
class Split:
    """Which image is where. `leaking` counts groups with images in more than one part.

    labels: name of the CSV file that gave the labels; empty if folders did.
    """

    classes: tuple[str, ...]
    subsets: dict[str, tuple[Item, ...]]
    method: str
    seed: int
    group: str
    groups: int
    leaking: int
    fingerprint: str
    excluded: dict[str, str] = field(default_factory=dict)
    labels: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        check_classes(self.classes)
        if unknown := self.subsets.keys() - set(get_args(Subset)):
            raise ValueError(f"subsets: {min(unknown)!r} is none of train, val, test")
        if not 0 <= self.leaking <= self.groups:
            raise ValueError(f"leaking: {self.leaking} of {self.groups} groups cannot be")
        seen: dict[str, str] = {}
        for subset, items in self.subsets.items():
            for item in items:
                if not 0 <= item.label < len(self.classes):
                    raise ValueError(f"subsets.{subset}: {item.path} has the label {item.label} of {len(self.classes)}")
                here = f"{subset}: {item.path}"
                for picture in filter(None, (item.path, item.digest)):
                    if (other := seen.setdefault(picture, here)) is not here:
                        raise ValueError(f"subsets: one picture is there twice, {other} and {here}")

    def subset(self, name: Subset) -> tuple[Item, ...]:
        """The images of one part.

        Raises:
            ArtifactError: the part is empty or missing.
        """
        if not self.subsets.get(name):
            raise ArtifactError(f"the split has no {name} images", fix="make another with --split ratio:3,1,1")
        return self.subsets[name]


def leaks(subsets: Mapping[str, Sequence[Item]]) -> tuple[int, int]:
    """The number of groups, and of those with images in more than one part."""
    sides = Counter(key for items in subsets.values() for key in {i.group for i in items} - {""})
    return len(sides), sum(n > 1 for n in sides.values())


def read_split(path: Path) -> Split:
    """Read split.json, or the one in a run folder.

    Raises:
        ArtifactError: no split; parts, labels, paths or classes that cannot be; an image twice or without SHA-256;
            other leaks than it says.
    """
    path = path / "split.json" if path.is_dir() else path
    split = read_json(path, Split, what="split")
    again = "make another split: train with --split ratio:3,1,1"
    if lacking := [i.path for items in split.subsets.values() for i in items if not i.digest]:
        raise ArtifactError(f"{path} has no SHA-256 of {lacking[0]}: an earlier edgekd wrote it", fix=again)
    groups, leaking = leaks(split.subsets)
    if (groups, leaking) != (split.groups, split.leaking):
        said = f"{split.leaking} of {split.groups} groups leak"
        raise ArtifactError(f"{path} was edited: it says that {said}, but {leaking} of {groups} do", fix=again)
    return split


def is_stray(path: str) -> bool:
    """Whether a path that should lie in a folder is none, or leads out of it."""
    parts = PurePosixPath(path).parts
    return not parts or path.startswith("/") or ".." in parts


def check_classes(classes: tuple[str, ...]) -> None:
    """Whether these can be the names of a classifier's classes.

    Raises:
        ValueError: fewer than two, one without a name, or one twice.
    """
    if len(classes) < 2 or not all(classes) or len(set(classes)) != len(classes):
        raise ValueError("classes: two or more names, none of them empty or there twice")
