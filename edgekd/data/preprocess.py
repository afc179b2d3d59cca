"""From an image file to the network's input, the same way in training, calibration, prediction and benchmarks."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from edgekd.errors import DataError
from edgekd.types import Array

log = logging.getLogger(__name__)
# as PILLOW_BLOCK_SIZE does it: blocks of 16 MiB are kept by malloc, for each thread, when a picture is gone
Image.core.set_block_size(64 << 20)  # type: ignore[attr-defined]
File: TypeAlias = Path | str | bytes | IO[bytes]

MIN_SIDE = 4
"""Smallest side (pixels) that is taken for a picture."""
MAX_PIXELS = 89_478_485
"""Pillow's own limit against decompression bombs; here it is an error, not a warning."""
ENOUGH = 2048
"""A picture with both sides at least twice this long is halved or quartered, but not below it on its shorter side.

At 224 pixels the network's input moves by 1 level of 255 at the most (0.14 on average) on tissue, by 2 on noise; at 512
by 2 and 5. A JPEG 2000 is decoded whole: its own reduction moves it by 8."""
MEMORY = 1 << 30
"""Bytes that all pictures which this process decodes may take at their peaks; one that takes more is refused."""
STRIP = 1 << 20
"""Pixels that are converted at a time."""
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may open a file as, whatever its name: never a program (PostScript starts Ghostscript) or a document."""
EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *("apng", "avif", "bmp", "dib", "gif", "j2c", "j2k", "jfif", "jp2", "jpc", "jpe", "jpeg", "jpf", "jpg", "jpx"),
        *("mpo", "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp"),
    )
)
"""How the name of a picture ends, in lower case."""
PROFILE_TOLERANCE = 2
"""A profile that moves no colour by more levels (of 255) counts as sRGB."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientations."""


@dataclass(frozen=True)
class Preprocess:
    """Resize, scale to 0..1, standardise. `stretch` ignores the aspect ratio, `crop` keeps it and cuts the middle."""

    image_size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    resize: Literal["stretch", "crop"] = "stretch"

    def __post_init__(self) -> None:
        if not 8 <= self.image_size <= 4096:
            raise ValueError(f"image_size: {self.image_size} is not from 8 to 4096 pixels")
        if not all(-1e3 <= m <= 1e3 for m in self.mean) or not all(1e-3 <= s <= 1e3 for s in self.std):
            raise ValueError("mean, std: of values scaled to 0..1, std above 0")

    def resized(self, image: Image.Image) -> Image.Image:
        """The RGB picture at image_size x image_size, bilinear with antialiasing."""
        size = (self.image_size, self.image_size)
        if self.resize == "crop":
            return ImageOps.fit(image, size, Image.Resampling.BILINEAR)
        return image.resize(size, Image.Resampling.BILINEAR)

    def normalised(self, pixels: npt.NDArray[np.uint8]) -> Array:
        """uint8 (..., H, W, 3) to standardised float32 (..., 3, H, W)."""
        std = np.asarray(self.std, np.float32).reshape(3, 1, 1)
        planes: Array = np.ascontiguousarray(np.moveaxis(pixels, -1, -3)) * (np.float32(1 / 255) / std)
        planes -= np.asarray(self.mean, np.float32).reshape(3, 1, 1) / std
        return planes

    def __call__(self, image: Image.Image) -> Array:
        """One picture to float32 (3, H, W)."""
        return self.normalised(np.asarray(self.resized(image)))


def open_image(source: File) -> Image.Image:
    """Decode one still picture to 8-bit sRGB, turned upright by its EXIF tag.

    Of deeper samples the upper 8 bits count, whatever the picture holds. Colours are converted by the embedded
    profile (a PNG's gamma, if it has no profile); transparency is laid over white. Where both sides are at least
    twice ENOUGH, the picture is reduced by averaging pixels, a JPEG while it is decoded.
    source: a path, the bytes of a file, or a file that is open for reading in binary.

    Raises:
        DataError: missing, empty, truncated, not an image, animated, too small or large, or of pixels whose range
            or colours are not known; the file is named.
    """
    with opened(source) as image:
        return image


@contextlib.contextmanager
def opened(source: File) -> Iterator[Image.Image]:
    """`open_image` for a block that keeps no picture: until it ends, others wait if MEMORY would be exceeded."""
    with contextlib.ExitStack() as held:
        yield _decoded(source, held)


def _decoded(source: File, held: contextlib.ExitStack) -> Image.Image:
    name = _name(source)
    try:
        if isinstance(source, (str, Path)):
            _require_file(Path(source))
        with _OPENING:  # one at a time: WebP's decoder takes half of its memory before the size is known
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())
            held.enter_context(image)
            _check(image)
            step = _reduction(image.size)
            image.draft(None, (image.width // step, image.height // step))  # only JPEG's decoder reduces
            if (peak := _peak(image)) > MEMORY:
                raise DataError(
                    f"takes {peak / (1 << 30):.1f} GiB to decode", fix="cut it into tiles, or save it as PNG"
                )
            held.enter_context(_BUDGET.hold(peak))
        return to_rgb(image)
    except DataError as error:
        raise DataError(f"{name}: {error.what}", fix=error.fix) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{name}: more than {MAX_PIXELS / 1e6:.0f} megapixels", fix="cut it into tiles") from None
    except FileNotFoundError:
        raise DataError(f"{name}: no such file", fix="check the path") from None
    except UnidentifiedImageError:
        raise DataError(f"{name}: not an image that edgekd reads", fix="remove it or convert it to PNG") from None
    except Exception as error:  # decoders raise many kinds
        raise DataError(f"{name}: cannot be decoded ({error})", fix="restore or remove it") from None


def _name(source: File) -> str:
    if isinstance(source, bytes):
        return f"picture of {len(source)} bytes"
    return str(source if isinstance(source, (str, Path)) else getattr(source, "name", "picture"))


def _require_file(path: Path) -> None:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):  # to read from a pipe or device could take for ever
        raise DataError("is a folder" if stat.S_ISDIR(mode) else "is no regular file", fix="give an image file")


@functools.cache
def _formats() -> tuple[str, ...]:
    """FORMATS, of which Pillow may have been built without some."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check(image: Image.Image) -> None:
    """Refuse what can be told from the header, before a pixel is decoded."""
    if image.width * image.height > MAX_PIXELS:  # Pillow itself only warns before twice as many
        raise Image.DecompressionBombError
    if min(image.size) < MIN_SIDE:
        width, height = image.size
        raise DataError(f"is only {width}x{height} pixels", fix="remove it")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # telephones put a second view into a JPEG
        raise DataError("has several frames or pages", fix="save the one that is meant as a picture of its own")
    if kind := _unknown_range(image):
        raise DataError(
            f"has {kind}, whose range is not known",
            fix="convert it to 8 or 16 bits a sample, black and white where they are meant to be",
        )
    if image.mode not in _BYTES:
        raise DataError(f"has pixels of mode {image.mode}, whose colours are not known", fix="convert it to RGB")
    tags = getattr(image, "tag_v2", {})
    if max(tags.get(258, (8,))) > 8 and tags.get(284) == 2 and image.info.get("compression") == "raw":
        raise DataError("has 16-bit samples in separate planes", fix="save it compressed, or pixel by pixel")
    if _raw_mode(image) == "RGB;16B" and "transparency" in image.info:
        raise DataError("has 16-bit colours and one that means transparent", fix="save it with 8 bits or as RGBA")
    primaries = image.info.get("chromaticity")
    if (
        primaries
        and not image.info.keys() & {"icc_profile", "srgb"}
        and np.abs(np.subtract(primaries, _SRGB_PRIMARIES)).max() > 0.005
    ):
        raise DataError("has primary colours other than sRGB's (cHRM)", fix="convert it to sRGB")


def _unknown_range(image: Image.Image) -> str:
    if image.mode == "F":
        return "floating-point pixels"
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        return "32-bit or signed integers"
    return "signed integers" if 2 in getattr(image, "tag_v2", {}).get(339, ()) else ""


_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2} | dict.fromkeys(
    ["CMYK", "HSV", "I", "LA", "LAB", "La", "PA", "RGB", "RGBA", "RGBX", "RGBa", "YCbCr"], 4
)
"""Bytes a pixel that Pillow holds of each mode that can be converted to RGB."""
_DECODERS = {"AVIF": 6, "JPEG2000": 16, "PPM": 8, "TIFF": 8, "WEBP": 12}
"""Bytes a pixel that a decoder holds beside Pillow's at the most, measured; others keep a few rows."""
_SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)


def _raw_mode(image: Image.Image) -> Any:
    """How samples lie in a file whose pixels are not read yet."""
    tile = getattr(image, "tile", None)
    return tile[0][3] if tile else ""


def _peak(image: Image.Image) -> int:
    """Bytes that a picture takes until it is RGB, at the most."""
    held = _BYTES[image.mode] + _DECODERS.get(image.format or "", 0) + 6 * ("progressive" in image.info)
    return image.width * image.height * held + 4 * image.width * image.height // _reduction(image.size) ** 2


class _Budget:
    """So many bytes, of which each thread takes what it needs or waits."""

    def __init__(self, size: int) -> None:
        self.free = size
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: size <= self.free)
            self.free -= size
        try:
            yield
        finally:
            with self.changed:
                self.free += size
                self.changed.notify_all()


_BUDGET = _Budget(MEMORY)
_OPENING = threading.Lock()


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image to RGB, as `open_image` does it.

    Raises:
        DataError: too small or large, animated, or of pixels whose range or colours are not known.
    """
    _check(image)
    if (levels := {"L;2": 85, "L;4": 17}.get(_raw_mode(image))) and "transparency" in image.info:
        image.info["transparency"] *= levels  # Pillow leaves it as it is in the file
    image.load()
    step = _reduction(image.size)
    rows = max(1, STRIP // image.width // step) * step
    plain = image.mode == "RGB" and not image.has_transparency_data and not _has_colour_space(image)
    if step == 1 and (plain or image.height <= rows):
        return _upright(image if plain else _converted(image, image), image)
    rgb = Image.new("RGB", (-(-image.width // step), -(-image.height // step)))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        rgb.paste(_converted(strip, image).reduce(step), (0, top // step))
    return _upright(rgb, image)


def _reduction(size: tuple[int, int]) -> int:
    """The power of two by which a picture's sides are divided."""
    return 1 << max(0, (min(size) // ENOUGH).bit_length() - 1)


def _upright(rgb: Image.Image, image: Image.Image) -> Image.Image:
    try:
        turn = TURNS.get(image.getexif()[0x0112])
    except Exception:  # none, or damaged in one of many ways: the pixels are whole
        turn = None
    return rgb if turn is None else rgb.transpose(turn)


def _converted(strip: Image.Image, image: Image.Image) -> Image.Image:
    """A strip of `image` in RGB: sRGB, over white."""
    colours, alpha = _planes(strip, image)
    rgb = _to_srgb(colours, image)
    if alpha is None:
        return rgb
    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb, mask=alpha)
    return white


def _planes(strip: Image.Image, image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours in mode L, RGB, CMYK or LAB, and how opaque they are (L)."""
    if strip.mode.startswith("I"):
        return _upper_8_bits(strip, image)
    if strip.mode == "La" or (strip.mode in ("1", "L") and strip.has_transparency_data):
        strip = strip.convert("LA")
    if strip.mode == "LA":
        return strip.getchannel("L"), strip.getchannel("A")
    if strip.has_transparency_data:
        strip = strip.convert("RGBA")
        return strip.convert("RGB"), strip.getchannel("A")
    if strip.mode in ("L", "RGB", "CMYK", "LAB"):
        return strip, None
    return strip.convert("L" if strip.mode == "1" else "RGB"), None


def _upper_8_bits(strip: Image.Image, image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    tags = getattr(image, "tag_v2", {})
    samples = np.asarray(strip)
    grey = (samples >> (tags.get(258, (16,))[0] - 8)).astype(np.uint8)
    if tags.get(262) == 0:  # TIFF's WhiteIsZero, which Pillow heeds up to 8 bits
        grey = 255 - grey
    key = image.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(samples == key, 0, 255).astype(np.uint8))
    return Image.fromarray(grey), alpha


def _has_colour_space(image: Image.Image) -> bool:
    return bool(image.info.get("icc_profile") or "gamma" in image.info)


def _to_srgb(colours: Image.Image, image: Image.Image) -> Image.Image:
    profile: Any = "LAB" if colours.mode == "LAB" else image.info.get("icc_profile")
    if profile:
        found = _transform(profile, colours.mode)
        if found.problem and found.problem not in _WARNED:
            _WARNED.add(found.problem)
            log.warning(
                "%s: %s; colours are taken as sRGB, as in every picture with this profile",
                getattr(image, "filename", "") or "a picture",
                found.problem,
            )
        if found.apply:
            return found.apply(colours.convert(found.mode))
    elif "srgb" not in image.info:
        colours = _without_gamma(colours, image.info.get("gamma"))
    return colours.convert("RGB")


@dataclass(frozen=True)
class _Transform:
    """From pixels in `mode` to sRGB; without `apply` they are sRGB already, or there is a `problem`."""

    mode: str
    apply: Callable[[Image.Image], Image.Image] | None = None
    problem: str = ""


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes | str, mode: str) -> _Transform:
    """profile: an ICC profile, or the name of one that Pillow makes. mode: of the pixels that it is embedded with."""
    try:
        known = ImageCms.createProfile("LAB") if profile == "LAB" else io.BytesIO(profile)  # type: ignore[arg-type]  # TIFF's may be anything
        source = ImageCms.ImageCmsProfile(known)
        space = source.profile.xcolor_space.strip()
        wanted = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "Lab": "LAB"}.get(space, "")
        if wanted != mode and (mode, wanted) != ("L", "RGB"):
            return _Transform(mode, problem=f"its colour profile is for {space}, its pixels are {mode}")
        apply = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), wanted, "RGB").apply
        if wanted in ("L", "RGB"):
            steps = np.arange(0, 256, 17, dtype=np.uint8)
            cube = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(256, 16, 3)
            colours = Image.fromarray(cube if wanted == "RGB" else cube[..., 0])
            moved = np.asarray(apply(colours)).astype(int) - np.asarray(colours.convert("RGB"))
            if np.abs(moved).max() <= PROFILE_TOLERANCE:
                return _Transform(wanted)
        return _Transform(wanted, apply)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError) as error:
        if mode == "LAB":
            raise
        return _Transform(mode, problem=f"its colour profile is damaged ({error})")


_WARNED: set[str] = set()


def _without_gamma(colours: Image.Image, gamma: float | None) -> Image.Image:
    """colours: of a PNG without profile, whose samples are light to the power of `gamma`."""
    if not gamma or abs(gamma - 1 / 2.2) < 0.01:
        return colours
    levels = np.rint(255 * (np.arange(256) / 255) ** (1 / (2.2 * gamma))).astype(int).tolist()
    return colours.point(levels * len(colours.getbands()))
