"""Splits: proportions worked by hand, whole groups, and the leaks of a random split on real names."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.data.folders import Checked, Folder, Found, scan
from edgekd.data.split import Item, Split, leaks, read_split
from edgekd.data.splitting import SUBSETS, divide, group_keys, make_split, summary
from edgekd.errors import ArtifactError, ConfigError, DataError
from edgekd.files import atomic_write
from edgekd.serialization import to_json


def made_up(counts: dict[str, int], *, name: str = "{}/{}.png", subset: str | None = None) -> Checked:
    """A checked folder of images that exist by name only; splitting reads no pixels."""
    paths = [(name.format(c, n), k) for k, c in enumerate(counts) for n in range(counts[c])]
    items = [Found(path, k, subset, digest=digest(path)) for path, k in paths]  # type: ignore[arg-type]
    return Checked(Folder(Path("data"), tuple(counts), tuple(items), {}, 0), {}, "print")


def digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def real(folder: Path) -> Checked:
    return Checked(scan(folder), {}, "print")


def sizes(split: Split) -> dict[str, list[int]]:
    return {
        subset: [sum(i.label == k for i in items) for k in range(len(split.classes))]
        for subset, items in split.subsets.items()
    }


def test_ratio_by_hand() -> None:
    # 11 images: 6.6, 2.2, 2.2 -> 6, 2, 2 and the remainder to train; 3 images: one each
    split = make_split(made_up({"a": 11, "b": 3, "c": 10}), seed=3)
    assert sizes(split) == {"train": [7, 1, 6], "val": [2, 1, 2], "test": [2, 1, 2]}
    assert (split.groups, split.leaking, split.method) == (0, 0, "ratio:3,1,1")
    assert sizes(make_split(made_up({"a": 5, "b": 10}), method="ratio:4,0,1"))["val"] == [0, 0]


def test_a_split_is_a_partition_that_the_seed_decides() -> None:
    checked = made_up({"a": 30, "b": 20})
    one, same, other = (make_split(checked, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert sorted(i.path for items in one.subsets.values() for i in items) == sorted(
        i.path for i in checked.folder.items
    )


@pytest.mark.parametrize("group", ["none", r"^\w+/(\d+)-"])
def test_kfold_tests_each_image_once(group: str) -> None:
    items = [Found(f"{c}/{n // 3}-{n}.png", k) for k, c in enumerate("ab") for n in range(60)]
    checked = Checked(Folder(Path("data"), ("a", "b"), tuple(items), {}, 0), {}, "print")
    folds = [make_split(checked, method="kfold:5", fold=fold, group=group) for fold in range(5)]
    tested = Counter(i.path for split in folds for i in split.subset("test"))
    assert tested == Counter(i.path for i in items)
    assert [i.path for i in folds[0].subset("val")] == [i.path for i in folds[1].subset("test")]
    assert [sum(sizes(split)["test"]) for split in folds] == [24] * 5


def test_sipakmed_groups_match_the_published_counts(shared: Path) -> None:
    data = shared / "data" / "sipakmed"
    checked = real(data)
    keys = set(group_keys([i.path for i in checked.folder.items], "cluster"))
    counts = Counter(key.split("/")[0] for key in keys)
    assert counts == {
        "Superficial-Intermediate": 126,
        "Parabasal": 108,
        "Metaplastic": 271,
        "Koilocytotic": 238,
        "Dyskeratotic": 223,
    }
    random, whole = make_split(checked), make_split(checked, group="cluster")
    assert (random.groups, whole.groups, whole.leaking, whole.group) == (966, 966, 0, "sipakmed")
    assert random.leaking > 500
    assert f"{random.leaking} of 966 groups leak" in summary(random)
    totals = np.array([813, 825, 793, 787, 831])
    for split in (random, whole):
        for subset, share in zip(SUBSETS, (0.6, 0.2, 0.2)):
            assert np.abs(np.array(sizes(split)[subset]) - share * totals).max() <= 2


@pytest.mark.parametrize(
    ("path", "group", "key"),
    [
        ("im_Metaplastic/im_Metaplastic/CROPPED/012_03.bmp", "cluster", "Metaplastic/012"),
        ("train/Metaplastic/012_03.jpg", "sipakmed", "Metaplastic/012"),
        ("im_Metaplastic/012_03.bmp", "sipakmed", "Metaplastic/012"),
        ("01_TUMOR/10009_CRC-Prim-HE-03_009.tif_Row_301_Col_151.tif", "slide", "CRC-Prim-HE-03"),
        ("a/patient7/x.png", r"patient\d+", "patient7"),
        ("a/p7/x_2.png", r"(?P<patient>p\d)/x_(\d)", "p7/2"),
    ],
)
def test_group_patterns(path: str, group: str, key: str) -> None:
    assert group_keys([path], group) == [key]


def test_a_cluster_is_not_named_without_its_class() -> None:
    """The folder of one class, given as the data folder: its clusters would pass for others than in the whole."""
    for path in ("CROPPED/012_03.bmp", "012_03.bmp"):
        assert group_keys([path], "none") == [""]


def test_kather_slides(shared: Path) -> None:
    split = make_split(real(shared / "data" / "kather2016"), group="slide")
    assert (split.groups, split.leaking) == (10, 0)
    assert min(sizes(split)["train"]) > 0
    assert "val has no 08_EMPTY" in summary(split)  # it is on two slides only
    assert make_split(real(shared / "data" / "kather2016_tif")).groups == 9


def test_invalid_group_patterns_are_refused() -> None:
    checked = made_up({"a": 9, "b": 9})
    with pytest.raises(DataError, match=r"(?s)does not match 18 of 18 images: a/0.png.*Did you mean 'cluster'"):
        make_split(checked, group="clusters")
    with pytest.raises(ConfigError, match="not a regular expression"):
        make_split(checked, group="(")
    with pytest.raises(DataError, match="no whole group is left for training class"):
        make_split(made_up({"a": 9, "b": 9}), method="kfold:3", group="^[ab]")
    with pytest.raises(DataError, match=r"no whole group is left for .*certify"):
        make_split(made_up({"a": 2, "b": 2}), method="ratio:3,1,1,1", group=r"\d")


def test_invalid_methods_and_too_small_classes_are_refused() -> None:
    for method in ("ratio:3,1", "ratio:0,1,1", "ratio:3,-1,1", "ratio:inf,1,1", "kfold:2", "kfold:x", "half"):
        with pytest.raises(ConfigError, match="is not valid"):
            make_split(made_up({"a": 9, "b": 9}), method=method)
    with pytest.raises(ConfigError, match="fold 5"):
        make_split(made_up({"a": 9, "b": 9}), method="kfold:5", fold=5)
    with pytest.raises(DataError, match=r"too few images for 3 parts in class b \(2\), c \(1\)"):
        make_split(made_up({"a": 9, "b": 2, "c": 1}))


def joined(*folders: Checked) -> Checked:
    items = tuple(i for c in folders for i in c.folder.items)
    return dataclasses.replace(folders[0], folder=dataclasses.replace(folders[0].folder, items=items))


def test_existing_subsets_are_preserved() -> None:
    train = made_up({"a": 10, "b": 20}, name="train/{}/{}.png", subset="train")
    test = made_up({"a": 4, "b": 3}, name="test/{}/{}.png", subset="test")
    split = make_split(joined(train, test))
    assert sizes(split) == {"train": [8, 16], "val": [2, 4], "test": [4, 3]}
    assert split.method == "folder: train, test; val cut from train, 1/5 each"
    assert {i.path.split("/")[0] for i in split.subset("val")} == {"train"}
    with pytest.raises(ConfigError, match="without test, train"):
        make_split(joined(train, test), method="kfold:5")
    with pytest.raises(DataError, match="has no train/"):
        make_split(test)
    assert sizes(make_split(train))["test"] == [2, 4]


def test_a_split_file_is_reused_or_refused(tmp_path: Path) -> None:
    checked = made_up({"a": 10, "b": 10}, name="{}/001_{:02d}.png")
    split = make_split(checked)
    atomic_write(tmp_path / "split.json", to_json(split))
    assert read_split(tmp_path) == split == make_split(checked, method=str(tmp_path / "split.json"))
    fewer = dataclasses.replace(checked.folder, items=checked.folder.items[1:])
    relabelled = dataclasses.replace(checked.folder.items[0], label=1)
    changed = dataclasses.replace(checked.folder.items[0], digest=digest("another picture"))
    for folder, message in (
        (fewer, r"1 images that are not in the folder: a/001_00.png"),
        (dataclasses.replace(fewer, items=(*checked.folder.items, Found("a/new.png", 0))), "fewer .* a/new.png"),
        (dataclasses.replace(fewer, items=(relabelled, *fewer.items)), "with another class: a/001_00.png"),
        (dataclasses.replace(fewer, items=(changed, *fewer.items)), "1 images that were changed since: a/001_00.png"),
        (dataclasses.replace(fewer, classes=("a", "c")), "is for classes a, b"),
    ):
        with pytest.raises(DataError, match=message):
            make_split(dataclasses.replace(checked, folder=folder), method=str(tmp_path / "split.json"))


def grouped(subsets: dict[str, list[str]]) -> dict[str, Any]:
    """split.json of images `a/1` (class a, group 1), as a table."""
    table = {
        subset: [
            {"path": f"{path}.png", "label": "ab".index(path[0]), "group": path[2:], "digest": digest(path)}
            for path in paths
        ]
        for subset, paths in subsets.items()
    }
    keys = [{i["group"] for i in items} for items in table.values()]
    every = set().union(*keys)
    leaking = sum(sum(key in one for one in keys) > 1 for key in every)
    rest = {"method": "by hand", "seed": 0, "group": "x", "groups": len(every), "leaking": leaking, "fingerprint": ""}
    return {"classes": ["a", "b"], "subsets": table, **rest}


WHOLE = {"train": ["a/1", "b/2"], "val": ["a/3", "b/3"], "test": ["a/1x", "b/4"]}


def edit(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    """An edit of the first training image."""
    return lambda table: table["subsets"]["train"][0].update({key: value})


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "test image in train": (
        lambda t: t["subsets"]["train"].append(t["subsets"]["test"][0]),
        r"one image occurs twice, train: a/1x\.png and test: a/1x\.png",
    ),
    "under another name": (
        lambda t: t["subsets"]["train"].append({**t["subsets"]["test"][0], "path": "a/copy.png"}),
        r"one image occurs twice, train: a/copy\.png and test: a/1x\.png",
    ),
    "twice in a part": (lambda t: t["subsets"]["val"].append(t["subsets"]["val"][0]), "occurs twice, val: .* and val"),
    "moved, so that its group leaks": (
        lambda t: t["subsets"]["train"].append(t["subsets"]["val"].pop()),
        "it records that 0 of 5 groups leak, but 1 of 5 do",
    ),
    "label above": (edit("label", 2), r"a/1\.png has the label 2 of 2"),
    "label below": (edit("label", -1), r"a/1\.png has the label -1 of 2"),
    "label no number": (edit("label", "a"), r"train\[0\]\.label: expected int"),
    "unknown subset": (lambda t: t["subsets"].update(training=[]), "'training' is not train, val, test or certify"),
    "absolute": (edit("path", "/etc/passwd.png"), "not a normalised path"),
    "upwards": (edit("path", "a/../../b.png"), "not a normalised path"),
    "same file otherwise": (edit("path", "./a/1x.png"), "not a normalised path"),
    "slashes": (edit("path", "a//1x.png"), "not a normalised path"),
    "the folder itself": (edit("path", "."), "not a normalised path"),
    "empty": (edit("path", ""), "not a normalised path"),
    "NUL": (edit("path", "a\0.png"), "is not valid text"),
    "half a character": (edit("path", "\ud800.png"), "is not valid text|is not UTF-8"),
    "class twice": (lambda t: t.update(classes=["a", "a"]), "classes: "),
    "class without a name": (lambda t: t.update(classes=["a", ""]), "classes: "),
    "one class": (lambda t: t.update(classes=["a"]), "classes: "),
    "negative leaks": (lambda t: t.update(leaking=-1), "-1 of 5 groups"),
    "negative groups": (lambda t: t.update(groups=-5), "0 of -5 groups"),
    "more groups": (lambda t: t.update(groups=9), "it records that 0 of 9 groups leak, but 0 of 5 do"),
    "no digest": (lambda t: t["subsets"]["val"][0].pop("digest"), r"no SHA-256 of a/3\.png"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_an_invalid_split_is_refused_when_it_is_read(kind: str, tmp_path: Path) -> None:
    change, message = EDITS[kind]
    table, path = grouped(WHOLE), tmp_path / "split.json"
    path.write_text(json.dumps(table))
    assert len(read_split(tmp_path).subset("train")) == 2
    change(table)
    path.write_text(json.dumps(table))
    for read in (lambda: read_split(tmp_path), lambda: make_split(made_up({"a": 5, "b": 5}), method=str(path))):
        with pytest.raises(ArtifactError, match=message) as caught:
            read()
        assert str(path) in caught.value.what


def test_a_fourth_weight_gives_images_for_certification() -> None:
    # 12 and 6 images of weights 3:1:1:1
    checked = made_up({"a": 12, "b": 6})
    split = make_split(checked, method="ratio:3,1,1,1", seed=2)
    assert sizes(split) == {"train": [6, 3], "val": [2, 1], "test": [2, 1], "certify": [2, 1]}
    assert summary(split).splitlines()[1:3] == [
        "class   train     val    test certify",
        "a           6       2       2       2",
    ]
    three = make_split(checked, seed=2)
    assert "certify" not in three.subsets
    assert make_split(checked, method="ratio:3,1,1,0", seed=2).subsets == three.subsets
    with pytest.raises(ArtifactError, match=r"(?s)no certify images.*ratio:3,1,1,1"):
        three.subset("certify")
    with pytest.raises(ConfigError, match="is not valid"):
        make_split(checked, method="ratio:3,1,1,1,1")


def test_groups_leak_into_the_certification_images_as_into_any_other() -> None:
    items = [Found(f"{c}/{n // 4}-{n}.png", k) for k, c in enumerate("ab") for n in range(80)]
    checked = Checked(Folder(Path("data"), ("a", "b"), tuple(items), {}, 0), {}, "print")
    split = make_split(checked, method="ratio:3,1,1,1", group=r"^\w+/\d+")
    assert split.leaking == 0
    assert len({i.group for i in split.subset("certify")}) in (6, 7)  # a sixth of 40
    moved = {**split.subsets, "certify": (*split.subset("certify"), Item("a/x.png", 0, split.subset("train")[0].group))}
    assert leaks(moved) == (40, 1)


def test_an_existing_folder_for_certification_is_preserved() -> None:
    parts = {
        subset: made_up({"a": 10, "b": 20}, name=f"{subset}/{{}}/{{}}.png", subset=subset)
        for subset in ("train", "val", "test", "certify")
    }
    split = make_split(joined(*parts.values()))
    assert sizes(split)["certify"] == [10, 20]
    assert split.method == "folder: train, val, test, certify"
    three = joined(*(parts[s] for s in ("train", "val", "test")))
    assert "certify" not in make_split(three).subsets
    cut = make_split(three, method="ratio:3,1,1,1")
    assert sizes(cut) == {"train": [8, 16], "val": [10, 20], "test": [10, 20], "certify": [2, 4]}
    assert cut.method == "folder: train, val, test; certify cut from train, 1/5 each"
    with pytest.raises(ConfigError, match="needs a folder without certify, train"):
        make_split(joined(parts["train"], parts["certify"]), method="kfold:5")


def test_three_weights_give_the_split_of_earlier_versions() -> None:
    split = make_split(made_up({"a": 30, "b": 20}, name="{}/{:03d}_01.png"), seed=7, group="cluster")
    paths = json.dumps({subset: [i.path for i in items] for subset, items in split.subsets.items()})
    assert digest(paths)[:12] == "2b8ef847a1e5"  # computed before there were images for certification


@pytest.mark.parametrize("grouped", [True, False])
def test_a_division_keeps_groups_together_and_is_decided_by_the_seed(grouped: bool) -> None:
    items = [Item(f"{n}.png", 0, f"g{n // 3}" if grouped else "") for n in range(60)]
    path, test = divide(items, 0.4, seed=1)
    assert sorted(path + test, key=items.index) == items
    assert not grouped or not {i.group for i in path} & {i.group for i in test}
    assert len(path) == 24  # 0.4 of 20 groups of 3, or of 60 images
    assert (path, test) == divide(items, 0.4, seed=1) != divide(items, 0.4, seed=2)
    shuffled = divide(items[::-1], 0.4, seed=1)
    assert (set(shuffled[0]), shuffled[0][0]) == (set(path), path[-1])


def test_every_group_comes_into_each_part_of_a_division_alike() -> None:
    items = [Item(f"{n}.png", 0, str(n // 2)) for n in range(20)]
    drawn = Counter(i.group for seed in range(400) for i in divide(items, 0.3, seed)[0])
    assert len(drawn) == 10
    assert all(abs(n - 240) < 5 * (2 * 2 * 400 * 0.3 * 0.7) ** 0.5 for n in drawn.values())  # 2 images, 400 draws


def test_one_group_cannot_be_divided() -> None:
    assert divide([Item("1.png", 0), Item("2.png", 0)], 0.01, 0)[0]
    for items in ([Item("1.png", 0, "g"), Item("2.png", 0, "g")], [Item("1.png", 0)], []):
        with pytest.raises(DataError, match="cannot be divided"):
            divide(items, 0.5, 0)


def test_summary_by_hand() -> None:
    assert summary(make_split(made_up({"a": 5, "bb": 10}))) == (
        "split ratio:3,1,1, seed 0, groups: none\n"
        "class   train     val    test\n"
        "a           3       1       1\n"
        "bb          6       2       2\n"
        "all         9       3       3\n"
        "images cut from one picture are not known: give --group to keep them together"
    )
