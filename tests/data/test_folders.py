"""Folders of images: layouts that are understood, and every kind of bad file, on real images where that matters."""

from __future__ import annotations

import itertools
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekd.data.folders import SHOWN, Folder, check, image_files, scan
from edgekd.errors import DataError


def picture(path: Path, value: int = 0, *, mode: str = "RGB", size: tuple[int, int] = (12, 10)) -> Path:
    """A picture whose pixels differ with `value`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def two_classes(data: Path) -> Path:
    for n in range(6):
        picture(data / "ab"[n % 2] / f"{n}.png", n)
    return data


def labelled(folder: Folder) -> list[tuple[str, str, str | None]]:
    return [(item.path, folder.classes[item.label], item.subset) for item in folder.items]


def test_class_folders_and_ignored_files(tmp_path: Path) -> None:
    data = two_classes(tmp_path)
    picture(data / "b" / "slide7" / "deep.JPG", 9)
    for name in ("a/Thumbs.db", "a/0.dat", "a/.0.png", "LICENSE", "notes.txt"):
        (data / name).write_text("x")
    picture(data / ".cache" / "c.png")
    picture(data / "__MACOSX" / "a" / "0.png")
    folder = scan(data)
    assert folder.classes == ("a", "b")
    assert ("b/slide7/deep.JPG", "b", None) in labelled(folder)
    assert len(folder.items) == 7
    assert (folder.bad, folder.ignored) == ({}, 5)


def test_subsets_above_class_folders(tmp_path: Path) -> None:
    for n, subset in enumerate(("train", "Valid", "test")):
        for m, name in enumerate("ab"):
            picture(tmp_path / subset / name / "0.png", 2 * n + m)
    assert labelled(scan(tmp_path)) == [
        ("Valid/a/0.png", "a", "val"),
        ("Valid/b/0.png", "b", "val"),
        ("test/a/0.png", "a", "test"),
        ("test/b/0.png", "b", "test"),
        ("train/a/0.png", "a", "train"),
        ("train/b/0.png", "b", "train"),
    ]
    picture(tmp_path / "extra" / "0.png")
    with pytest.raises(DataError, match="extra beside"):
        scan(tmp_path)


@pytest.mark.parametrize(
    ("names", "subsets"),
    [(("training", "Validation", "TESTING"), ("train", "val", "test")), (("train", "valid", "test"), None)],
)
def test_names_of_subset_folders(tmp_path: Path, names: tuple[str, ...], subsets: tuple[str, ...] | None) -> None:
    for n, (subset, name) in enumerate(itertools.product(names, "ab")):
        picture(tmp_path / subset / name / "0.png", n)
    found = {item.path.split("/")[0]: item.subset for item in scan(tmp_path).items}
    assert found == dict(zip(names, subsets or ("train", "val", "test")))


def test_what_counts_is_the_same_in_training_and_prediction(tmp_path: Path) -> None:
    """Names of every kind: what `scan` takes in class folders is what `image_files` finds."""
    data, elsewhere = two_classes(tmp_path / "data"), tmp_path / "elsewhere"
    counted = ["1.JPG", "2.jfif", "3.avif", "4.jpe", "5.PGM", "6.pnm", "7.jp2", "8.Tiff", "9.webp", "x.png/inside.png"]
    not_counted = [".hidden.png", "._1.JPG", "Thumbs.db", "desktop.ini", "notes.txt", "png", ".png"]
    for folder in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", ".Trash-1000"):
        not_counted += [f"{folder}/1.png", f"deeper/{folder}/1.png"]
    beside = [f"{name}/a/0.png" for name in (".cache", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN")]
    for name in [*(f"a/{n}" for n in counted + not_counted), *beside]:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).touch()
    picture(elsewhere / "deep" / "far.png", 50)
    (elsewhere / "back").symlink_to(elsewhere)  # a circle
    (data / "a" / "up").symlink_to(data)  # would make all of b's images a's
    (data / "a" / "folder").symlink_to(elsewhere)
    (data / "a" / "file.png").symlink_to(elsewhere / "deep" / "far.png")
    for lost in ("lost.png", "lost", "itself"):
        (data / "a" / lost).symlink_to("itself")
    counted += ["folder/deep/far.png", "file.png", "lost.png", "lost", "itself", "0.png", "2.png", "4.png"]
    folder = scan(data)
    assert {i.path for i in folder.items if i.label == 0} == {f"a/{name}" for name in counted}
    assert (folder.classes, folder.bad) == (("a", "b"), {})
    for inside in (data, data / "a"):
        taken = {(data / i.path) for i in folder.items if (data / i.path).is_relative_to(inside)}
        found = image_files(inside)
        assert len(found) == len(set(found))
        assert set(found) == taken


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    """A split cannot hold it, so training refuses it in a form that can be printed; it can be predicted."""
    data = two_classes(tmp_path)
    odd = picture(data / "a" / os.fsdecode(b"caf\xe9.png"), 9)
    assert odd in image_files(data)
    with pytest.raises(DataError, match=r"'a/caf\\udce9\.png' .* is not UTF-8") as caught:
        scan(data)
    str(caught.value).encode()


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, scandir = two_classes(tmp_path), os.scandir
    (data / "a" / "closed").mkdir()

    def refuse(folder: str) -> object:
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)  # who runs this as root may read everything
    for ask in (scan, image_files):
        with pytest.raises(DataError, match=r"closed cannot be read \(Permission denied\)"):
            ask(data)


def test_sipakmed_in_its_published_layout(tmp_path: Path, shared: Path) -> None:
    for name in ("Dyskeratotic", "Parabasal"):
        cropped = tmp_path / f"im_{name}" / f"im_{name}" / "CROPPED"
        cropped.mkdir(parents=True)
        for file in sorted((shared / "data" / "sipakmed" / name).iterdir())[:3]:
            Image.open(file).save(cropped / f"{file.stem}.bmp")
            (cropped / f"{file.stem}_cyt.dat").write_text("1,2")
        Image.open(file).save(cropped.parent / "001.bmp")
    folder = scan(tmp_path)
    assert folder.classes == ("Dyskeratotic", "Parabasal")
    assert folder.items[0].path == "im_Dyskeratotic/im_Dyskeratotic/CROPPED/001_01.bmp"
    assert len(check(folder).folder.items) == 6


def test_real_data_sets_are_found_completely(shared: Path) -> None:
    cells, tiles = scan(shared / "data" / "sipakmed"), scan(shared / "data" / "kather2016")
    counts = np.bincount([item.label for item in cells.items])
    assert dict(zip(cells.classes, counts)) == {
        "Dyskeratotic": 813,
        "Koilocytotic": 825,
        "Metaplastic": 793,
        "Parabasal": 787,
        "Superficial-Intermediate": 831,
    }
    assert np.bincount([item.label for item in tiles.items]).tolist() == [625] * 8
    checked = check(scan(shared / "data" / "kather2016_tif"))
    assert len(checked.folder.items) == 24
    assert not checked.excluded


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([], "no folder at"),
        (["README.md"], "has no class folders"),
        (["a/0.png"], "only one class: a"),
        (["a/0.png", "b/notes.txt"], r"no images in .*/b\n"),
        (["train/a/0.png", "train/b/0.png", "test/bb/0.png"], r"(?s)unknown class 'bb' in .*Did you mean 'b'"),
    ],
)
def test_invalid_folders_are_refused(tmp_path: Path, made: list[str], message: str) -> None:
    for name in made:
        picture(tmp_path / "data" / name) if name.endswith("png") else None
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    with pytest.raises(DataError, match=message):
        scan(tmp_path / "data")


def test_classes_of_a_network(tmp_path: Path) -> None:
    data = two_classes(tmp_path)
    folder = scan(data, classes=("b", "c", "a"))
    assert {(folder.classes[i.label], i.path[0]) for i in folder.items} == {("a", "a"), ("b", "b")}
    with pytest.raises(DataError, match="unknown class 'a'"):
        scan(data, classes=("b", "c"))


def bomb(path: Path, side: int) -> None:
    """A whole PNG of side x side black one-bit pixels: small as a file, huge when decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" * (1 + side // 8)
    packer = zlib.compressobj(1)
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def test_every_kind_of_bad_file_is_named_at_once(tmp_path: Path, shared: Path) -> None:
    data = two_classes(tmp_path)
    real = (shared / "data" / "sipakmed" / "Parabasal" / "001_01.jpg").read_bytes()
    (data / "a" / "cut.jpg").write_bytes(real[: len(real) // 2])
    (data / "a" / "empty.png").touch()
    (data / "a" / "text.jpg").write_text("no picture")
    (data / "a" / "slides.pdf").write_text("%PDF")
    picture(data / "a" / "dot.png", size=(1, 1))
    bomb(data / "a" / "bomb.png", 20_000)
    bomb(data / "a" / "halfbomb.png", 12_000)
    frames = [Image.new("L", (9, 9), n) for n in (1, 99)]
    frames[0].save(data / "a" / "film.gif", save_all=True, append_images=frames[1:])
    (data / "a" / "lost.png").symlink_to("nowhere.png")
    picture(data / "loose.png", 77)
    expected = {
        "a/cut.jpg": "cannot be decoded",
        "a/empty.png": "empty",
        "a/text.jpg": "not an image",
        "a/slides.pdf": "not an image",
        "a/dot.png": "1x1",
        "a/bomb.png": "megapixels",
        "a/halfbomb.png": "megapixels",
        "a/film.gif": "several frames",
        "a/lost.png": "no such file",
        "loose.png": "in no class folder",
    }
    with pytest.raises(DataError, match=r"10 files in .* cannot be used") as caught:
        check(scan(data))
    assert "--exclude-bad" in caught.value.fix
    excluded = check(scan(data), exclude_bad=True).excluded
    assert excluded.keys() == expected.keys()
    for path, reason in expected.items():
        assert reason in excluded[path]
        assert f"{path}: {excluded[path]}" in caught.value.what


def test_unusual_but_valid_images_are_kept(tmp_path: Path) -> None:
    data = two_classes(tmp_path)
    for n, mode in enumerate(("L", "RGBA", "1", "P", "LA"), 20):
        picture(data / "a" / f"{mode}.png", n, mode=mode)
    picture(data / "a" / "CMYK.jpg", 30, mode="CMYK")
    deep = np.random.default_rng(0).integers(0, 65536, (10, 12), dtype=np.uint16)
    Image.fromarray(deep).save(data / "a" / "deep.png")
    assert len(check(scan(data)).folder.items) == 13


def test_duplicates(tmp_path: Path) -> None:
    data = two_classes(tmp_path)
    first = Image.open(data / "a" / "0.png")
    first.save(data / "a" / "again.bmp")  # other bytes, same pixels
    Image.open(data / "a" / "2.png").save(data / "b" / "other.png")
    assert check(scan(data), exclude_bad=True).excluded == {
        "a/again.bmp": "duplicate of a/0.png",
        "a/2.png": "duplicate of b/other.png, labelled b",
        "b/other.png": "duplicate of a/2.png, labelled a",
    }


def test_a_duplicate_across_subsets_stays_in_test(tmp_path: Path) -> None:
    for n, subset in enumerate(("train", "test")):
        for m, name in enumerate("ab"):
            picture(tmp_path / subset / name / "0.png", 2 * n + m)
    picture(tmp_path / "test" / "a" / "copy.png", 0)
    picture(tmp_path / "train" / "a" / "1.png", 50)
    excluded = check(scan(tmp_path), exclude_bad=True).excluded
    assert excluded == {"train/a/0.png": "duplicate of test/a/copy.png"}


def test_long_lists_are_cut_and_empty_classes_refused(tmp_path: Path) -> None:
    data = two_classes(tmp_path)
    for n in range(SHOWN + 5):
        (data / "c").mkdir(exist_ok=True)
        (data / "c" / f"{n:02d}.png").touch()
    with pytest.raises(DataError, match="and 5 more"):
        check(scan(data))
    with pytest.raises(DataError, match="no usable image is left of c"):
        check(scan(data), exclude_bad=True)


def test_fingerprint_follows_pixels_and_paths(tmp_path: Path) -> None:
    data = two_classes(tmp_path)
    steps: list[tuple[int, int]] = []
    before = check(scan(data), progress=lambda done, total: steps.append((done, total))).fingerprint
    assert steps == [(n, 6) for n in range(1, 7)]
    assert check(scan(data)).fingerprint == before
    (data / "a" / "0.png").rename(data / "a" / "9.png")
    renamed = check(scan(data)).fingerprint
    picture(data / "a" / "9.png", 99)
    assert len({before, renamed, check(scan(data)).fingerprint}) == 3
