"""The images that a network has learned from, as part of its metadata; certificates are measured on other images."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from edgekd.errors import DataError

DIGITS = 16
"""Number of hexadecimal digits: two of a million images agree by accident with a probability of 3e-8."""


class Seen(Protocol):
    """An image with its group and SHA-256: an `Item` or a `Picture`."""

    @property
    def group(self) -> str: ...

    @property
    def digest(self) -> str: ...


T = TypeVar("T", bound=Seen)


@dataclass(frozen=True)
class TrainingImages:
    """Images by the first digits of hashes, so that names of patients are in no model file.

    Attributes:
        group: Data layout or regular expression that names the groups, `labels` for those of a CSV file, or `none`; a
            data layout may name them all the same.
        digests: Beginning of each file's SHA-256, sorted.
        groups: Beginning of the SHA-256 of each group's name, sorted.
    """

    group: str
    digests: tuple[str, ...]
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, values in (("digests", self.digests), ("groups", self.groups)):
            if wrong := next((v for v in values if not re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", v)), None):
                raise ValueError(f"{name}: {wrong!r} is not {DIGITS} hexadecimal digits")
            if list(values) != sorted(set(values)):
                raise ValueError(f"{name}: must be sorted and differ")
        if not self.group or not (self.group == "none" or self.groups):
            raise ValueError(f"groups: there are none by the rule {self.group!r}")

    @classmethod
    def of(cls, items: Iterable[Seen], group: str) -> TrainingImages:
        """Return the entry for images that were grouped by the rule `group`."""
        items = list(items)
        names = {i.group for i in items} - {""}
        return cls(
            group if names else "none",
            tuple(sorted({i.digest[:DIGITS] for i in items})),
            tuple(sorted(map(_group_digest, names))),
        )


def _group_digest(group: str) -> str:
    return hashlib.sha256(group.encode()).hexdigest()[:DIGITS]


def unseen(items: Sequence[T], training_images: TrainingImages | None) -> tuple[T, ...]:
    """Return the images that the network has not learned from, and from whose group it has learned nothing.

    Args:
        items: Images from outside the network's split, grouped by the rule `training_images.group`. Only an unchanged
            file is recognised, and a group by its name; a regular expression must find it in the same place.
        training_images: What the network has learned from; None if that is not known.

    Raises:
        DataError: The network learned from groups, and the groups of these images are not known.
    """
    if training_images is None:
        return tuple(items)
    digests, groups = set(training_images.digests), set(training_images.groups)
    if training_images.group != "none" and not all(i.group for i in items):
        rule = training_images.group
        fix = "a CSV file named them: give images with such a file" if rule == "labels" else f"give --group {rule!r}"
        raise DataError("the images have no groups, but the network learned from groups of images", fix=fix)
    return tuple(i for i in items if i.digest[:DIGITS] not in digests and _group_digest(i.group) not in groups)


def seen(items: Sequence[T], training_images: TrainingImages) -> tuple[T, ...]:
    """Return the images that the network has learned from."""
    digests = set(training_images.digests)
    return tuple(i for i in items if i.digest[:DIGITS] in digests)
