"""Augmentation of training images, with every random number from a given generator, in a fixed order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from edgekd.data.preprocess import Preprocess
from edgekd.types import Array

Draws: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Augment:
    """Settings of the augmentation; the default changes nothing.

    Attributes:
        crop_scale: Range of the crop's area, as a fraction of the image's.
        crop_ratio: Range of the crop's aspect ratio, relative to the image's (to 1 if `resize` keeps the aspect ratio).
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        transpose: Probability of swapping both axes.
        rotation: Maximum angle in degrees, in either direction.
        jitter: Strengths of brightness, contrast, saturation (0.3: a factor from 0.7 to 1.3) and hue (0.1: a tenth of
            the colour circle in either direction).
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (1.0, 1.0)
    hflip: float = 0.0
    vflip: float = 0.0
    transpose: float = 0.0
    rotation: float = 0.0
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError("crop_scale: two fractions of the area, 0 < low <= high <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError("crop_ratio: two ratios, 0 < low <= high")
        for name in ("hflip", "vflip", "transpose"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: a probability from 0 to 1")
        if not 0 <= self.rotation <= 180:
            raise ValueError("rotation: degrees from 0 to 180")
        if min(self.jitter) < 0 or max(self.jitter[:3]) > 1 or self.jitter[3] > 0.5:
            raise ValueError("jitter: brightness, contrast, saturation from 0 to 1, hue from 0 to 0.5")

    @property
    def crops(self) -> bool:
        """True if images are cropped."""
        return (self.crop_scale, self.crop_ratio) != ((1, 1), (1, 1))


def augmented(image: Image.Image, augment: Augment, preprocess: Preprocess, rng: np.random.Generator) -> Array:
    """Augment one RGB image and convert it to the network's input.

    Args:
        image: An RGB image of any size.
        augment: Settings of the augmentation.
        preprocess: Size and standardisation of the result.
        rng: Source of all random numbers.

    Returns:
        float32 (3, image_size, image_size), standardised.
    """
    draw = rng.random(12)
    image = _cropped(image, augment, preprocess, draw[:4]) if augment.crops else preprocess.resized(image)
    image = _jittered(image, augment, draw[4:8])
    if augment.rotation:
        turn = (2 * draw[8] - 1) * augment.rotation
        image = image.rotate(turn, Image.Resampling.BILINEAR, fillcolor=preprocess.fill)
    pixels = np.asarray(image)
    if draw[9] < augment.hflip:
        pixels = pixels[:, ::-1]
    if draw[10] < augment.vflip:
        pixels = pixels[::-1]
    if draw[11] < augment.transpose:
        pixels = pixels.swapaxes(0, 1)
    return preprocess.normalised(pixels)


def _cropped(image: Image.Image, augment: Augment, preprocess: Preprocess, draw: Draws) -> Image.Image:
    """Crop and resize a random part of the image in a single, cheap pass."""
    width, height = image.size
    whole = (width, height) if preprocess.resize == "stretch" else (min(image.size),) * 2
    low, high = augment.crop_scale
    side = math.sqrt(low + draw[0] * (high - low))
    low, high = (math.log(r) for r in augment.crop_ratio)
    tilt = math.exp((low + draw[1] * (high - low)) / 2)
    w, h = min(whole[0] * side * tilt, width), min(whole[1] * side / tilt, height)
    left, top = draw[2] * (width - w), draw[3] * (height - h)
    size = (preprocess.image_size,) * 2
    return preprocess.resampled(preprocess.converted(image), size, (left, top, left + w, top + h))


def _jittered(image: Image.Image, augment: Augment, draw: Draws) -> Image.Image:
    steps = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    for adjust, strength, u in zip(steps, augment.jitter, draw):
        if strength:
            image = adjust(image, 1 + (2 * u - 1) * strength)
    hue = augment.jitter[3]
    return tv.adjust_hue(image, (2 * draw[3] - 1) * hue) if hue else image
