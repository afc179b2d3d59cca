"""Preprocessing of trained classifiers: presets, configurations of timm and Hugging Face, and single settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from edgekd.data.preprocess import Channels, Interpolation, Preprocess, Resize
from edgekd.errors import ArtifactError, ConfigError, nearest
from edgekd.schema import parse_json
from edgekd.serialization import read_bytes

MAX_JSON = 64 << 20
"""Largest configuration in bytes."""


@dataclass(frozen=True)
class PreprocessOptions:
    """Some or all settings of a `Preprocess`; None is not given.

    Attributes:
        image_size: Side of the input in pixels.
        mean: Mean of each plane, or one for all.
        std: Standard deviation of each plane, or one for all.
        scale: Factor on pixels 0..255.
        resize: See `Preprocess`.
        resize_size: Side in pixels before the centre is taken.
        crop: `image_size` as a fraction of `resize_size`, which is rounded down: timm's `crop_pct`.
        interpolation: Pillow's filter.
        antialias: See `Preprocess`.
        centre: See `Preprocess`.
        channels: Order of the planes.
    """

    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    resize: Resize | None = None
    resize_size: int | None = None
    crop: float | None = None
    interpolation: Interpolation | None = None
    antialias: bool | None = None
    centre: Literal["round", "floor"] | None = None
    channels: Channels | None = None

    def over(self, other: PreprocessOptions) -> PreprocessOptions:
        """Return the settings of `other` with those given here in their place.

        A `resize`, `resize_size` or `crop` given here replaces `resize_size` and `crop` of `other`.
        """
        given = {k: v for k, v in vars(self).items() if v is not None}
        if given.keys() & {"resize", "resize_size", "crop"}:
            other = dataclasses.replace(other, resize_size=None, crop=None)
        return dataclasses.replace(other, **given)

    def preprocess(self, image_size: int | None = None) -> Preprocess:
        """Return the preprocessing for a network.

        Args:
            image_size: Side of the network's input, if it is fixed.

        Raises:
            ConfigError: No size, two different ones, or settings that do not fit together.
        """
        size = image_size or self.image_size
        if size is None:
            raise ConfigError("the network takes images of any size", fix="give the image size with --image-size")
        if self.image_size not in (None, size):
            raise ConfigError(
                f"the network takes images of {size} pixels, the preprocessing is for {self.image_size}",
                fix=f"give --image-size {size}",
            )
        if self.crop is not None and self.resize_size is not None:
            raise ConfigError("both crop and resize_size are given", fix="give one of them")
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ConfigError(f"crop: {self.crop} is not in 0..1", fix="give the cropped fraction, such as 0.875")
        given = {k: v for k, v in vars(self).items() if v is not None} | {"image_size": size}
        if self.crop is not None:
            del given["crop"]
            given["resize_size"] = math.floor(size / self.crop)
        for key in ("mean", "std"):
            if key in given:
                given[key] = _three(given[key], key)
        try:
            return Preprocess(**given)
        except ValueError as error:
            raise ConfigError(f"the preprocessing is not valid: {error}", fix="correct this setting") from None


def _three(values: tuple[float, ...], key: str) -> tuple[float, ...]:
    if len(values) not in (1, 3):
        raise ConfigError(f"{key}: {len(values)} values", fix="give one value, or one for each of three planes")
    return values * 3 if len(values) == 1 else values


_IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HALF: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
_ZERO: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
PRESETS: dict[str, PreprocessOptions] = {
    "imagenet": PreprocessOptions(**_IMAGENET, resize="shorter", crop=0.875),
    "inception": PreprocessOptions(**_HALF, resize="shorter", crop=0.875, interpolation="bicubic"),
    "clip": PreprocessOptions(
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        resize="shorter",
        interpolation="bicubic",
    ),
    "caffe": PreprocessOptions(
        mean=(103.939, 116.779, 123.68), std=(1.0,) * 3, scale=1.0, channels="bgr", resize="stretch"
    ),
    "ultralytics": PreprocessOptions(**_ZERO, resize="shorter"),
    "none": PreprocessOptions(**_ZERO, scale=1.0, resize="stretch"),
}
"""Presets by name.

`imagenet`: torchvision's and timm's usual one (at 224: shorter side to 256, bilinear, centre). `inception`: values in
-1..1, as timm feeds Inception and many vision transformers. `clip`: CLIP's. `caffe`: BGR, 0..255, less the means, as
Keras feeds ResNet50 and VGG. `ultralytics`: values in 0..1. `none`: pixels 0..255 as they are, for networks that scale
by themselves."""


def read_preprocess(source: str) -> PreprocessOptions:
    """Read the preprocessing of a classifier.

    Args:
        source: Name of a preset, or path of a `preprocessor_config.json` (Hugging Face) or of a `config.json` with a
            `pretrained_cfg` (timm).

    Raises:
        ConfigError: Neither a preset nor a file; a file with steps that edgekd does not have.
        ArtifactError: The file is not JSON.
    """
    if source in PRESETS:
        return PRESETS[source]
    path = Path(source)
    if path.suffix != ".json" and not path.exists():
        raise ConfigError(f"unknown preprocessing '{source}'", fix=f"{nearest(source, PRESETS)} Or give a JSON file")
    table = read_config(path)
    try:
        if (timm := _timm_table(table)) is not None:
            return _from_timm(timm)
        if "image_mean" in table or "do_resize" in table or "do_normalize" in table:
            return _from_hugging_face(table)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: the preprocessing cannot be read ({error})", fix="give it with --mean, --std, --resize and so on"
        ) from None
    raise ConfigError(
        f"{path} describes no preprocessing",
        fix="give preprocessor_config.json of Hugging Face, config.json of timm, or a preset: " + ", ".join(PRESETS),
    )


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ArtifactError: The file is missing, too large, or no JSON object.
    """
    data = read_bytes(path, what="configuration")
    try:
        if len(data) > MAX_JSON:
            raise ValueError(f"{len(data) >> 20} MiB")
        table = parse_json(data.decode())
    except ValueError as error:
        raise ArtifactError(f"{path} is not a JSON file: {error}", fix="check the path") from None
    if not isinstance(table, dict):
        raise ArtifactError(f"{path} is a JSON {type(table).__name__}, not an object", fix="check the path")
    return table


def _timm_table(table: Mapping[str, Any]) -> Mapping[str, Any] | None:
    found = table.get("pretrained_cfg", table)
    return found if isinstance(found, Mapping) and "mean" in found and "input_size" in found else None


def _from_timm(table: Mapping[str, Any]) -> PreprocessOptions:
    """Convert timm's `pretrained_cfg`; its defaults are those of `timm.data.create_transform`."""
    channels, height, width = table["input_size"]
    if table.get("crop_border_pixels"):
        raise ValueError("crop_border_pixels")
    return PreprocessOptions(
        image_size=_square(height, width),
        mean=_numbers(table["mean"]),
        std=_numbers(table["std"]),
        resize=_known(
            {"center": "shorter", "squash": "stretch", "border": "pad"}, table.get("crop_mode") or "center", "crop_mode"
        ),
        crop=float(table.get("crop_pct") or 0.875),
        interpolation=_known(_TIMM_FILTERS, table.get("interpolation") or "bilinear", "interpolation"),
        channels="grey" if channels == 1 else "rgb",
    )


_TIMM_FILTERS = {name: name for name in ("bilinear", "bicubic", "lanczos", "nearest", "box", "hamming")}
_SHORTER_BY_DEFAULT = ("clip", "convnext", "levit", "mobilenet", "mobilevit", "perceiver", "poolformer", "videomae")
"""Image processors to which a bare number as `size` is the shorter side; to others it is both sides."""


def _from_hugging_face(table: Mapping[str, Any]) -> PreprocessOptions:
    """Convert a `preprocessor_config.json`, with the defaults of Hugging Face's image processors."""
    kind = str(table.get("image_processor_type") or table.get("feature_extractor_type") or "").lower()
    if not table.get("do_resize", True):
        raise ValueError("do_resize is false: the images' size is left to the caller")
    scale = float(table.get("rescale_factor", 1 / 255)) if table.get("do_rescale", True) else 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    if table.get("do_normalize", True):
        mean, std = _numbers(table["image_mean"]), _numbers(table["image_std"])
    if table.get("do_rescale", True) and (table.get("rescale_offset") or table.get("offset")):
        mean = tuple(m + 1 for m in mean)  # pixel * scale - 1
    if "efficientnet" in kind and table.get("include_top", True):
        std = tuple(s * s for s in _numbers(table["image_std"]))  # divided by it twice
    return PreprocessOptions(
        mean=mean,
        std=std,
        scale=scale,
        interpolation=_known(
            {r.value: r.name.lower() for r in Image.Resampling}, int(table.get("resample", 3)), "resample"
        ),
        centre="floor",
        channels="bgr" if table.get("do_flip_channel_order") else "rgb",
        **_hugging_face_size(table, kind),
    )


def _hugging_face_size(table: Mapping[str, Any], kind: str) -> dict[str, Any]:
    size, crop = table["size"], table.get("crop_size")
    if isinstance(size, int):
        shorter = any(name in kind for name in _SHORTER_BY_DEFAULT)
        size = {"shortest_edge": size} if shorter else {"height": size, "width": size}
    if not size.keys() <= {"shortest_edge", "height", "width"}:
        raise ValueError(f"size with {', '.join(size)}")
    edge = size.get("shortest_edge") or _square(size["height"], size["width"])
    resize: Resize = "shorter" if "shortest_edge" in size else "stretch"
    if "convnext" in kind:
        if edge >= 384:
            return {"image_size": edge, "resize": "stretch"}
        return {"image_size": edge, "resize": "shorter", "resize_size": int(edge / table.get("crop_pct", 224 / 256))}
    if "poolformer" in kind and table.get("crop_pct"):
        edge, resize = int(edge / table["crop_pct"]), "shorter"
    if kind.startswith("levit") and resize == "shorter":
        edge = int(256 / 224 * edge)
    if table.get("do_center_crop", crop is not None and resize == "shorter"):
        image_size = crop if isinstance(crop, int) else _square(crop["height"], crop["width"])  # type: ignore[index]
        return {"image_size": image_size, "resize": resize, "resize_size": edge}
    if resize == "shorter":
        raise ValueError("size is the shorter side, and there is no crop: the input is not square")
    return {"image_size": edge, "resize": resize}


def _square(height: Any, width: Any) -> int:
    if height != width:
        raise ValueError(f"{height} x {width} pixels: only square inputs are supported")
    return int(height)


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in values) if isinstance(values, list) else (float(values),)


def _known(names: Mapping[Any, Any], value: Any, key: str) -> Any:
    if value not in names:
        raise ValueError(f"{key} = {value}")
    return names[value]
