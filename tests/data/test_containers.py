"""One picture in every container, depth, byte order, palette, profile and orientation: the same RGB comes out."""

from __future__ import annotations

import io
import itertools
import struct
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image, ImageCms

from edgekd.data import images, preprocess
from edgekd.data.preprocess import Preprocess, open_image, to_rgb
from edgekd.errors import DataError

Make = Callable[[np.ndarray], Image.Image | bytes]


def blocks(levels: int, bands: int) -> np.ndarray:
    """96 x 128 pixels in blocks of 8 x 8 (a JPEG's own), of at most 192 colours; few levels are evenly spaced."""
    drawn = np.random.default_rng(0).integers(0, levels, (12, 16, bands)) * (255 // (levels - 1))
    return drawn.repeat(8, 0).repeat(8, 1).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(samples: np.ndarray, *, kind: int, depth: int = 16, extra: bytes = b"") -> bytes:
    """samples (H, W) or (H, W, C). kind: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA. extra: chunks before the pixels."""
    height, width = samples.shape[:2]
    rows = packed(samples, depth, ">")
    raw = b"".join(b"\0" + row for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def packed(samples: np.ndarray, depth: int, order: str) -> list[bytes]:
    """Each row's samples in so many bits."""
    if depth == 16:
        return [row.astype(f"{order}u2").tobytes() for row in samples]
    flat = samples.reshape(len(samples), -1)
    bits = (flat[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    return [np.packbits(row).tobytes() for row in bits.reshape(len(samples), -1).astype(np.uint8)]


def tiff(
    samples: np.ndarray,
    *,
    kind: int,
    depth: int = 16,
    order: str = "<",
    planar: bool = False,
    tags: dict[int, tuple[str, Any]] | None = None,
    pixels: bytes | None = None,
) -> bytes:
    """samples (H, W) or (H, W, C). kind: 0 white is zero, 1 black is zero, 2 RGB. tags: number to (format, value)."""
    height, width = samples.shape[:2]
    bands = samples.shape[2] if samples.ndim == 3 else 1
    planes = [samples[..., k] for k in range(bands)] if planar else [samples]
    strips = [pixels if pixels is not None else b"".join(packed(plane, depth, order)) for plane in planes]
    starts = list(itertools.accumulate([8, *map(len, strips[:-1])]))
    found = {
        256: ("I", width),
        257: ("I", height),
        258: ("H", (depth,) * bands),
        259: ("H", 1),
        262: ("H", kind),
        273: ("I", tuple(starts)),
        277: ("H", bands),
        278: ("I", height),
        279: ("I", tuple(map(len, strips))),
        284: ("H", 2 if planar else 1),
        **(tags or {}),
    }
    data = b"".join(strips)
    data += b"\0" * (len(data) % 2)
    ids, beyond, start = b"", b"", 8 + len(data)
    end = start + 2 + 12 * len(found) + 4
    for number, (form, value) in sorted(found.items()):
        values = value if isinstance(value, (tuple, bytes)) else (value,)
        body = values if isinstance(values, bytes) else struct.pack(order + form * len(values), *values)
        code = {"B": 1, "s": 2, "H": 3, "I": 4, "d": 12}[form]
        count = len(values)
        ids += struct.pack(f"{order}HHI", number, code, count)
        if len(body) <= 4:
            ids += body.ljust(4, b"\0")
        else:
            ids += struct.pack(f"{order}I", end + len(beyond))
            beyond += body + b"\0" * (len(body) % 2)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    table = struct.pack(f"{order}H", len(found)) + ids + bytes(4)
    return magic + struct.pack(f"{order}I", start) + data + table + beyond


def icc(space: bytes, tags: dict[bytes, bytes], *, pcs: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """An ICC profile of version 2.4."""
    d50 = struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"desc": b"desc" + struct.pack(">II", 0, 2) + b"x\0" + bytes(78), b"wtpt": b"XYZ " + bytes(4) + d50, **tags}
    table, data, start = b"", b"", 132 + 12 * len(tags)
    for name, body in tags.items():
        table += name + struct.pack(">II", start + len(data), len(body))
        data += body + bytes(-len(body) % 4)
    size = start + len(data)
    head = struct.pack(">I4sI4s4s4s", size, b"", 0x02400000, kind, space, pcs) + struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
    head += b"acsp" + bytes(28) + d50 + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + data


def curve(gamma: float) -> bytes:
    return b"curv" + struct.pack(">IIH", 0, 1, round(256 * gamma))


def xyz(*values: float) -> bytes:
    return b"XYZ " + struct.pack(">I3i", 0, *(round(65536 * v) for v in values))


WIDE = icc(  # Adobe RGB (1998)
    b"RGB ",
    {
        **dict(zip((b"rTRC", b"gTRC", b"bTRC"), [curve(2.19921875)] * 3)),
        b"rXYZ": xyz(0.60974, 0.31111, 0.01947),
        b"gXYZ": xyz(0.20528, 0.62567, 0.06087),
        b"bXYZ": xyz(0.14919, 0.06322, 0.74457),
    },
)
DARK = icc(b"GRAY", {b"kTRC": curve(1.0)})
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def ink() -> bytes:
    """A CMYK profile in which full cyan is a pale green, whatever else but black is printed: L 80, a -40, b 40."""
    corners = np.full((2, 2, 2, 2, 3), (255, 128, 128))  # cyan, magenta, yellow, black; paper white
    corners[1] = (204, 88, 168)
    corners[..., 1, :] = (0, 128, 128)
    ramp = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * (k % 4 == 0) for k in range(9)))
    body = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + ramp * 4
    return icc(b"CMYK", {b"A2B0": body + corners.astype(np.uint8).tobytes() + ramp * 3}, pcs=b"Lab ", kind=b"prtr")


def in_wide(rgb: np.ndarray) -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.getOpenProfile(io.BytesIO(WIDE))
    return ImageCms.profileToProfile(Image.fromarray(rgb), *profiles, outputMode="RGB")


def with_alpha(pixels: np.ndarray, alpha: int = 255) -> np.ndarray:
    return np.concatenate([np.atleast_3d(pixels), np.full((*pixels.shape[:2], 1), alpha, pixels.dtype)], 2)


def as_palette(rgb: np.ndarray) -> Image.Image:
    image = Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE)
    assert (np.asarray(image.convert("RGB")) == rgb).all()
    return image


def rgba_palette(rgb: np.ndarray) -> Image.Image:
    image = as_palette(rgb)
    colours = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
    image.putpalette(with_alpha(colours[None])[0].tobytes(), "RGBA")
    return image


def turned(rgb: np.ndarray, orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = Image.fromarray(rgb).transpose(back.get(orientation, preprocess.TURNS.get(orientation)))  # type: ignore[arg-type]
    return saved(stored, kind, exif=exif, **({"quality": 100, "subsampling": 0} if kind == "JPEG" else {}))


DARKS = 5
"""Levels by which 8 bits in another colour space round the darkest colours; all others by 2 at the most."""
FINE = {"quality": 100, "subsampling": 0}
BACK = {"quality": 100, "subsampling": "4:4:4"}
COLOUR: dict[str, tuple[int, Make]] = {
    "png": (0, lambda a: saved(Image.fromarray(a), "PNG")),
    "png 16": (0, lambda a: png(a * np.uint16(257), kind=2)),
    "png 16, low bits": (0, lambda a: png(a * np.uint16(256) + np.uint16(200), kind=2)),
    "png rgba": (0, lambda a: saved(Image.fromarray(with_alpha(a)), "PNG")),
    "png rgba 16": (0, lambda a: png(with_alpha(a) * np.uint16(257), kind=6)),
    "png palette": (0, lambda a: saved(as_palette(a), "PNG")),
    "png palette, none transparent": (0, lambda a: saved(as_palette(a), "PNG", transparency=bytes([255] * 256))),
    "png with sRGB's profile": (0, lambda a: saved(Image.fromarray(a), "PNG", icc_profile=SRGB)),
    "png with a wide profile": (DARKS, lambda a: saved(in_wide(a), "PNG", icc_profile=WIDE)),
    "png palette with a wide profile": (
        DARKS,
        lambda a: saved(as_palette(np.asarray(in_wide(a))), "PNG", icc_profile=WIDE),
    ),
    "png rgba with a wide profile": (
        DARKS,
        lambda a: saved(Image.fromarray(with_alpha(np.asarray(in_wide(a)))), "PNG", icc_profile=WIDE),
    ),
    "png of sRGB's gamma": (0, lambda a: png(a, kind=2, depth=8, extra=chunk(b"gAMA", struct.pack(">I", 45455)))),
    "png of an old Macintosh's gamma": (
        2,
        lambda a: png(
            np.rint((a / 255) ** (2.2 / 1.8) * 65535).astype(np.uint16),
            kind=2,
            extra=chunk(b"gAMA", struct.pack(">I", 55556)),
        ),
    ),
    "bmp": (0, lambda a: saved(Image.fromarray(a), "BMP")),
    "bmp palette": (0, lambda a: saved(as_palette(a), "BMP")),
    "dib": (0, lambda a: saved(Image.fromarray(a), "DIB")),
    "gif": (0, lambda a: saved(as_palette(a), "GIF")),
    "ppm": (0, lambda a: saved(Image.fromarray(a), "PPM")),
    "ppm 16": (0, lambda a: b"P6 128 96 65535\n" + (a.astype(">u2") * 257).tobytes()),
    "ppm plain": (0, lambda a: b"P3 128 96 255\n" + b" ".join(b"%d" % v for v in a.ravel())),
    "jpeg": (2, lambda a: saved(Image.fromarray(a), "JPEG", **FINE)),
    "jpeg progressive": (2, lambda a: saved(Image.fromarray(a), "JPEG", progressive=True, **FINE)),
    "jpeg rgb": (2, lambda a: saved(Image.fromarray(a), "JPEG", keep_rgb=True, quality=100)),
    "jpeg with a wide profile": (12, lambda a: saved(in_wide(a), "JPEG", icc_profile=WIDE, **FINE)),
    "jpeg cmyk": (2, lambda a: saved(Image.fromarray(a).convert("CMYK"), "JPEG", **FINE)),
    "mpo": (
        2,
        lambda a: saved(Image.fromarray(a), "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))], **FINE),
    ),
    "jpeg 2000": (0, lambda a: saved(Image.fromarray(a), "JPEG2000")),
    "webp": (0, lambda a: saved(Image.fromarray(a), "WEBP", lossless=True)),
    "webp with a wide profile": (DARKS, lambda a: saved(in_wide(a), "WEBP", lossless=True, icc_profile=WIDE)),
    "avif": (3, lambda a: saved(Image.fromarray(a), "AVIF", **BACK)),
    "tiff": (0, lambda a: saved(Image.fromarray(a), "TIFF")),
    "tiff lzw": (0, lambda a: saved(Image.fromarray(a), "TIFF", compression="tiff_lzw")),
    "tiff deflate": (0, lambda a: saved(Image.fromarray(a), "TIFF", compression="tiff_adobe_deflate")),
    "tiff packbits": (0, lambda a: saved(Image.fromarray(a), "TIFF", compression="packbits")),
    "tiff jpeg": (2, lambda a: saved(Image.fromarray(a), "TIFF", compression="jpeg", quality=100)),
    "tiff big-endian": (0, lambda a: tiff(a, kind=2, depth=8, order=">")),
    "tiff in planes": (0, lambda a: tiff(a, kind=2, depth=8, planar=True)),
    "tiff 16": (0, lambda a: tiff(a * np.uint16(257), kind=2)),
    "tiff 16 big-endian": (0, lambda a: tiff(a * np.uint16(257), kind=2, order=">")),
    "tiff 16 deflate": (0, lambda a: deflated(a * np.uint16(257), kind=2)),
    "tiff 16 deflate big-endian": (0, lambda a: deflated(a * np.uint16(257), kind=2, order=">")),
    "tiff rgba 16": (0, lambda a: tiff(with_alpha(a) * np.uint16(257), kind=2, tags={338: ("H", 2)})),
    "tiff rgbx": (0, lambda a: tiff(with_alpha(a, 7), kind=2, depth=8, tags={338: ("H", 0)})),
    "tiff premultiplied": (0, lambda a: tiff(with_alpha(a), kind=2, depth=8, tags={338: ("H", 1)})),
    "tiff palette": (0, lambda a: saved(as_palette(a), "TIFF")),
    "tiff cmyk": (0, lambda a: saved(Image.fromarray(a).convert("CMYK"), "TIFF")),
    "tiff cmyk 16": (0, lambda a: tiff(with_alpha(255 - a, 0) * np.uint16(257), kind=5)),
    "tiff ycbcr": (3, lambda a: saved(Image.fromarray(a).convert("YCbCr"), "TIFF")),
    "tiff lab": (26, lambda a: saved(Image.fromarray(a).convert("LAB"), "TIFF")),
    "tiff with a wide profile": (DARKS, lambda a: saved(in_wide(a), "TIFF", icc_profile=WIDE)),
    "tiff 16 with a wide profile": (
        DARKS,
        lambda a: tiff(np.asarray(in_wide(a)) * np.uint16(257), kind=2, tags={34675: ("B", WIDE)}),
    ),
    **{
        f"{kind} turned {n}": (2 if kind == "JPEG" else 0, lambda a, n=n, kind=kind: turned(a, n, kind))  # type: ignore[misc]
        for kind in ("JPEG", "PNG", "TIFF")
        for n in range(2, 9)
    },
    "rgb": (0, Image.fromarray),
    "rgbx": (0, lambda a: Image.fromarray(a).convert("RGBX")),
    "rgba": (0, lambda a: Image.fromarray(with_alpha(a))),
    "rgba, premultiplied": (0, lambda a: Image.fromarray(with_alpha(a)).convert("RGBa")),
    "palette": (0, as_palette),
    "rgba palette": (0, rgba_palette),
    "palette and alpha": (0, lambda a: as_palette(a).convert("PA")),
    "cmyk": (0, lambda a: Image.fromarray(a).convert("CMYK")),
    "ycbcr": (3, lambda a: Image.fromarray(a).convert("YCbCr")),
    "hsv": (6, lambda a: Image.fromarray(a).convert("HSV")),
    "lab": (26, lambda a: Image.fromarray(a).convert("LAB")),
}


def deflated(samples: np.ndarray, *, depth: int = 16, **options: Any) -> bytes:
    raw = zlib.compress(b"".join(packed(samples, depth, options.get("order", "<"))))
    return tiff(samples, depth=depth, pixels=raw, **{**options, "tags": {259: ("H", 8), **options.get("tags", {})}})


def wide_grey(a: np.ndarray) -> np.ndarray:
    return a.astype(np.uint16) * 257


GREY: dict[str, tuple[int, Make]] = {
    "png": (16, lambda a: saved(Image.fromarray(a), "PNG")),
    "png 1": (2, lambda a: png(a // 255, kind=0, depth=1)),
    "png 2": (4, lambda a: png(a // 85, kind=0, depth=2)),
    "png 4": (16, lambda a: png(a // 17, kind=0, depth=4)),
    "png 16": (16, lambda a: png(wide_grey(a), kind=0)),
    "png alpha": (16, lambda a: saved(Image.fromarray(with_alpha(a)), "PNG")),
    "png alpha 16": (16, lambda a: png(wide_grey(with_alpha(a)), kind=4)),
    "png with a colour profile": (16, lambda a: saved(Image.fromarray(a), "PNG", icc_profile=SRGB)),
    "bmp": (16, lambda a: saved(Image.fromarray(a), "BMP")),
    "pbm": (2, lambda a: saved(Image.fromarray(a).convert("1"), "PPM")),
    "pgm": (16, lambda a: saved(Image.fromarray(a), "PPM")),
    "pgm 15": (16, lambda a: b"P5 128 96 15\n" + (a // 17).tobytes()),
    "pgm 4095": (16, lambda a: b"P5 128 96 4095\n" + (a.astype(np.uint16) // 17 * 273).astype(">u2").tobytes()),
    "pgm 16": (16, lambda a: b"P5 128 96 65535\n" + wide_grey(a).astype(">u2").tobytes()),
    "pgm 16 plain": (16, lambda a: b"P2 128 96 65535\n" + b" ".join(b"%d" % v for v in wide_grey(a).ravel())),
    "gif": (16, lambda a: saved(Image.fromarray(a), "GIF")),
    "jpeg": (16, lambda a: saved(Image.fromarray(a), "JPEG", quality=100)),
    "jpeg 2000": (16, lambda a: saved(Image.fromarray(a), "JPEG2000")),
    "jpeg 2000 16": (16, lambda a: saved(Image.fromarray(wide_grey(a)), "JPEG2000")),
    "webp": (16, lambda a: saved(Image.fromarray(a), "WEBP", lossless=True)),
    "tiff lzw": (16, lambda a: saved(Image.fromarray(a), "TIFF", compression="tiff_lzw")),
    "tiff fax": (2, lambda a: saved(Image.fromarray(a).convert("1"), "TIFF", compression="group4")),
    "tiff alpha": (16, lambda a: tiff(with_alpha(a), kind=1, depth=8, tags={338: ("H", 2)})),
    "tiff premultiplied": (16, lambda a: tiff(with_alpha(a), kind=1, depth=8, tags={338: ("H", 1)})),
    "1": (2, lambda a: Image.fromarray(a).convert("1")),
    "L": (16, Image.fromarray),
    "LA": (16, lambda a: Image.fromarray(a).convert("LA")),
    "La": (16, lambda a: Image.fromarray(a).convert("LA").convert("La")),
    **{f"I;16{k}": (16, lambda a, k=k: i16(a, f"I;16{k}")) for k in ("", "L", "B", "N")},  # type: ignore[misc]
}


for depth, kind, order, make in itertools.product((1, 2, 4, 8, 12, 16), (0, 1), "<>", (tiff, deflated)):
    if (depth, kind, order) not in [
        (12, 1, ">"),
        (12, 0, "<"),
        (12, 0, ">"),
        (16, 0, ">"),
    ]:  # Pillow opens none of these
        GREY[f"{make.__name__} {depth}, {'black' if kind else 'white'} is zero, {order}"] = (
            min(16, 1 << depth),
            lambda a, depth=depth, kind=kind, order=order, make=make: make(  # type: ignore[misc]
                deep(a if kind else 255 - a, depth), kind=kind, depth=depth, order=order
            ),
        )


def deep(a: np.ndarray, depth: int) -> np.ndarray:
    """0..255 to the whole range of so many bits."""
    return (a.astype(np.uint32) * ((1 << depth) - 1) // 255).astype(np.uint16)


def i16(a: np.ndarray, mode: str) -> Image.Image:
    return Image.frombytes(mode, a.shape[::-1], wide_grey(a).astype(">u2" if mode[-1] == "B" else "<u2").tobytes())


def rgb_of(source: Image.Image | bytes, folder: Path | None) -> np.ndarray:
    """As decoded from its bytes, and alike from a file without a telling name."""
    if isinstance(source, Image.Image):
        return np.asarray(to_rgb(source)).astype(int)
    rgb = np.asarray(open_image(source))
    if folder:
        (folder / "picture.jpg").write_bytes(source)
        assert (rgb == np.asarray(open_image(folder / "picture.jpg"))).all()
    return rgb.astype(int)


if int(PIL.__version__.partition(".")[0]) < 13:  # all that Python 3.10 can have
    UNREAD = (COLOUR.pop("tiff ycbcr")[1](blocks(256, 3)), GREY.pop("tiff premultiplied")[1](blocks(16, 1)[..., 0]))
    TIFF_TAG = range(2, 5)  # nor a tag whose count makes its value longer than the file

    @pytest.mark.parametrize("picture", UNREAD, ids=["colour", "grey"])
    def test_what_an_older_pillow_cannot_read_is_refused(picture: bytes) -> None:
        with pytest.raises(DataError, match=r"cannot be decoded|not an image"):
            open_image(picture)

else:
    TIFF_TAG = range(2, 8)  # not where a value lies: Pillow stops reading tags there


@pytest.mark.parametrize("kind", COLOUR)
def test_a_colour_picture_is_the_same_however_it_is_stored(kind: str, tmp_path: Path) -> None:
    expected = blocks(256, 3)
    tolerance, make = COLOUR[kind]
    found = rgb_of(make(expected), tmp_path)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance
    assert np.abs(found - expected).mean() <= 1.5


@pytest.mark.parametrize("kind", GREY)
def test_a_grey_picture_is_the_same_however_it_is_stored(kind: str, tmp_path: Path) -> None:
    levels, make = GREY[kind]
    expected = blocks(levels, 1)
    found = rgb_of(make(expected[..., 0]), tmp_path)
    assert found.shape == (96, 128, 3)
    assert np.abs(found - expected).max() <= (1 if kind == "jpeg" else 0)


def test_profiles_that_change_much() -> None:
    """Grey and CMYK by hand; and that the wide profile of the table is no small thing."""
    grey = saved(Image.fromarray(np.full((8, 8), 55, np.uint8)), "PNG", icc_profile=DARK)
    assert open_image(grey).getpixel((0, 0)) == (128,) * 3  # linear light: 55 / 255 is half way to white for the eye
    cmyk = Image.new("CMYK", (16, 8), (0, 0, 0, 0))
    cmyk.paste((255, 0, 255, 0), (8, 0, 16, 8))
    for kind in ("TIFF", "JPEG"):
        found = open_image(saved(cmyk, kind, icc_profile=ink(), **(FINE if kind == "JPEG" else {})))
        assert found.getpixel((0, 0)) == (255, 255, 255)
        assert np.abs(np.subtract(found.getpixel((12, 4)), (133, 217, 120))).max() <= 4  # L 80, a -40, b 40
    rgb = blocks(256, 3)
    assert np.abs(np.asarray(in_wide(rgb)).astype(int) - rgb).max() > 30


@pytest.mark.parametrize(
    ("profile", "problem"), [(b"no profile", "is damaged"), (DARK, "is for GRAY"), (SRGB[:200], "is damaged")]
)
def test_an_unusable_profile_is_warned_about_once(
    profile: bytes, problem: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "_WARNED", set())
    expected = blocks(256, 3)
    for _ in range(2):
        found = open_image(saved(Image.fromarray(expected), "PNG", icc_profile=profile))
        assert (np.asarray(found) == expected).all()
    assert len(caplog.messages) == 1
    assert problem in caplog.text


def test_every_mode_is_converted_or_refused_by_name() -> None:
    for mode in Image.MODES:
        image = Image.new(mode, (8, 8))
        if mode in ("I", "F"):
            with pytest.raises(DataError, match="whose range is unknown"):
                to_rgb(image)
        else:
            assert to_rgb(image).mode == "RGB"


WHOLE = np.full((8, 8), 300)
REFUSED = {
    "float": (lambda: tiff(WHOLE, kind=1, depth=32, pixels=bytes(256), tags={339: ("H", 3)}), "floating-point"),
    "32 bits": (lambda: tiff(WHOLE, kind=1, depth=32, pixels=bytes(256)), "32-bit or signed integers"),
    "signed 8": (lambda: tiff(WHOLE % 256, kind=1, depth=8, tags={339: ("H", 2)}), "signed integers"),
    "signed 16": (lambda: tiff(WHOLE, kind=1, tags={339: ("H", 2)}), "signed integers"),
    "float map": (lambda: saved(Image.new("F", (8, 8)), "PPM"), "floating-point"),
    "planes of 16 bits": (lambda: tiff(np.dstack([WHOLE] * 3), kind=2, planar=True), "separate planes"),
    "16-bit colour that is transparent": (
        lambda: png(np.dstack([WHOLE] * 3), kind=2, extra=chunk(b"tRNS", bytes(6))),
        "marked as transparent",
    ),
    "other primaries": (
        lambda: png(np.dstack([WHOLE] * 3), kind=2, extra=chunk(b"cHRM", struct.pack(">8I", *range(8)))),
        "primaries other than",
    ),
    "animated PNG": (lambda: animated("PNG"), "several frames"),
    "animated GIF": (lambda: animated("GIF"), "several frames"),
    "animated WebP": (lambda: animated("WEBP"), "several frames"),
    "animated AVIF": (lambda: animated("AVIF"), "several frames"),
    "pages": (lambda: animated("TIFF"), "several frames"),
}


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (16, 16), (90 * n,) * 3) for n in range(2)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("kind", REFUSED)
def test_ambiguous_images_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    path = tmp_path / "odd.tif"
    path.write_bytes(make())
    with pytest.raises(DataError, match=rf"odd\.tif: has .*{message}") as caught:
        open_image(path)
    assert caught.value.fix


def test_conversion_is_independent_of_other_pixels() -> None:
    """A dark 16-bit picture is dark: nothing is scaled by what the picture holds."""
    dark, light = np.full((8, 8), 200, np.uint16), np.full((8, 8), 200, np.uint16)
    light[7, 7] = 65535
    for order in "<>":
        corner = [open_image(tiff(a, kind=1, order=order)).getpixel((0, 0)) for a in (dark, light)]
        assert corner == [(0, 0, 0)] * 2


@pytest.mark.parametrize(
    ("depth", "make"),
    [(d, m) for d in (1, 2, 4, 8, 16) for m in ("one grey", "alpha")] + [(8, "one colour"), (8, "palette")],
)
def test_transparency_is_laid_over_white_in_every_depth(depth: int, make: str) -> None:
    top = (1 << depth) - 1
    samples = np.full((8, 8), 0)
    samples[:, 4:] = 1
    if make == "one grey":
        found = open_image(png(samples, kind=0, depth=depth, extra=chunk(b"tRNS", struct.pack(">H", 1))))
        assert found.getpixel((7, 0)) == (255, 255, 255)
    elif make == "one colour":
        found = open_image(
            png(np.dstack([samples] * 3), kind=2, depth=8, extra=chunk(b"tRNS", struct.pack(">3H", 1, 1, 1)))
        )
        assert found.getpixel((7, 0)) == (255, 255, 255)
    elif make == "palette":
        found = open_image(
            saved(as_palette(np.dstack([samples] * 3).astype(np.uint8)), "PNG", transparency=b"\xff\x33")
        )
        assert {found.getpixel((0, 0)), found.getpixel((7, 0))} in ({(0,) * 3, (204,) * 3}, {(1,) * 3, (204,) * 3})
    elif depth >= 8:
        found = open_image(png(np.dstack([samples * 0, samples * top // 5]), kind=4, depth=depth))
        assert (found.getpixel((0, 0)), found.getpixel((7, 0))) == ((255,) * 3, (204,) * 3)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_mistyped_exif_tag_is_ignored(kind: str) -> None:
    """Each byte of the tags in turn, set to what it should not be."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 1, "a cell", 72.0
    exif.get_ifd(0x8769)[0x9000] = b"0232"
    plain = blocks(256, 3)[:16, :16]
    options = FINE if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = saved(Image.fromarray(plain), kind, exif=exif, **options)
    whole = np.asarray(open_image(data)).astype(int)
    assert np.abs(whole - plain).max() <= 2
    if kind == "TIFF":  # its own tags are the EXIF tags: those that say how the pixels lie are not tried
        start = struct.unpack("<I", data[4:8])[0]
        count = struct.unpack("<H", data[start : start + 2])[0]
        places = [start + 2 + 12 * n for n in range(count)]
        own = [p for p in places if struct.unpack("<H", data[p : p + 2])[0] in exif]
        tried = [p + k for p in own for k in TIFF_TAG]
    else:
        start = data.index(b"MM\0*" if b"MM\0*" in data else b"II*\0")
        tried = [start + n for n in range(8, 8 + 2 + 12 * 4)]
    assert len(tried) >= 3 * len(TIFF_TAG)
    for at in tried:
        for value in (0, 2, 5, 7, 11, 200):
            broken = data[:at] + bytes([value]) + data[at + 1 :]
            if kind == "PNG":
                place = broken.index(b"eXIf")
                size = struct.unpack(">I", broken[place - 4 : place])[0]
                crc = struct.pack(">I", zlib.crc32(broken[place : place + 4 + size]))
                broken = broken[: place + 4 + size] + crc + broken[place + 8 + size :]
            found = np.asarray(open_image(broken)).astype(int)
            assert sorted(found.ravel()) == sorted(whole.ravel())  # turned at the most


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was started"))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
    for name in ("cell.jpg", "cell.eps"):
        (tmp_path / name).write_bytes(script)
        with pytest.raises(DataError, match="not an image"):
            open_image(tmp_path / name)


def test_a_large_picture_is_reduced_alike_in_every_container(monkeypatch: pytest.MonkeyPatch, shared: Path) -> None:
    """Its sides by a power of two; the network's input moves by 2 of 255 levels at the most, as ENOUGH says."""
    tiles = sorted((shared / "data" / "kather2016").glob("*/*"))[::500]
    rgb = np.concatenate([np.concatenate([np.asarray(open_image(t)) for t in tiles[k : k + 5]], 1) for k in (0, 5)], 0)
    whole = Image.fromarray(rgb)
    kinds: dict[str, dict[str, Any]] = {"PNG": {}, "JPEG": FINE, "TIFF": {"compression": "tiff_lzw"}}
    full = {kind: open_image(saved(whole, kind, **options)) for kind, options in kinds.items()}
    monkeypatch.setattr(preprocess, "ENOUGH", 128)
    monkeypatch.setattr(preprocess, "STRIP", 1 << 14)
    network = Preprocess(16)
    for kind, options in kinds.items():
        reduced = open_image(saved(whole, kind, **options))
        assert full[kind].size == (750, 300)
        assert reduced.size == (375, 150)
        moved = np.asarray(network.resized(reduced)).astype(int) - np.asarray(network.resized(full[kind]))
        assert np.abs(moved).max() <= 2
    assert open_image(saved(whole.rotate(90, expand=True), "PNG")).size == (150, 375)
    assert open_image(saved(whole.crop((0, 0, 750, 255)), "PNG")).size == (750, 255)


def test_conversion_in_strips_equals_conversion_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    makes = [make for _, make in COLOUR.values()] + [make for levels, make in GREY.values() if levels == 16]
    colour, grey = blocks(256, 3), blocks(16, 1)[..., 0]
    pictures = [make(colour if n < len(COLOUR) else grey) for n, make in enumerate(makes)]
    whole = [rgb_of(one, None) for one in pictures]
    monkeypatch.setattr(preprocess, "STRIP", 1000)
    for one, expected in zip(pictures, whole):
        assert (rgb_of(one, None) == expected).all()


def test_concurrent_decoding_shares_one_memory_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each takes 40 % of the memory: of eight threads two work at a time; a larger one than all of it is refused."""
    path, inside, most = tmp_path / "cell.png", [], []
    path.write_bytes(saved(Image.fromarray(blocks(256, 3)), "PNG"))
    size = preprocess._peak(Image.open(path))

    def watched(self: Preprocess, image: Image.Image) -> np.ndarray:
        inside.append(image)
        time.sleep(0.005)
        most.append(len(inside))
        inside.pop()
        return np.zeros((3, 8, 8), np.float32)

    monkeypatch.setattr(Preprocess, "__call__", watched)
    monkeypatch.setattr(images, "default_threads", lambda: 8)
    monkeypatch.setattr(preprocess, "_BUDGET", preprocess._Budget(size * 5 // 2))
    images.load_batch([path] * 30, Preprocess(8))
    assert max(most) == 2
    monkeypatch.setattr(preprocess, "MEMORY", size - 1)
    with pytest.raises(DataError, match=r"cell\.png: takes .* GiB to decode"):
        open_image(path)


def test_pictures_are_decoded_by_no_more_threads_than_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()

    def watched(self: Preprocess, image: Image.Image) -> np.ndarray:
        names.add(threading.current_thread().name)
        time.sleep(0.002)
        return np.zeros((3, 8, 8), np.float32)

    monkeypatch.setattr(Preprocess, "__call__", watched)
    monkeypatch.setattr(images, "default_threads", lambda: 3)
    images.load_batch([saved(Image.fromarray(blocks(256, 3)), "PNG")] * 30, Preprocess(8))
    assert len(names) == 3
