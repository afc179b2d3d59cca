"""split.json: the division into training, validation, test and certification images, and its validated reading."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from edgekd.errors import ArtifactError
from edgekd.serialization import SCHEMA, read_json

Subset = Literal["train", "val", "test", "certify"]
"""`certify`: images that choose nothing, neither weights nor settings; a certificate is measured on them."""


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        path: POSIX path relative to the data folder.
        label: Class index.
        group: The picture that it was cut from, if known.
        digest: SHA-256 of the file; without it, the file is not verified when it is read.
    """

    path: str
    label: int
    group: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        check_relative(self.path)


def check_relative(path: str) -> None:
    """Check that a path is a normalised POSIX path of a file below a folder.

    Raises:
        ValueError: It is absolute, leads upwards or to the folder itself, is not Unicode, or is not normalised.
    """
    parts = PurePosixPath(path).parts
    if not parts or path != "/".join(parts) or ".." in parts or "\0" in path:
        raise ValueError(f"path: {path!r} is not a normalised path below the data folder")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"path: {path!r} is not UTF-8") from None


@dataclass(frozen=True)
class Split:
    """A division of images into train, val, test and, optionally, certify.

    Attributes:
        classes: Class names.
        subsets: Images of each subset.
        method: How it was made, for example `ratio:3,1,1`.
        seed: Random seed.
        group: Data layout or regular expression that names the pictures images were cut from, or `none`.
        groups: Number of these pictures.
        leaking: Number of pictures with images in more than one subset.
        fingerprint: SHA-256 over the images' paths and pixels.
        excluded: Reasons by path of the excluded files.
        labels: Name of the CSV file with the labels; empty for class folders.
        schema: Version of the file format.
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
            raise ValueError(f"subsets: {min(unknown)!r} is not train, val, test or certify")
        if not 0 <= self.leaking <= self.groups:
            raise ValueError(f"leaking: {self.leaking} of {self.groups} groups is impossible")
        seen: dict[str, str] = {}
        for subset, items in self.subsets.items():
            for item in items:
                if not 0 <= item.label < len(self.classes):
                    raise ValueError(f"subsets.{subset}: {item.path} has the label {item.label} of {len(self.classes)}")
                here = f"{subset}: {item.path}"
                for key in filter(None, (item.path, item.digest)):
                    if (other := seen.setdefault(key, here)) is not here:
                        raise ValueError(f"subsets: one image occurs twice, {other} and {here}")

    def subset(self, name: Subset) -> tuple[Item, ...]:
        """Return the images of one subset.

        Raises:
            ArtifactError: The subset is empty or missing.
        """
        if not self.subsets.get(name):
            ratio = "3,1,1,1" if name == "certify" else "3,1,1"
            raise ArtifactError(
                f"the split has no {name} images", fix=f"create another split with --split ratio:{ratio}"
            )
        return self.subsets[name]


def leaks(subsets: Mapping[str, Sequence[Item]]) -> tuple[int, int]:
    """Count groups that leak.

    Args:
        subsets: Images of each subset.

    Returns:
        The number of groups, and of those with images in more than one subset.
    """
    sides = Counter(key for items in subsets.values() for key in {i.group for i in items} - {""})
    return len(sides), sum(n > 1 for n in sides.values())


def read_split(path: Path) -> Split:
    """Read split.json, or the one in a run folder.

    Raises:
        ArtifactError: Missing or invalid file, an image that occurs twice or has no SHA-256, or leaks that differ from
            the recorded ones.
    """
    path = path / "split.json" if path.is_dir() else path
    split = read_json(path, Split, what="split")
    again = "create another split: train with --split ratio:3,1,1"
    if lacking := [i.path for items in split.subsets.values() for i in items if not i.digest]:
        raise ArtifactError(f"{path} has no SHA-256 of {lacking[0]}: an earlier edgekd wrote it", fix=again)
    groups, leaking = leaks(split.subsets)
    if (groups, leaking) != (split.groups, split.leaking):
        recorded = f"{split.leaking} of {split.groups} groups leak"
        raise ArtifactError(f"{path} was edited: it records that {recorded}, but {leaking} of {groups} do", fix=again)
    return split


def is_stray(path: str) -> bool:
    """Return True if a path is empty or leads out of its folder."""
    parts = PurePosixPath(path).parts
    return not parts or path.startswith("/") or ".." in parts


def check_classes(classes: tuple[str, ...]) -> None:
    """Check the names of a classifier's classes.

    Raises:
        ValueError: Fewer than two, an empty name, or a duplicate.
    """
    if len(classes) < 2 or not all(classes) or len(set(classes)) != len(classes):
        raise ValueError("classes: at least two different names are required, none of them empty")
