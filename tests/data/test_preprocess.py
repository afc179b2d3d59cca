"""Image files of every kind to the network's input; files that cannot be used are named."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekd.data.images import load, load_batch, load_subset
from edgekd.data.preprocess import Preprocess, open_image
from edgekd.data.split import Item, Split
from edgekd.errors import ArtifactError, DataError
from edgekd.files import sha256

PLAIN = Preprocess(8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def pixel(path: Path) -> tuple[int, ...]:
    image = open_image(path)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))  # type: ignore[return-value]


def test_normalised_by_hand() -> None:
    preprocess = Preprocess(8, mean=(0.5, 0.0, 0.2), std=(0.5, 1.0, 0.1))
    found = preprocess.normalised(np.array([[[255, 51, 102]]], np.uint8))
    assert found.shape == (3, 1, 1)
    assert found.dtype == np.float32
    assert found.ravel() == pytest.approx([1.0, 0.2, 2.0])


@pytest.mark.parametrize(("resize", "left"), [("stretch", 0), ("crop", 100)])
def test_stretch_and_crop(resize: str, left: int) -> None:
    pixels = np.zeros((64, 192, 3), np.uint8)  # black, grey in the middle third, black
    pixels[:, 64:128] = 100
    found = Preprocess(16, resize=resize).resized(Image.fromarray(pixels))  # type: ignore[arg-type]
    assert found.size == (16, 16)
    assert found.getpixel((1, 8)) == (left, left, left)
    assert found.getpixel((8, 8)) == (100, 100, 100)


def test_resizing_averages_every_pixel() -> None:
    checks = np.indices((64, 64)).sum(axis=0) % 2 * 255
    assert np.ptp(PLAIN(Image.fromarray(checks.astype(np.uint8)).convert("RGB"))[:, 2:-2, 2:-2]) < 0.05


def test_grey_palette_and_cmyk(tmp_path: Path) -> None:
    assert pixel(saved(Image.new("L", (8, 8), 77), tmp_path / "grey.png")) == (77, 77, 77)
    assert pixel(saved(Image.new("1", (8, 8), 1), tmp_path / "bit.png")) == (255, 255, 255)
    red = Image.new("RGB", (8, 8), (250, 10, 10)).quantize(4)
    assert pixel(saved(red, tmp_path / "palette.png")) == (250, 10, 10)
    cyan = pixel(saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), tmp_path / "cmyk.tif"))
    assert cyan == (0, 255, 255)
    assert (
        np.abs(np.subtract(pixel(saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), tmp_path / "c.jpg")), cyan)).max() < 9
    )


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    assert pixel(saved(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), tmp_path / "clear.png")) == (255, 255, 255)
    assert pixel(saved(Image.new("RGBA", (8, 8), (0, 0, 0, 51)), tmp_path / "fifth.png")) == (204, 204, 204)
    assert pixel(saved(Image.new("LA", (8, 8), (0, 0)), tmp_path / "la.png")) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([9, 9, 9])
    assert pixel(saved(palette, tmp_path / "p.png", transparency=0)) == (255, 255, 255)
    assert pixel(saved(Image.new("RGB", (8, 8), (1, 2, 3)), tmp_path / "key.png", transparency=(1, 2, 3))) == (255,) * 3


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (65535, 255), (32768, 128), (256, 1), (255, 0)])
def test_16_bit_is_scaled_by_its_range(value: int, expected: int, tmp_path: Path) -> None:
    image = Image.fromarray(np.full((8, 8), value, np.uint16))
    assert pixel(saved(image, tmp_path / "deep.png")) == (expected,) * 3
    assert pixel(saved(image, tmp_path / "deep.tif")) == (expected,) * 3


def test_16_bit_colour_png(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + struct.pack(">3H", 65535, 32768, 0) * 8 for _ in range(8))
    path = tmp_path / "colour.png"
    path.write_bytes(png(8, 8, depth=16, kind=2, rows=rows))
    assert np.abs(np.subtract(pixel(path), (255, 128, 0))).max() <= 1


def test_exif_turns_the_picture_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), "blue")
    image.paste("red", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees to the left
    upright = open_image(saved(image, tmp_path / "turned.png", exif=exif))
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2)) == (255, 0, 0)


def png(width: int, height: int, *, depth: int = 8, kind: int = 0, rows: bytes = b"") -> bytes:
    """A PNG by hand: greyscale (kind 0) or RGB (2)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def write_bad(kind: str, path: Path) -> Path:
    good = path.with_name("good.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(good)
    content = {
        "empty": b"",
        "text": b"not a picture\n",
        "truncated": good.read_bytes()[:2000],
        "header only": good.read_bytes()[:40],
        "bomb": png(20_000, 20_000),
        "huge bomb": png(100_000, 100_000),
        "one pixel": png(1, 1, rows=b"\0\0"),
        "flipped bits": good.read_bytes()[:500] + bytes(100) + good.read_bytes()[600:],
    }
    if kind == "animated":
        frames = [Image.new("L", (8, 8), 90 * i) for i in range(3)]
        frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])
    elif kind == "pages":
        Image.new("L", (8, 8)).save(path, "TIFF", save_all=True, append_images=[Image.new("L", (8, 8))])
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(content[kind])
    return path


BAD = {
    "empty": "not an image",
    "text": "not an image",
    "truncated": "cannot be decoded",
    "header only": "not an image",
    "flipped bits": "cannot be decoded",
    "bomb": "megapixels",
    "huge bomb": "megapixels",
    "one pixel": "only 1x1 pixels",
    "animated": "several frames",
    "pages": "several frames",
    "folder": "is a folder",
    "missing": "no such file",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named(kind: str, tmp_path: Path) -> None:
    path = write_bad(kind, tmp_path / "bad cell.png")
    with pytest.raises(DataError, match=BAD[kind]) as error:
        open_image(path)
    assert str(path) in error.value.what
    assert error.value.fix
    with pytest.raises(DataError, match="bad cell"):
        load_batch([tmp_path / "good.png", path], PLAIN) if kind != "missing" else load_batch([path], PLAIN)


def test_truncated_jpeg(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(Image.fromarray(noise), tmp_path / "cut.jpg")
    path.write_bytes(path.read_bytes()[:-800])
    with pytest.raises(DataError, match=r"cut\.jpg: cannot be decoded"):
        open_image(path)


def test_load_takes_paths_pictures_and_arrays(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    path = saved(Image.fromarray(pixels), tmp_path / "a.png")
    expected = PLAIN(Image.fromarray(pixels))
    for source in (path, str(path), Image.fromarray(pixels), pixels):
        assert np.array_equal(load(source, PLAIN), expected)
    assert load(pixels[..., 0], PLAIN).shape == (3, 8, 8)


@pytest.mark.parametrize(
    "source",
    [np.zeros((8, 8, 3), np.float32), np.zeros((2, 8, 8, 3), np.uint8), np.zeros((0, 8, 3), np.uint8), 7, None],
)
def test_load_refuses_what_is_not_an_image(source: object) -> None:
    with pytest.raises(DataError, match="not an image"):
        load(source, PLAIN)  # type: ignore[arg-type]


def make_split(folder: Path, count: int) -> Split:
    for i in range(count):
        Image.new("L", (8, 8), i).save(folder / f"{i}.png")
    items = tuple(Item(f"{i}.png", i % 3, digest=sha256(folder / f"{i}.png")) for i in range(count))
    return Split(("a", "b", "c"), {"val": items}, "ratio", 0, "none", 0, 0, "")


def test_load_subset_keeps_the_order(tmp_path: Path) -> None:
    split, seen = make_split(tmp_path, 40), []
    images, labels = load_subset(
        split, "val", data=tmp_path, preprocess=PLAIN, progress=lambda done, total: seen.append((done, total))
    )
    assert images.shape == (40, 3, 8, 8)
    assert images[:, 0, 0, 0] * 255 == pytest.approx(np.arange(40), abs=1e-4)
    assert labels.tolist() == [i % 3 for i in range(40)]
    assert seen == [(i, 40) for i in range(1, 41)]


def test_load_subset_spreads_the_limit(tmp_path: Path) -> None:
    images, _ = load_subset(make_split(tmp_path, 10), "val", data=tmp_path, preprocess=PLAIN, limit=4)
    assert (images[:, 0, 0, 0] * 255).round().tolist() == [0, 2, 5, 7]
    assert len(load_subset(make_split(tmp_path, 10), "val", data=tmp_path, preprocess=PLAIN, limit=99)[0]) == 10


def test_load_subset_names_missing_files(tmp_path: Path) -> None:
    split = make_split(tmp_path, 10)
    for i in (1, 4, 5, 8):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(DataError, match=r"lacks 4 of the split's 10 val images: 1\.png, 4\.png, 5\.png, …"):
        load_subset(split, "val", data=tmp_path, preprocess=PLAIN)
    with pytest.raises(ArtifactError, match="no test images"):
        load_subset(split, "test", data=tmp_path, preprocess=PLAIN)


@pytest.mark.parametrize("change", ["other pixels", "cut short", "one bit", "another file"])
def test_load_subset_names_changed_files(change: str, tmp_path: Path) -> None:
    split, path = make_split(tmp_path, 10), tmp_path / "7.png"
    data = path.read_bytes()
    if change == "other pixels":
        Image.new("L", (8, 8), 200).save(path)
    elif change == "another file":
        path.unlink()
        path.symlink_to("8.png")
    else:
        path.write_bytes(data[:-5] if change == "cut short" else data[:40] + bytes([data[40] ^ 1]) + data[41:])
    with pytest.raises(DataError, match=r"other images than the split: 1 of the split's 10 val images: 7\.png"):
        load_subset(split, "val", data=tmp_path, preprocess=PLAIN)
    load_subset(split, "val", data=tmp_path, preprocess=PLAIN, limit=3)  # does not read it


def test_real_cells(shared: Path) -> None:
    paths = sorted((shared / "data" / "sipakmed" / "Parabasal").iterdir())[:40]
    batch = load_batch(paths, Preprocess(64))
    assert np.array_equal(batch[17], Preprocess(64)(open_image(paths[17])))
    assert -2.2 < batch.min() < batch.mean() < batch.max() < 2.7
