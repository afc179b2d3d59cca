"""Preprocessing from image file to network input, shared by training, calibration, prediction and benchmarks."""

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
from PIL import Image, ImageCms, UnidentifiedImageError

from edgekd.errors import DataError
from edgekd.types import Array

log = logging.getLogger(__name__)
# like PILLOW_BLOCK_SIZE: malloc keeps freed blocks of 16 MiB, for each thread
Image.core.set_block_size(64 << 20)  # type: ignore[attr-defined]
File: TypeAlias = Path | str | bytes | IO[bytes]

MIN_SIDE = 4
"""Smallest accepted side in pixels."""
MAX_PIXELS = 89_478_485
"""Pillow's limit against decompression bombs; an error here, not a warning."""
ENOUGH = 2048
"""Images with both sides at least twice this size are reduced by a power of two, their shorter side to no less.

With an image size of 224, the network's input changes by at most 1 level of 255 (0.14 on average) on tissue and 2 on
noise; with 512, by 2 and 5. JPEG 2000 is decoded in full: its own reduction changes the input by 8."""
MEMORY = 1 << 30
"""Peak memory in bytes for all images that the process is decoding; an image that needs more is refused."""
STRIP = 1 << 20
"""Number of pixels converted at a time."""
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that Pillow may open, whatever the file's name: no programs (PostScript starts Ghostscript), no documents."""
EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *("apng", "avif", "bmp", "dib", "gif", "j2c", "j2k", "jfif", "jp2", "jpc", "jpe", "jpeg", "jpf", "jpg", "jpx"),
        *("mpo", "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp"),
    )
)
"""Suffixes of image files, in lower case."""
PROFILE_TOLERANCE = 2
"""A profile that changes no colour by more than this many levels of 255 counts as sRGB."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transpositions by EXIF orientation."""


Interpolation: TypeAlias = Literal["bilinear", "bicubic", "lanczos", "nearest", "box", "hamming"]
Resize: TypeAlias = Literal["stretch", "crop", "shorter", "pad"]
Channels: TypeAlias = Literal["rgb", "bgr", "grey"]


@dataclass(frozen=True)
class Preprocess:
    """Resizing, scaling and standardisation, as the libraries of trained classifiers do them.

    Pixels 0..255 become `(pixel * scale - mean) / std`.

    Attributes:
        image_size: Side of the square input in pixels.
        mean: Mean of each plane, in the order of `channels`, of scaled values.
        std: Standard deviation of each plane.
        resize: How the image is brought to the input size. `stretch` ignores the aspect ratio. The others keep it:
            `crop` resizes the largest central square; `shorter` resizes the shorter side to `resize_size` (torchvision,
            Hugging Face, timm's crop mode `center`), `pad` the longer side, with borders of the colour that becomes 0
            (timm's `border`).
        resize_size: Side in pixels that the image is resized to before its centre of `image_size` is taken; default:
            `image_size`. With `stretch` both sides (timm's `squash`); `crop` has none.
        interpolation: Pillow's filter.
        antialias: Average all pixels that an output pixel covers, as Pillow, torchvision and timm do. Without it,
            `bilinear` reads 4 pixels, as TensorFlow, Keras and OpenCV (PaddlePaddle) do.
        scale: Factor on pixels 0..255.
        centre: Rounding of the position of the centre: `round` to the nearest (torchvision, timm), or `floor` (Hugging
            Face).
        channels: Order of the planes. `grey` repeats the luminance of Pillow's mode L in all three.
    """

    image_size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    resize: Resize = "stretch"
    resize_size: int | None = None
    interpolation: Interpolation = "bilinear"
    antialias: bool = True
    centre: Literal["round", "floor"] = "round"
    scale: float = 1 / 255
    channels: Channels = "rgb"

    def __post_init__(self) -> None:
        if not 8 <= self.image_size <= 4096:
            raise ValueError(f"image_size: {self.image_size} is not in 8..4096")
        if not all(-1e3 <= m <= 1e3 for m in self.mean) or not all(1e-3 <= s <= 1e3 for s in self.std):
            raise ValueError("mean, std: must be those of scaled values, with std above 0")
        if not 1e-6 <= self.scale <= 1e3:
            raise ValueError("scale: a factor on pixels 0..255, such as 1/255")
        if self.resize_size is not None and not self.image_size <= self.resize_size <= 8192:
            raise ValueError(f"resize_size: {self.resize_size} is not in image_size..8192")
        if self.resize_size is not None and self.resize == "crop":
            raise ValueError("resize_size: resize = crop has none; use shorter")
        if not self.antialias and self.interpolation not in ("nearest", "bilinear"):
            raise ValueError(f"antialias: {self.interpolation} has no form without it here")

    @property
    def fill(self) -> tuple[int, ...]:
        """The colour (R, G, B) that becomes 0, as closely as 8 bits allow."""
        levels = tuple(min(255, max(0, round(m / self.scale))) for m in self.mean)
        return levels[::-1] if self.channels == "bgr" else levels

    def converted(self, image: Image.Image) -> Image.Image:
        """Return an RGB image as it is, or its luminance in RGB if the network takes grey images."""
        return image.convert("L").convert("RGB") if self.channels == "grey" else image

    def resampled(
        self, image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
    ) -> Image.Image:
        """Resize a region (left, top, right, bottom) of an image, by default all of it, to a size in pixels."""
        if self.antialias or self.interpolation == "nearest":
            return image.resize(size, Image.Resampling[self.interpolation.upper()], box)
        left, top, right, bottom = box or (0, 0, *image.size)
        pixels = np.asarray(image, np.float32)
        for axis, count, start, end in ((0, size[1], top, bottom), (1, size[0], left, right)):
            at = start + (np.arange(count) + 0.5) * ((end - start) / count) - 0.5
            low, last = np.floor(at).astype(int), pixels.shape[axis] - 1
            before, after = (pixels.take(i.clip(0, last), axis) for i in (low, low + 1))
            weight = (at - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
            pixels = before + (after - before) * weight
        return Image.fromarray(np.rint(pixels).astype(np.uint8))

    def resized(self, image: Image.Image) -> Image.Image:
        """Resize an RGB image to the input size."""
        image, size = self.converted(image), self.resize_size or self.image_size
        width, height = image.size
        if self.resize == "crop":
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            return self.resampled(image, (size, size), (left, top, left + side, top + side))
        if self.resize == "shorter":  # rounded down, as torchvision does
            wide = width > height
            size_ = (int(size * width / height), size) if wide else (size, int(size * height / width))
            return self._central(self.resampled(image, size_))
        if self.resize == "pad":  # rounded, as timm does
            ratio = max(width / size, height / size)
            return self._central(self.resampled(image, (round(width / ratio), round(height / ratio))))
        return self._central(self.resampled(image, (size, size)))

    def _central(self, image: Image.Image) -> Image.Image:
        """Take the centre of the input size, with borders where the image is smaller."""
        side = self.image_size
        if image.size == (side, side):
            return image
        missing = [max(0, side - length) for length in image.size]
        if any(missing):
            framed = Image.new("RGB", (image.width + missing[0], image.height + missing[1]), self.fill)
            framed.paste(image, (missing[0] // 2, missing[1] // 2))
            image = framed
        left, top = (
            ((length - side) // 2 if self.centre == "floor" else round((length - side) / 2)) for length in image.size
        )
        return image.crop((left, top, left + side, top + side))

    def normalised(self, pixels: npt.NDArray[np.uint8]) -> Array:
        """Convert uint8 (..., H, W, 3) to standardised float32 (..., 3, H, W)."""
        std = np.asarray(self.std, np.float32).reshape(3, 1, 1)
        pixels = pixels[..., ::-1] if self.channels == "bgr" else pixels
        planes: Array = np.ascontiguousarray(np.moveaxis(pixels, -1, -3)) * (np.float32(self.scale) / std)
        planes -= np.asarray(self.mean, np.float32).reshape(3, 1, 1) / std
        return planes

    def __call__(self, image: Image.Image) -> Array:
        """Convert an RGB image to float32 (3, H, W)."""
        return self.normalised(np.asarray(self.resized(image)))


def open_image(source: File) -> Image.Image:
    """Decode a still image to 8-bit sRGB, with the orientation of its EXIF tag applied.

    Of deeper samples, the upper 8 bits are used. Colours are converted by the embedded profile (or a PNG's gamma, if it
    has no profile); transparent pixels are blended with white. An image with both sides at least twice ENOUGH is
    reduced by averaging pixels, a JPEG during decoding.

    Args:
        source: A path, the bytes of a file, or a file opened for reading in binary mode.

    Returns:
        The image, of mode RGB.

    Raises:
        DataError: A file that is missing, empty, truncated, not an image, animated, too small or too large, or whose
            pixels have an unknown range or colours; the file is named.
    """
    with opened(source) as image:
        return image


@contextlib.contextmanager
def opened(source: File) -> Iterator[Image.Image]:
    """Open like `open_image` for the duration of a block; other threads wait if they would exceed MEMORY."""
    with contextlib.ExitStack() as held:
        yield _decoded(source, held)


def _decoded(source: File, held: contextlib.ExitStack) -> Image.Image:
    name = _name(source)
    try:
        if isinstance(source, (str, Path)):
            _require_file(Path(source))
        with _OPENING:  # one at a time: WebP's decoder allocates half of its memory before the size is known
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())
            held.enter_context(image)
            _check(image)
            step = _reduction(image.size)
            image.draft(None, (image.width // step, image.height // step))  # only the JPEG decoder can reduce
            if (peak := _peak(image)) > MEMORY:
                raise DataError(
                    f"takes {peak / (1 << 30):.1f} GiB to decode", fix="split it into tiles, or save it as PNG"
                )
            held.enter_context(_BUDGET.hold(peak))
        return to_rgb(image)
    except DataError as error:
        raise DataError(f"{name}: {error.what}", fix=error.fix) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{name}: more than {MAX_PIXELS / 1e6:.0f} megapixels", fix="split it into tiles") from None
    except FileNotFoundError:
        raise DataError(f"{name}: no such file", fix="check the path") from None
    except UnidentifiedImageError:
        raise DataError(f"{name}: not an image in a supported format", fix="remove it or convert it to PNG") from None
    except Exception as error:  # decoders raise many types
        raise DataError(f"{name}: cannot be decoded ({error})", fix="restore or remove it") from None


def _name(source: File) -> str:
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    return str(source if isinstance(source, (str, Path)) else getattr(source, "name", "image"))


def _require_file(path: Path) -> None:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):  # reading from a pipe or device might block forever
        raise DataError("is a folder" if stat.S_ISDIR(mode) else "is not a regular file", fix="give an image file")


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return the FORMATS that this build of Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check(image: Image.Image) -> None:
    """Refuse unusable images by their header, before any pixel is decoded."""
    if image.width * image.height > MAX_PIXELS:  # Pillow itself only warns up to twice this number
        raise Image.DecompressionBombError
    if min(image.size) < MIN_SIDE:
        width, height = image.size
        raise DataError(f"is only {width}x{height} pixels", fix="remove it")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # phones store a second view in a JPEG
        raise DataError("has several frames or pages", fix="save the intended one as an image of its own")
    if kind := _unknown_range(image):
        raise DataError(
            f"has {kind}, whose range is unknown",
            fix="convert it to 8 or 16 bits per sample, scaled to the full range",
        )
    if image.mode not in _BYTES:
        raise DataError(f"has pixels of mode {image.mode}, whose colours are unknown", fix="convert it to RGB")
    tags = getattr(image, "tag_v2", {})
    if max(tags.get(258, (8,))) > 8 and tags.get(284) == 2 and image.info.get("compression") == "raw":
        raise DataError("has 16-bit samples in separate planes", fix="save it compressed, or with interleaved samples")
    if _raw_mode(image) == "RGB;16B" and "transparency" in image.info:
        raise DataError("has 16-bit colours, one of them marked as transparent", fix="save it with 8 bits or as RGBA")
    primaries = image.info.get("chromaticity")
    if (
        primaries
        and not image.info.keys() & {"icc_profile", "srgb"}
        and np.abs(np.subtract(primaries, _SRGB_PRIMARIES)).max() > 0.005
    ):
        raise DataError("has primaries other than sRGB's (cHRM)", fix="convert it to sRGB")


def _unknown_range(image: Image.Image) -> str:
    if image.mode == "F":
        return "floating-point pixels"
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        return "32-bit or signed integers"
    return "signed integers" if 2 in getattr(image, "tag_v2", {}).get(339, ()) else ""


_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2} | dict.fromkeys(
    ["CMYK", "HSV", "I", "LA", "LAB", "La", "PA", "RGB", "RGBA", "RGBX", "RGBa", "YCbCr"], 4
)
"""Bytes per pixel in Pillow's memory, for each mode that can be converted to RGB."""
_DECODERS = {"AVIF": 6, "JPEG2000": 16, "PPM": 8, "TIFF": 8, "WEBP": 12}
"""Peak bytes per pixel of a decoder's own memory, measured; other decoders keep only a few rows."""
_SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)


def _raw_mode(image: Image.Image) -> Any:
    """Return the sample layout of a file whose pixels have not been read yet."""
    tile = getattr(image, "tile", None)
    return tile[0][3] if tile else ""


def _peak(image: Image.Image) -> int:
    """Estimate the peak memory in bytes of decoding an image to RGB."""
    held = _BYTES[image.mode] + _DECODERS.get(image.format or "", 0) + 6 * ("progressive" in image.info)
    return image.width * image.height * held + 4 * image.width * image.height // _reduction(image.size) ** 2


class _Budget:
    """Memory in bytes that threads share; a thread waits until its part is available."""

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
    """Convert a Pillow image to 8-bit sRGB, as `open_image` does.

    Raises:
        DataError: The image is too small or too large, animated, or has pixels of unknown range or colours.
    """
    _check(image)
    if (levels := {"L;2": 85, "L;4": 17}.get(_raw_mode(image))) and "transparency" in image.info:
        image.info["transparency"] *= levels  # Pillow keeps the file's unscaled value
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
    """Return the power of two by which an image's sides are divided."""
    return 1 << max(0, (min(size) // ENOUGH).bit_length() - 1)


def _upright(rgb: Image.Image, image: Image.Image) -> Image.Image:
    try:
        turn = TURNS.get(image.getexif()[0x0112])
    except Exception:  # no EXIF data, or damaged in one of many ways; the pixels are intact
        turn = None
    return rgb if turn is None else rgb.transpose(turn)


def _converted(strip: Image.Image, image: Image.Image) -> Image.Image:
    """Convert a strip of `image` to sRGB, blended with white."""
    colours, alpha = _planes(strip, image)
    rgb = _to_srgb(colours, image)
    if alpha is None:
        return rgb
    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb, mask=alpha)
    return white


def _planes(strip: Image.Image, image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Separate a strip into colours (mode L, RGB, CMYK or LAB) and opacity (mode L)."""
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
    if tags.get(262) == 0:  # TIFF's WhiteIsZero, which Pillow applies only up to 8 bits
        grey = 255 - grey
    key = image.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(samples == key, 0, 255).astype(np.uint8))
    return Image.fromarray(grey), alpha


def _has_colour_space(image: Image.Image) -> bool:
    return bool(image.info.get("icc_profile") or "gamma" in image.info)


def _to_srgb(colours: Image.Image, image: Image.Image) -> Image.Image:
    profile: Any = "LAB" if colours.mode == "LAB" else image.info.get("icc_profile")
    if profile:
        transform = _transform(profile, colours.mode)
        if transform.problem and transform.problem not in _WARNED:
            _WARNED.add(transform.problem)
            log.warning(
                "%s: %s; its colours, and those of every image with this profile, are treated as sRGB",
                getattr(image, "filename", "") or "an image",
                transform.problem,
            )
        if transform.apply:
            return transform.apply(colours.convert(transform.mode))
    elif "srgb" not in image.info:
        colours = _without_gamma(colours, image.info.get("gamma"))
    return colours.convert("RGB")


@dataclass(frozen=True)
class _Transform:
    """Conversion of pixels in `mode` to sRGB; without `apply`, they are sRGB already or there is a `problem`."""

    mode: str
    apply: Callable[[Image.Image], Image.Image] | None = None
    problem: str = ""


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes | str, mode: str) -> _Transform:
    """Build the conversion of a profile to sRGB.

    Args:
        profile: An ICC profile, or the name of one that Pillow provides.
        mode: Mode of the pixels that it is embedded with.
    """
    try:
        known = ImageCms.createProfile("LAB") if profile == "LAB" else io.BytesIO(profile)  # type: ignore[arg-type]  # a TIFF's may have any type
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
    """Convert the colours of a PNG without profile, whose samples are intensities to the power `gamma`, to sRGB."""
    if not gamma or abs(gamma - 1 / 2.2) < 0.01:
        return colours
    levels = np.rint(255 * (np.arange(256) / 255) ** (1 / (2.2 * gamma))).astype(int).tolist()
    return colours.point(levels * len(colours.getbands()))
