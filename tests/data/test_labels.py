"""Labels from a CSV file: every column, every spelling, and what is wrong in which line."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.cli import edgekd
from PIL import Image

from edgekd.data.folders import check, image_files, scan
from edgekd.data.labels import read_labels
from edgekd.data.split import read_split
from edgekd.data.splitting import images_of, make_split, summary
from edgekd.errors import DataError
from edgekd.files import atomic_write
from edgekd.serialization import to_json
from edgekd.training.protocol import Protocol
from edgekd.training.request import TrainRequest
from edgekd.training.sweep import train_job

NAMES = [f"{n:02d}.png" for n in range(20)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twenty different pictures in one folder."""
    for n, name in enumerate(NAMES):
        pixels = np.random.default_rng(n).integers(0, 256, (10, 10, 3), dtype=np.uint8)
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "data" / name)
    return tmp_path / "data"


def written(data: Path, text: str | bytes) -> Path:
    file = data.parent / "labels.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def plain(**columns: list[str]) -> str:
    """A line for each picture: every other is a cell, the rest are nuclei."""
    rows = [["path", "label", *columns]]
    rows += [[name, "nucleus" if n % 2 else "cell", *(c[n] for c in columns.values())] for n, name in enumerate(NAMES)]
    return "".join(",".join(row) + "\n" for row in rows)


SPELLINGS = {
    "plain": plain(),
    "with a BOM, semicolons and Windows' line ends": "\ufeff" + plain().replace(",", ";").replace("\n", "\r\n"),
    "tabs, capitals, spaces and empty lines": plain()
    .replace(",", "\t ")
    .replace("path", " Path ")
    .replace("label", "LABEL")
    .replace("\n", "\n\n"),
    "quoted, in another order, with more columns": "note,label,age,path\n"
    + "".join(f'"a, b","{"nucleus" if n % 2 else "cell"}",,"{name}"\n' for n, name in enumerate(NAMES)),
}


@pytest.mark.parametrize("kind", SPELLINGS)
def test_every_csv_dialect_reads_the_same(kind: str, data: Path) -> None:
    folder = read_labels(data, written(data, SPELLINGS[kind]))
    assert folder.classes == ("cell", "nucleus")
    assert [(i.path, i.label, i.subset, i.group) for i in folder.items] == [
        (p, n % 2, None, "") for n, p in enumerate(NAMES)
    ]
    assert (folder.bad, folder.labels) == ({}, "labels.csv")


def test_subsets_and_groups(data: Path) -> None:
    """Both take the place of --split and --group; parts are called as their folders may be."""
    subsets = ["Training"] * 12 + ["valid"] * 4 + ["TEST"] * 4
    split = make_split(check(read_labels(data, written(data, plain(subset=subsets)))), method="ratio:1,1,1", seed=9)
    assert {subset: len(items) for subset, items in split.subsets.items()} == {"train": 12, "val": 4, "test": 4}
    slides = [f"slide {n // 4}" for n in range(20)]
    split = make_split(check(read_labels(data, written(data, plain(group=slides)))), group="cluster")
    assert (split.groups, split.leaking, split.group, split.labels) == (5, 0, "labels", "labels.csv")
    assert "none of 5 groups leaks" in summary(split)
    for items in split.subsets.values():
        assert len(items) % 4 == 0
    split = make_split(check(read_labels(data, written(data, plain(subset=subsets, group=["one"] * 20)))))
    assert (split.groups, split.leaking) == (1, 1)


def test_a_split_made_from_a_csv_no_longer_needs_it(data: Path) -> None:
    split = make_split(check(read_labels(data, written(data, plain()))))
    file = data.parent / "split.json"
    atomic_write(file, to_json(split))
    again = check(images_of(data, method=str(file)))
    assert make_split(again, method=str(file)) == split
    Image.new("RGB", (10, 10)).save(data / "03.png")
    with pytest.raises(DataError, match=r"1 images that were changed since: 03\.png"):
        make_split(check(images_of(data, method=str(file))), method=str(file))
    with pytest.raises(DataError, match="has no class folders"):
        scan(data)


WRONG = {
    "no file": (None, r"no labels file at .*labels\.csv"),
    "nothing": ("", "line 1: not exactly one column path, label"),
    "header alone": ("path,label\n", "lists no images"),
    "no header": ("00.png,cell\n01.png,nucleus\n", "line 1: not exactly one column path, label"),
    "a column twice": ("path,label,label\n00.png,cell,cell\n", "line 1: not exactly one column label"),
    "no label": (plain() + "99.png,\n", "line 22: no label"),
    "no path": (plain() + ",cell\n", "line 22: no path"),
    "too few": (plain() + "99.png\n", "line 22: 1 values in 2 columns"),
    "too many": (plain() + "99.png,cell,2\n", "line 22: 3 values in 2 columns"),
    "twice": (plain() + "03.png,nucleus\n", r"line 22: 03\.png is already in line 5"),
    "absolute": (plain() + "/03.png,nucleus\n", r"line 22: .*'/03\.png' is not a normalised path"),
    "upwards": (plain() + "../03.png,nucleus\n", r"line 22: .*'\.\./03\.png' is not a normalised path"),
    "unknown subset": (
        "path,label,subset\n00.png,cell,tset\n",
        r"(?s)line 2: unknown subset 'tset'.*Did you mean 'test'",
    ),
    "part of some": ("path,label,subset\n00.png,cell,test\n01.png,nucleus,\n", "line 3: subset is given for some"),
    "group of some": ("path,label,group\n00.png,cell,\n01.png,nucleus,3\n", "line 3: group is given for some"),
    "one class": ("path,label\n00.png,cell\n", "only one class: cell"),
    "quote without end": (plain() + '"99.png,cell\n', "line 22: "),
    "Latin-1": (plain().replace("nucleus", "Kerné").encode("latin-1"), "is not UTF-8"),
    "UTF-16": (plain().encode("utf-16"), "is not UTF-8"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_error_names_its_line(kind: str, data: Path) -> None:
    text, message = WRONG[kind]
    file = written(data, text) if text is not None else data.parent / "labels.csv"
    with pytest.raises(DataError, match=message) as caught:
        read_labels(data, file)
    assert str(file) in caught.value.what
    assert caught.value.fix


def test_unusable_images_are_reported_as_in_folders(data: Path) -> None:
    (data / "04.png").write_bytes(b"")
    file = written(data, plain() + "lost.png,cell\n" + f"{'x' * 300}.png,cell\n")
    with pytest.raises(DataError, match=r"(?s)3 files in .* 04\.png: empty.* lost\.png: no such file"):
        check(read_labels(data, file))
    with pytest.raises(DataError, match=r"(?s)line 2: unknown class 'cell'.*Did you mean 'cells'"):
        read_labels(data, file, classes=("cells", "nucleus"))


def test_trained_distilled_and_evaluated_with_labels(cells: Path, tmp_path: Path) -> None:
    """Of a folder without class folders; the split of the first run holds all that what follows needs."""
    file, data = tmp_path / "labels.csv", tmp_path / "data"
    shutil.copytree(cells, data / "all")
    paths = sorted(p.relative_to(data).as_posix() for p in image_files(data))
    file.write_text("label,path\n" + "".join(f"{path.split('/')[1]},{path}\n" for path in paths))
    small = ["--epochs", "1", "--image-size", "16", "--weights", "none", "--set", "batch_size=16", "--set", "workers=0"]
    small += ["--precision", "32-true"]
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    edgekd("train", "--data", data, "--labels", file, "--model", "resnet18", *small, "--out", teacher)
    assert make_split(check(read_labels(data, file))) == read_split(teacher)
    edgekd("distill", "--data", data, "--teacher", teacher, *small, "--method", "kd", "--out", student)
    assert read_split(student) == read_split(teacher)
    assert '"n": 60' in edgekd("evaluate", student, "--data", data, "--labels", file, "--json")
    file.write_text(
        file.read_text().replace("\n", ",test\n").replace("path,test", "path,subset").replace("test", "train", 50)
    )
    assert '"n": 10' in edgekd("evaluate", student, "--data", data, "--labels", file, "--json")
    edgekd("evaluate", student, "--labels", file, "--split", teacher, code=1)
    seen, unseen = read_split(student).subset("train")[3].path, read_split(student).subset("test")[0].path
    Image.new("RGB", (24, 24), "red").save(data / unseen)
    edgekd("distill", "--data", data, "--out", student, "--resume")  # does not read it
    edgekd("evaluate", student, "--data", data, "--subset", "val")
    edgekd("evaluate", student, "--data", data, code=1)
    Image.new("RGB", (24, 24), "blue").save(data / seen)
    edgekd("distill", "--data", data, "--out", student, "--resume", code=1)
    request = TrainRequest(command="distill", data=data, out=tmp_path / "seed0", labels=file)
    training = train_job("seed0", Protocol(), request).requests[0]
    assert isinstance(training, TrainRequest)
    assert training.labels == file
