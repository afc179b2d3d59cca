"""Which image is for training, which for validation, which for testing; and what leaks between them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from edgekd.data.folders import Checked, Folder, Found, scan, some
from edgekd.data.labels import read_labels
from edgekd.data.layouts import group_names, group_patterns
from edgekd.data.split import Item, Split, Subset, leaks, read_split
from edgekd.errors import ConfigError, DataError, nearest

SUBSETS: tuple[Subset, ...] = ("train", "val", "test")
TRIES = 20
"""Random orders in which groups are dealt out, of which the best is taken."""
Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]


def images_of(data: Path, *, labels: Path | None = None, method: str = "") -> Folder:
    """The images to divide: what the CSV file `labels` lists, else what is in class folders.

    method: as for `make_split`; if it is a split that was made of a CSV file, its images.

    Raises:
        EdgekdError: as `read_labels`, `read_split` or `scan`.
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
    """Divide the images into train, val and test, class by class in the same proportion.

    method: `ratio:3,1,1` (train, val, test; 0 leaves a part empty), `kfold:5` (of 5 equal parts number `fold` is the
        test part, the next one validation, the rest training), or the path of a split.json. What train/, val/ and
        test/ folders bring is kept; a part that they lack is cut from training, a fifth of it.
    group: `none`; `cluster` (SIPaKMeD) or `slide` (Kather 2016); or a regular expression, searched in each relative
        path, whose captured text (all of the match if it captures none) names the picture the image was cut from.
        Images of a group stay together, so val and test may lack a class that comes from few pictures: `summary`
        says so. With `none` the shipped patterns are still tried, to count what leaks. The groups that a CSV file
        of labels gives take the place of this.

    Raises:
        ConfigError: a method, fold or pattern that cannot be.
        DataError: too few images or groups, a pattern that does not match, or a split.json of other images.
    """
    if Path(method).suffix == ".json":
        return _given(checked, Path(method))
    items = checked.folder.items
    keys = [i.group for i in items]
    if any(keys):
        group = "labels"
    else:
        keys = group_keys([i.path for i in items], group)
    brought = {i.subset for i in items} - {None}
    weights, names = _plan(method, fold) if brought <= {"train"} else _missing(brought, method)
    where = _deal(checked.folder, weights, names, keys if group != "none" else None, seed)
    subsets: dict[str, list[Item]] = {subset: [] for subset in SUBSETS}
    for item, key, subset in zip(items, keys, where):
        subsets[subset].append(Item(item.path, item.label, key, item.digest))
    groups, leaking = leaks(subsets)
    return Split(
        classes=checked.folder.classes,
        subsets={subset: tuple(inside) for subset, inside in subsets.items()},
        method=_described(method, fold, brought),
        seed=seed,
        group=group_names().get(group, group),
        groups=groups,
        leaking=leaking,
        fingerprint=checked.fingerprint,
        excluded=checked.excluded,
        labels=checked.folder.labels,
    )


def _deal(
    folder: Folder, weights: Sequence[float], names: Sequence[Subset], keys: Sequence[str] | None, seed: int
) -> list[Subset]:
    """The part of each image. val/ and test/ that the folder brings stay; all else is dealt out."""
    where: list[Subset] = [item.subset or "train" for item in folder.items]
    pool = [n for n, subset in enumerate(where) if subset == "train"]
    labels = np.array([folder.items[n].label for n in pool], np.int64)
    rng = np.random.default_rng(seed)
    if keys is None:
        dealt = _deal_images(labels, folder.classes, weights, rng)
    else:
        dealt = _deal_groups(labels, [keys[n] for n in pool], len(folder.classes), weights, rng)
    for n, subset in zip(pool, dealt):
        where[n] = names[subset]
    trained = {item.label for item, subset in zip(folder.items, where) if subset == "train"}
    if lacking := [name for label, name in enumerate(folder.classes) if label not in trained]:
        raise DataError(f"no whole group is left to train class {some(lacking)}", fix=_FEWER)
    return where


def _plan(method: str, fold: int) -> tuple[list[float], list[Subset]]:
    """How many parts to deal the images into, their weights, and what each will be."""
    kind, _, text = method.partition(":")
    try:
        numbers = [float(n) for n in text.split(",")]
    except ValueError:
        numbers = []
    if kind == "ratio" and len(numbers) == 3 and all(0 <= n < math.inf for n in numbers) and numbers[0] > 0:
        return [n for n in numbers if n], [subset for subset, n in zip(SUBSETS, numbers) if n]
    if kind == "kfold" and len(numbers) == 1 and numbers[0] in range(3, 1001) and fold in range(int(numbers[0])):
        k = int(numbers[0])
        return [1.0] * k, ["test" if n == fold else "val" if n == (fold + 1) % k else "train" for n in range(k)]
    raise ConfigError(
        f"--split {method} (fold {fold}) cannot be",
        fix="use ratio:3,1,1 for train, val and test, kfold:5 with a fold from 0 to 4, or the path of a split.json",
    )


def _missing(brought: set[Subset | None], method: str) -> tuple[list[float], list[Subset]]:
    """A fifth of train/ for each of val/ and test/ that the folder does not bring."""
    if "train" not in brought:
        raise DataError("the folder brings no train/", fix="add it, or put the class folders at the top")
    if method.startswith("kfold"):
        raise ConfigError(
            f"--split {method} does not go with a folder that brings {some(sorted(filter(None, brought)))}",
            fix="put all class folders at the top, without train/, val/ and test/",
        )
    names: list[Subset] = ["train", *(subset for subset in SUBSETS if subset not in brought)]
    return [5.0 - len(names[1:]), *(1.0 for _ in names[1:])], names


def _described(method: str, fold: int, brought: set[Subset | None]) -> str:
    if brought <= {"train"}:
        return f"{method} fold {fold}" if method.startswith("kfold") else method
    cut = [subset for subset in SUBSETS if subset not in brought]
    kept = f"folder: {', '.join(subset for subset in SUBSETS if subset in brought)}"
    return kept + (f"; {' and '.join(cut)} cut from train, 1/5 each" if cut else "")


def group_keys(paths: Sequence[str], group: str) -> list[str]:
    """The picture each image was cut from; all empty if `group` is `none` and no shipped pattern fits every path.

    Raises:
        ConfigError: no regular expression.
        DataError: paths that it does not match.
    """
    if group == "none":
        fitting = (keys for p in group_patterns().values() if all(keys := _keys(paths, re.compile(p))))
        return next(fitting, [""] * len(paths))
    name = group_names().get(group, group)
    try:
        pattern = re.compile(group_patterns().get(name, name))
    except re.error as error:
        raise ConfigError(f"--group {group} is no regular expression: {error}", fix=_group_fix(group)) from None
    keys = _keys(paths, pattern)
    if strange := [path for path, key in zip(paths, keys) if not key]:
        raise DataError(
            f"--group {group} says nothing of {len(strange)} of {len(paths)} images: {some(strange[:3])}",
            fix=_group_fix(group),
        )
    return keys


def _group_fix(group: str) -> str:
    return (
        nearest(group, ["none", *group_patterns(), *group_names()])
        + " A regular expression on the relative path works too."
    )


def _keys(paths: Sequence[str], pattern: re.Pattern[str]) -> list[str]:
    matches = [pattern.search(path) for path in paths]
    return ["" if m is None else "/".join(g or "" for g in m.groups()) or m[0] for m in matches]


def _deal_images(labels: Ints, classes: Sequence[str], weights: Sequence[float], rng: np.random.Generator) -> Ints:
    """A part (N,) for each image: each class shuffled and cut by the weights."""
    totals = np.bincount(labels, minlength=len(classes))
    if few := [f"{name} ({n})" for name, n in zip(classes, totals) if n < len(weights)]:
        raise DataError(f"too few images for {len(weights)} parts in class {some(few)}", fix=_FEWER)
    dealt, filled = np.empty(len(labels), np.int64), np.zeros(len(weights))
    for label, total in enumerate(totals):
        counts = _shares(total, weights, filled)
        dealt[rng.permutation(np.flatnonzero(labels == label))] = np.repeat(np.arange(len(weights)), counts)
        filled += counts
    return dealt


def _shares(total: int, weights: Sequence[float], filled: Floats) -> Ints:
    """`total` in whole numbers by weight, at least one each; what rounding leaves goes to the largest remainders."""
    exact = total * np.asarray(weights) / sum(weights)
    counts = np.maximum(np.floor(exact + 1e-9).astype(np.int64), 1)
    while counts.sum() != total:
        step = 1 if counts.sum() < total else -1
        need = step * (exact - counts) - (counts + step < 1) * total
        counts[np.lexsort((filled, -need))[0]] += step
    return counts


def _deal_groups(
    labels: Ints, keys: Sequence[str], classes: int, weights: Sequence[float], rng: np.random.Generator
) -> Ints:
    """A part (N,) for each image, the same for all images of a group; classes as even as whole groups allow."""
    _, group = np.unique(np.asarray(keys), return_inverse=True)
    table = np.zeros((group.max() + 1, classes), np.int64)
    np.add.at(table, (group, labels), 1)
    share = table / np.maximum(table.sum(0), 1)
    target = np.outer(np.asarray(weights) / sum(weights), np.ones(classes))
    tries = [_greedy(share, target, rng) for _ in range(TRIES)]
    return min(tries, key=lambda t: t[:2])[2][group]


def _greedy(table: Floats, target: Floats, rng: np.random.Generator) -> tuple[int, float, Ints]:
    """Groups (G, C) dealt one by one, large ones early, to the part (P, C) that they bring nearest to its target.

    Returns: empty cells, squared distance to the target, and the part (G,) of each group.
    """
    have, dealt = np.zeros_like(target), np.zeros(len(table), np.int64)
    for g in np.argsort(-table.sum(1) * rng.uniform(0.5, 1, len(table)), kind="stable"):
        dealt[g] = np.argmin((table[g] * (2 * (have - target) + table[g])).sum(1))
        have[dealt[g]] += table[g]
    return int((have == 0).sum()), float(((have - target) ** 2).sum()), dealt


_FEWER = "use fewer parts (ratio:4,0,1), add images, or split without groups (--group none)"


def _given(checked: Checked, path: Path) -> Split:
    """A split.json, if it is of just these images."""
    split = read_split(path)
    if split.classes != checked.folder.classes:
        ours, theirs = some(checked.folder.classes), some(split.classes)
        raise DataError(f"{path} is for classes {theirs}; {checked.folder.root} has {ours}", fix="make a new split")
    here = {i.path: i for i in checked.folder.items}
    there = {i.path: i for items in split.subsets.values() for i in items}
    both = here.keys() & there.keys()
    problems = {
        "that are not in the folder": there.keys() - here.keys(),
        "fewer than the folder has": here.keys() - there.keys(),
        "under another class": {p for p in both if here[p].label != there[p].label},
        "that were changed since": {p for p in both if here[p].digest != there[p].digest},
    }
    lines = [f"  {len(found)} images {what}: {some(sorted(found)[:5])}" for what, found in problems.items() if found]
    if lines:
        raise DataError("\n".join([f"{path} does not fit {checked.folder.root}:", *lines]), fix="make a new split")
    return split


def summary(split: Split) -> str:
    """A text table of images a class and part, and what leaks between the parts."""
    wide = max(map(len, [*split.classes, "class"]))
    rows = [("class", *SUBSETS)]
    counts = {subset: Counter(i.label for i in split.subsets.get(subset, ())) for subset in SUBSETS}
    rows += [(name, *(str(counts[subset][k]) for subset in SUBSETS)) for k, name in enumerate(split.classes)]
    rows += [("all", *(str(counts[subset].total()) for subset in SUBSETS))]
    table = [f"{name:<{wide}}" + "".join(f"{cell:>8}" for cell in cells) for name, *cells in rows]
    lacking = {subset: [name for k, name in enumerate(split.classes) if not counts[subset][k]] for subset in SUBSETS}
    notes = [f"{subset} has no {some(names)}" for subset, names in lacking.items() if names and counts[subset]]
    title = f"split {split.method}, seed {split.seed}, groups: {split.group}"
    return "\n".join([title, *table, *notes, _leak_text(split)])


def _leak_text(split: Split) -> str:
    if not split.groups:
        return "which images were cut from one picture is not known: give --group to keep them together"
    if not split.leaking:
        return f"none of {split.groups} groups leaks: images cut from one picture are in one part"
    return f"{split.leaking} of {split.groups} groups leak: images cut from one picture are in several parts"
