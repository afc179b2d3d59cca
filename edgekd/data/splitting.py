"""Dividing images into training, validation, test and certification subsets, and counting leaks between them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from edgekd.data.folders import Checked, Folder, Found, join_limited, scan
from edgekd.data.labels import read_labels
from edgekd.data.layouts import group_names, group_patterns
from edgekd.data.split import Item, Split, Subset, leaks, read_split
from edgekd.errors import ConfigError, DataError, nearest

SUBSETS: tuple[Subset, ...] = ("train", "val", "test", "certify")
TRIES = 20
"""Random orders of assigning groups, of which the best is taken."""
Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]


def images_of(data: Path, *, labels: Path | None = None, method: str = "") -> Folder:
    """Find the images to divide: those that a CSV file lists, or else those in class folders.

    Args:
        data: The data folder.
        labels: CSV file of labels.
        method: As for `make_split`; a split.json that was made from a CSV file provides its images.

    Raises:
        EdgekdError: See `read_labels`, `read_split` and `scan`.
    """
    if labels is not None:
        return read_labels(data, labels)
    if Path(method).suffix == ".json" and (split := read_split(Path(method))).labels:
        items = tuple(Found(i.path, i.label) for items in split.subsets.values() for i in items)
        return Folder(data, split.classes, items, {}, 0, split.labels)
    return scan(data)


def make_split(
    checked: Checked, *, method: str = "ratio:3,1,1", fold: int = 0, group: str = "none", seed: int = 0
) -> Split:
    """Divide the images into train, val, test and, optionally, certify, each class in the same proportion.

    Args:
        checked: The images.
        method: `ratio:3,1,1` (train, val, test; 0 leaves a subset empty), `ratio:3,1,1,1` (the same and certify),
            `kfold:5` (of 5 equal folds, number `fold` is the test subset, the next one the validation subset, the rest
            training), or the path of a split.json. Existing train/, val/, test/ and certify/ folders are preserved; a
            missing subset gets a fifth of the training images, certify only with a ratio that names it.
        fold: Index of the test fold, from 0.
        group: `none`; a data layout or its group name, such as `cluster` (SIPaKMeD) or `slide` (Kather 2016); or a
            regular expression, searched in each relative path, whose captured text (the whole match without captures)
            names the picture that the image was cut from. Images of a group stay together, so val and test may lack a
            class that comes from few pictures; `summary` reports it. With `none`, the layouts' patterns are still
            used to count leaks. Groups from a CSV file take precedence.
        seed: Random seed.

    Raises:
        ConfigError: Invalid method, fold or pattern.
        DataError: Too few images or groups, a pattern that does not match, or a split.json of other images.
    """
    if Path(method).suffix == ".json":
        return _given(checked, Path(method))
    items = checked.folder.items
    keys = [i.group for i in items]
    if any(keys):
        group = "labels"
    else:
        keys = group_keys([i.path for i in items], group)
    existing = {i.subset for i in items} - {None}
    weights, names = _plan(method, fold) if existing <= {"train"} else _missing(existing, method)
    assigned = _assign(checked.folder, weights, names, keys if group != "none" else None, seed)
    subsets: dict[str, list[Item]] = {subset: [] for subset in SUBSETS if subset != "certify" or "certify" in assigned}
    for item, key, subset in zip(items, keys, assigned):
        subsets[subset].append(Item(item.path, item.label, key, item.digest))
    groups, leaking = leaks(subsets)
    return Split(
        classes=checked.folder.classes,
        subsets={subset: tuple(images) for subset, images in subsets.items()},
        method=_described(method, fold, existing, names),
        seed=seed,
        group=group_names().get(group, group),
        groups=groups,
        leaking=leaking,
        fingerprint=checked.fingerprint,
        excluded=checked.excluded,
        labels=checked.folder.labels,
    )


def _assign(
    folder: Folder, weights: Sequence[float], names: Sequence[Subset], keys: Sequence[str] | None, seed: int
) -> list[Subset]:
    """Return the subset of each image. Existing val/ and test/ are preserved; all other images are assigned."""
    assigned: list[Subset] = [item.subset or "train" for item in folder.items]
    pool = [n for n, subset in enumerate(assigned) if subset == "train"]
    labels = np.array([folder.items[n].label for n in pool], np.int64)
    rng = np.random.default_rng(seed)
    if keys is None:
        parts = _assign_images(labels, folder.classes, weights, rng)
    else:
        parts = _assign_groups(labels, [keys[n] for n in pool], len(folder.classes), weights, rng)
    for n, part in zip(pool, parts):
        assigned[n] = names[part]
    trained = {item.label for item, subset in zip(folder.items, assigned) if subset == "train"}
    if lacking := [name for label, name in enumerate(folder.classes) if label not in trained]:
        raise DataError(f"no whole group is left for training class {join_limited(lacking)}", fix=_FEWER)
    if empty := [subset for subset in names if subset not in assigned]:
        raise DataError(f"no whole group is left for {join_limited(empty)}", fix=_FEWER)
    return assigned


def _plan(method: str, fold: int) -> tuple[list[float], list[Subset]]:
    """Return the weights of the parts to divide the images into, and the subset that each becomes."""
    kind, _, text = method.partition(":")
    try:
        numbers = [float(n) for n in text.split(",")]
    except ValueError:
        numbers = []
    if kind == "ratio" and len(numbers) in (3, 4) and all(0 <= n < math.inf for n in numbers) and numbers[0] > 0:
        return [n for n in numbers if n], [subset for subset, n in zip(SUBSETS, numbers) if n]
    if kind == "kfold" and len(numbers) == 1 and numbers[0] in range(3, 1001) and fold in range(int(numbers[0])):
        k = int(numbers[0])
        return [1.0] * k, ["test" if n == fold else "val" if n == (fold + 1) % k else "train" for n in range(k)]
    raise ConfigError(
        f"--split {method} (fold {fold}) is not valid",
        fix="use ratio:3,1,1 for train, val and test, ratio:3,1,1,1 for certify as well, kfold:5 with a fold from 0 "
        "to 4, or the path of a split.json",
    )


def _missing(existing: set[Subset | None], method: str) -> tuple[list[float], list[Subset]]:
    """Return the same as `_plan`, with a fifth of train/ for each other subset that is missing."""
    if "train" not in existing:
        raise DataError("the folder has no train/", fix="add it, or put the class folders at the top")
    if method.startswith("kfold"):
        raise ConfigError(
            f"--split {method} needs a folder without {join_limited(sorted(filter(None, existing)))}",
            fix="put all class folders at the top, without train/, val/, test/ and certify/",
        )
    wanted = SUBSETS if "certify" in _plan(method, 0)[1] else SUBSETS[:3]
    names: list[Subset] = ["train", *(subset for subset in wanted if subset not in existing)]
    return [5.0 - len(names[1:]), *(1.0 for _ in names[1:])], names


def _described(method: str, fold: int, existing: set[Subset | None], names: Sequence[Subset]) -> str:
    if existing <= {"train"}:
        return f"{method} fold {fold}" if method.startswith("kfold") else method
    cut = names[1:]
    kept = f"folder: {', '.join(subset for subset in SUBSETS if subset in existing)}"
    return kept + (f"; {' and '.join(cut)} cut from train, 1/5 each" if cut else "")


def group_keys(paths: Sequence[str], group: str) -> list[str]:
    """Return the picture that each image was cut from.

    Args:
        paths: Relative paths of the images.
        group: As for `make_split`.

    Returns:
        A key for each image; all empty if `group` is `none` and no layout's pattern matches every path.

    Raises:
        ConfigError: Invalid regular expression.
        DataError: Paths that it does not match.
    """
    if group == "none":
        fitting = (keys for p in group_patterns().values() if all(keys := _keys(paths, re.compile(p))))
        return next(fitting, [""] * len(paths))
    name = group_names().get(group, group)
    try:
        pattern = re.compile(group_patterns().get(name, name))
    except re.error as error:
        raise ConfigError(f"--group {group} is not a regular expression: {error}", fix=_group_fix(group)) from None
    keys = _keys(paths, pattern)
    if unmatched := [path for path, key in zip(paths, keys) if not key]:
        raise DataError(
            f"--group {group} does not match {len(unmatched)} of {len(paths)} images: {join_limited(unmatched[:3])}",
            fix=f"--group none, if each image is independent of the others, or another rule; {_group_fix(group)}",
        )
    return keys


def _group_fix(group: str) -> str:
    return (
        nearest(group, ["none", *group_patterns(), *group_names()])
        + " A regular expression on the relative path is accepted, too."
    )


def _keys(paths: Sequence[str], pattern: re.Pattern[str]) -> list[str]:
    matches = [pattern.search(path) for path in paths]
    return ["" if m is None else "/".join(g or "" for g in m.groups()) or m[0] for m in matches]


def _assign_images(labels: Ints, classes: Sequence[str], weights: Sequence[float], rng: np.random.Generator) -> Ints:
    """Return the part (N,) of each image: each class shuffled and divided by the weights."""
    totals = np.bincount(labels, minlength=len(classes))
    if few := [f"{name} ({n})" for name, n in zip(classes, totals) if n < len(weights)]:
        raise DataError(f"too few images for {len(weights)} parts in class {join_limited(few)}", fix=_FEWER)
    parts, filled = np.empty(len(labels), np.int64), np.zeros(len(weights))
    for label, total in enumerate(totals):
        counts = _shares(total, weights, filled)
        parts[rng.permutation(np.flatnonzero(labels == label))] = np.repeat(np.arange(len(weights)), counts)
        filled += counts
    return parts


def _shares(total: int, weights: Sequence[float], filled: Floats) -> Ints:
    """Divide `total` into whole numbers by weight, at least one each, by the largest remainders."""
    exact = total * np.asarray(weights) / sum(weights)
    counts = np.maximum(np.floor(exact + 1e-9).astype(np.int64), 1)
    while counts.sum() != total:
        step = 1 if counts.sum() < total else -1
        need = step * (exact - counts) - (counts + step < 1) * total
        counts[np.lexsort((filled, -need))[0]] += step
    return counts


def _assign_groups(
    labels: Ints, keys: Sequence[str], classes: int, weights: Sequence[float], rng: np.random.Generator
) -> Ints:
    """Return the part (N,) of each image, the same within a group; classes as balanced as whole groups allow."""
    _, group = np.unique(np.asarray(keys), return_inverse=True)
    table = np.zeros((group.max() + 1, classes), np.int64)
    np.add.at(table, (group, labels), 1)
    share = table / np.maximum(table.sum(0), 1)
    target = np.outer(np.asarray(weights) / sum(weights), np.ones(classes))
    tries = [_greedy(share, target, rng) for _ in range(TRIES)]
    return min(tries, key=lambda t: t[:2])[2][group]


def _greedy(table: Floats, target: Floats, rng: np.random.Generator) -> tuple[int, float, Ints]:
    """Assign groups one by one, large ones early, each to the part that it brings closest to its target.

    Args:
        table: Share (G, C) of each class in each group.
        target: Desired share (P, C) of each class in each part.
        rng: Source of the order.

    Returns:
        Number of empty cells, squared distance to the target, and the part (G,) of each group.
    """
    have, parts = np.zeros_like(target), np.zeros(len(table), np.int64)
    for g in np.argsort(-table.sum(1) * rng.uniform(0.5, 1, len(table)), kind="stable"):
        parts[g] = np.argmin((table[g] * (2 * (have - target) + table[g])).sum(1))
        have[parts[g]] += table[g]
    return int((have == 0).sum()), float(((have - target) ** 2).sum()), parts


class Grouped(Protocol):
    """An image with a path and, if known, the picture that it was cut from: an `Item` or a `Picture`."""

    @property
    def path(self) -> str: ...

    @property
    def group(self) -> str: ...


G = TypeVar("G", bound=Grouped)


def divide(items: Sequence[G], fraction: float, seed: int) -> tuple[tuple[G, ...], tuple[G, ...]]:
    """Divide images at random into two parts, those of a group together.

    Groups are drawn, not images, so the number of groups in a part is fixed beforehand and does not depend on the
    images. An image without a group is one of its own. The order of the images does not matter.

    Args:
        items: The images.
        fraction: Share of the groups in the first part, between 0 and 1.
        seed: Random seed.

    Returns:
        Both parts, each in the order of `items` and with a group at least.

    Raises:
        DataError: All images are of one group.
    """
    keys, group = np.unique([i.group or f"/{i.path}" for i in items], return_inverse=True)
    if len(keys) < 2:
        raise DataError(f"{len(items)} images of {len(keys)} group cannot be divided", fix="add images of other groups")
    first = np.zeros(len(keys), bool)
    count = min(max(round(fraction * len(keys)), 1), len(keys) - 1)
    first[np.random.default_rng(seed).permutation(len(keys))[:count]] = True
    return tuple(i for i, g in zip(items, group) if first[g]), tuple(i for i, g in zip(items, group) if not first[g])


_FEWER = "use fewer parts (ratio:4,0,1), add images, or split without groups (--group none)"


def _given(checked: Checked, path: Path) -> Split:
    """Read a split.json of exactly these images."""
    split = read_split(path)
    if split.classes != checked.folder.classes:
        ours, theirs = join_limited(checked.folder.classes), join_limited(split.classes)
        raise DataError(f"{path} is for classes {theirs}; {checked.folder.root} has {ours}", fix="create a new split")
    here = {i.path: i for i in checked.folder.items}
    there = {i.path: i for items in split.subsets.values() for i in items}
    both = here.keys() & there.keys()
    problems = {
        "that are not in the folder": there.keys() - here.keys(),
        "fewer than the folder has": here.keys() - there.keys(),
        "with another class": {p for p in both if here[p].label != there[p].label},
        "that were changed since": {p for p in both if here[p].digest != there[p].digest},
    }
    lines = [
        f"  {len(found)} images {what}: {join_limited(sorted(found)[:5])}" for what, found in problems.items() if found
    ]
    if lines:
        raise DataError("\n".join([f"{path} does not fit {checked.folder.root}:", *lines]), fix="create a new split")
    return split


def summary(split: Split) -> str:
    """Format a table of the images per class and subset, and the leaks between subsets."""
    wide = max(map(len, [*split.classes, "class"]))
    subsets = SUBSETS if split.subsets.get("certify") else SUBSETS[:3]
    rows = [("class", *subsets)]
    counts = {subset: Counter(i.label for i in split.subsets.get(subset, ())) for subset in subsets}
    rows += [(name, *(str(counts[subset][k]) for subset in subsets)) for k, name in enumerate(split.classes)]
    rows += [("all", *(str(counts[subset].total()) for subset in subsets))]
    table = [f"{name:<{wide}}" + "".join(f"{cell:>8}" for cell in cells) for name, *cells in rows]
    lacking = {subset: [name for k, name in enumerate(split.classes) if not counts[subset][k]] for subset in subsets}
    notes = [f"{subset} has no {join_limited(names)}" for subset, names in lacking.items() if names and counts[subset]]
    title = f"split {split.method}, seed {split.seed}, groups: {split.group}"
    return "\n".join([title, *table, *notes, _leak_text(split)])


def _leak_text(split: Split) -> str:
    if not split.groups:
        return "images cut from one picture are not known: give --group to keep them together"
    if not split.leaking:
        return f"none of {split.groups} groups leaks: images cut from one picture are in one subset"
    return f"{split.leaking} of {split.groups} groups leak: images cut from one picture are in several subsets"
