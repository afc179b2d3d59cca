"""From an image file to the network's input, the same way in training, calibration, prediction and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from edgekd.errors import DataError

Array: TypeAlias = npt.NDArray[np.float32]

MIN_SIDE = 4
"""Smallest side (pixels) that is taken for a picture."""
MAX_PIXELS = 89_478_485
"""Pillow's own limit against decompression bombs; here it is an error, not a warning."""
EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


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


def open_image(path: Path | str) -> Image.Image:
    """Decode one still picture to 8-bit RGB, turned upright by its EXIF tag.

    Grey and CMYK are converted, 16-bit is scaled to 8, transparency is laid over white.

    Raises:
        DataError: missing, empty, truncated, not an image, animated, or too small or large; the file is named.
    """
    try:
        with Image.open(path) as image:
            _check(image)
            return to_rgb(ImageOps.exif_transpose(image))
    except DataError as error:
        raise DataError(f"{path}: {error.what}", fix=error.fix) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{path}: more than {MAX_PIXELS / 1e6:.0f} megapixels", fix="cut it into tiles") from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file", fix="check the path") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: not an image", fix="remove it or convert it to PNG") from None
    except Exception as error:  # decoders raise many kinds
        raise DataError(f"{path}: cannot be decoded ({error})", fix="restore or remove it") from None


def _check(image: Image.Image) -> None:
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # telephones put a second view into a JPEG
        raise DataError("has several frames or pages", fix="save the one that is meant as a picture of its own")
    if image.width * image.height > MAX_PIXELS:  # Pillow itself only warns before twice as many
        raise Image.DecompressionBombError
    if min(image.size) < MIN_SIDE:
        width, height = image.size
        raise DataError(f"is only {width}x{height} pixels", fix="remove it")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any still Pillow image to 8-bit RGB: 16-bit scaled, transparency over white."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_uint8(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _to_uint8(pixels: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """16-bit integers by their full range; 32-bit integers and floats are taken as 16-bit if above 255."""
    values = pixels.astype(np.float64)
    if not np.isfinite(values).all():
        raise DataError("has pixels that are no numbers", fix="mend or remove it")
    top = 65535.0 if pixels.dtype == np.uint16 or values.max(initial=0) > 255 else 255.0
    return np.clip(values * 255 / top + 0.5, 0, 255).astype(np.uint8)
