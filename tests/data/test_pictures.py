"""Pictures without labels: what is found, what is refused in one report, groups, and batches of constant memory."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekd.data.folders import check, scan
from edgekd.data.images import load_batch, load_batches
from edgekd.data.pictures import find_pictures, load_pictures
from edgekd.data.preprocess import Preprocess
from edgekd.data.splitting import group_keys, make_split
from edgekd.errors import ConfigError, DataError

PLAIN = Preprocess(16)


def picture(path: Path, value: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(value).integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(path)
    return path


def test_pictures_are_found_whatever_their_folders_are_called(tmp_path: Path) -> None:
    names = [
        "0.png",
        "a/1.png",
        "train/x/2.JPG",
        "train/3.bmp",
        "spä ce/ü'\"\n$(x) 名.png",
        "-/--out.png",
        "a.png/4.webp",
    ]
    for n, name in enumerate(names):
        picture(tmp_path / name, n)
    picture(tmp_path / ".hidden" / "5.png", 50)
    (tmp_path / "notes.txt").write_text("x")
    found = find_pictures(tmp_path)
    assert {p.path for p in found} == set(names)
    assert {p.group for p in found} == {""}
    assert found[0].digest == hashlib.sha256((tmp_path / found[0].path).read_bytes()).hexdigest()
    assert find_pictures(tmp_path) == found


def test_all_unusable_pictures_are_reported_at_once_or_excluded(tmp_path: Path) -> None:
    for n in range(3):
        picture(tmp_path / "a" / f"{n}.png", n)
    picture(tmp_path / "b" / "copy.bmp", 1)
    (tmp_path / "b" / "half.png").write_bytes((tmp_path / "a" / "0.png").read_bytes()[:90])
    (tmp_path / "empty.png").touch()
    (tmp_path / "model.exe").touch()
    with pytest.raises(DataError, match=r"(?s)4 files .*b/copy.bmp: duplicate of a/1.png.*half.*empty.*not an image"):
        find_pictures(tmp_path)
    assert [p.path for p in find_pictures(tmp_path, exclude_bad=True)] == ["a/0.png", "a/1.png", "a/2.png"]


def test_a_folder_without_a_usable_picture_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match=r"no (images|folder) "):
            find_pictures(folder)
    (tmp_path / "empty.png").touch()
    with pytest.raises(DataError, match="no usable image is left"):
        find_pictures(tmp_path, exclude_bad=True)
    (tmp_path / "empty.png").unlink()
    assert len(find_pictures(picture(tmp_path / "1.png", 1).parent)) == 1


def test_groups_are_those_of_the_split(tmp_path: Path) -> None:
    for n, name in enumerate(["p1/a.png", "p1/b.png", "p2/c.png", "d.png"]):
        picture(tmp_path / name, n)
    with pytest.raises(DataError, match=r"does not match 1 of 4 images: d\.png"):
        find_pictures(tmp_path, group=r"^(\w+)/")
    with pytest.raises(ConfigError, match="not a regular expression"):
        find_pictures(tmp_path, group="(")
    (tmp_path / "d.png").unlink()
    assert [p.group for p in find_pictures(tmp_path, group=r"^(\w+)/")] == ["p1", "p1", "p2"]


def test_sipakmed_in_its_original_form_gives_the_cells_and_clusters_of_its_labels(tmp_path: Path) -> None:
    for n, name in enumerate("AB"):
        inside = tmp_path / f"im_{name}" / f"im_{name}"
        picture(inside / "001.bmp", 10 * n)  # a whole cluster, of which the cells were cut
        for m in range(3):
            picture(inside / "CROPPED" / f"00{1 + m // 2}_0{1 + m % 2}.bmp", 10 * n + 1 + m)
    labelled = [i.path for i in scan(tmp_path).items]
    found = find_pictures(tmp_path, group="cluster")
    assert [p.path for p in found] == labelled
    assert [p.group for p in found] == group_keys(labelled, "cluster")
    assert {p.group for p in found} == {"A/001", "A/002", "B/001", "B/002"}
    assert [p.group for p in find_pictures(tmp_path)] == [p.group for p in found]
    assert len(find_pictures(tmp_path / "im_A")) == 3


@pytest.mark.parametrize(("name", "group"), [("sipakmed", "cluster"), ("kather2016", "slide")])
def test_groups_of_class_folders_are_the_same_with_and_without_labels(
    shared: Path, tmp_path: Path, name: str, group: str
) -> None:
    for item in scan(shared / "data" / name).items[::50]:
        (tmp_path / item.path).parent.mkdir(exist_ok=True)
        (tmp_path / item.path).symlink_to(shared / "data" / name / item.path)
    checked = check(scan(tmp_path))
    whole = {i.path: i.group for items in make_split(checked, group=group).subsets.values() for i in items}
    assert {p.path: p.group for p in find_pictures(tmp_path, group=group)} == whole
    assert len(set(whole.values())) >= 10


def test_batches_are_those_of_one_load(tmp_path: Path) -> None:
    for n in range(11):
        picture(tmp_path / f"{n:02d}.png", n)
    found = find_pictures(tmp_path)
    seen: list[tuple[int, int]] = []
    batches = list(load_pictures(tmp_path, found, PLAIN, batch=4, progress=lambda *done: seen.append(done)))
    assert [len(b) for b in batches] == [4, 4, 3]
    assert np.array_equal(np.concatenate(batches), load_batch([tmp_path / p.path for p in found], PLAIN))
    assert seen == [(4, 11), (8, 11), (11, 11)]
    (tmp_path / "09.png").unlink()
    stream = load_pictures(tmp_path, found, PLAIN, batch=4)
    next(stream), next(stream)  # the third batch is decoded in advance, but reported in its turn
    with pytest.raises(DataError, match=r"09.png: no such file"):
        next(stream)
    assert list(load_batches([], PLAIN)) == []
