"""Presets, configurations and flags give the pixels that timm, torchvision and Hugging Face give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgekd.conversion.preprocessing import PRESETS, PreprocessOptions, read_preprocess
from edgekd.data.preprocess import Preprocess
from edgekd.errors import ConfigError
from edgekd.types import Array

SIZES = [(301, 200), (200, 303), (97, 64), (50, 50), (229, 300)]


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def agree(preprocess: Preprocess, transform: Any) -> None:
    """The float inputs differ by rounding alone, so that the 8-bit pixels are the same."""
    for size in SIZES:
        expected = np.asarray(transform(picture(*size)))
        assert np.abs(preprocess(picture(*size)) - expected).max() < 2e-6 * max(1, np.abs(expected).max()), size


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize(
    ("interpolation", "crop"), [("bilinear", 0.875), ("bicubic", 0.9), ("lanczos", 0.95), ("nearest", 1.0)]
)
def test_timm(mode: str, interpolation: str, crop: float, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    cfg = {"input_size": [3, 64, 64], "mean": mean, "std": std, "crop_pct": crop, "crop_mode": mode}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"architecture": "x", "pretrained_cfg": {**cfg, "interpolation": interpolation}}))
    agree(
        read_preprocess(str(file)).preprocess(),
        timm.data.create_transform(64, mean=mean, std=std, crop_pct=crop, crop_mode=mode, interpolation=interpolation),
    )


def test_torchvision() -> None:
    pytest.importorskip("torchvision")
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    agree(PRESETS["imagenet"].preprocess(64), ImageClassification(crop_size=64, resize_size=73))
    bicubic = PreprocessOptions(resize_size=75, interpolation="bicubic").over(PRESETS["imagenet"])
    agree(
        bicubic.preprocess(64),
        ImageClassification(crop_size=64, resize_size=75, interpolation=InterpolationMode.BICUBIC),
    )


@pytest.mark.parametrize("size", [(301, 200), (31, 40)])
def test_without_antialiasing_as_tensorflow_and_opencv_resize(size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    image = picture(*size)
    tensor = torch.from_numpy(np.asarray(image).astype(np.float32)).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(tensor, (64, 64), mode="bilinear", antialias=False)[0]
    found = Preprocess(64, antialias=False).resized(image)
    assert np.abs(np.asarray(found).astype(float) - expected.permute(1, 2, 0).numpy()).max() < 0.501
    averaged = np.asarray(Preprocess(64).resized(image)).astype(float)
    assert (np.abs(averaged - np.asarray(found)).max() > 5) == (size == (301, 200))  # when enlarging, both are the same


HUGGING_FACE: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {"size": {"height": 32, "width": 32}, "resample": 2},
    "CLIPImageProcessor": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 3},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 32}, "crop_pct": 0.9, "resample": 3},
    "MobileViTImageProcessor": {
        "size": {"shortest_edge": 36},
        "crop_size": {"height": 32, "width": 32},
        "do_flip_channel_order": True,
        "do_normalize": False,
        "resample": 2,
    },
    "EfficientNetImageProcessor": {
        "size": {"height": 32, "width": 32},
        "rescale_offset": True,
        "rescale_factor": 1 / 127.5,
        "include_top": True,
        "resample": 0,
    },
    "LevitImageProcessor": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 3},
}
"""Configurations by image processor; what `transformers` computes from them is in hugging_face.npz."""
MOMENTS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
ORACLE = Path(__file__).parent / "hugging_face.npz"


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_hugging_face(kind: str, tmp_path: Path) -> None:
    """`python tests/conversion/hugging_face.py` writes the expected values with transformers (5.24.0)."""
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"image_processor_type": kind, **MOMENTS, **HUGGING_FACE[kind]}))
    preprocess = read_preprocess(str(file)).preprocess(32)
    with np.load(ORACLE) as oracle:
        for size in SIZES[:3]:
            expected: Array = oracle[f"{kind}-{size[0]}x{size[1]}"].astype(np.float32)
            found = (preprocess(picture(*size)) * np.reshape(preprocess.std, (3, 1, 1))) + np.reshape(
                preprocess.mean, (3, 1, 1)
            )
            assert np.abs(found / preprocess.scale - expected).max() < 0.02  # pixels 0..255


def test_settings_replace_those_of_the_preset() -> None:
    found = PreprocessOptions(resize="stretch", channels="bgr").over(PRESETS["inception"]).preprocess(299)
    assert found == Preprocess(299, (0.5,) * 3, (0.5,) * 3, resize="stretch", interpolation="bicubic", channels="bgr")
    assert PRESETS["imagenet"].preprocess(224).resize_size == 256
    assert PreprocessOptions(mean=(0.1,), std=(0.3,)).preprocess(28).mean == (0.1,) * 3


def test_caffe_subtracts_the_means_of_blue_green_and_red() -> None:
    pixels = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    found = PRESETS["caffe"].preprocess(8)(Image.fromarray(pixels))
    assert found[:, 0, 0] == pytest.approx([50 - 103.939, 100 - 116.779, 200 - 123.68], abs=1e-4)
    assert Preprocess(8, channels="grey", mean=(0.0,) * 3, std=(1.0,) * 3)(Image.fromarray(pixels))[:, 0, 0] * 255 == (
        pytest.approx([round(200 * 0.299 + 100 * 0.587 + 50 * 0.114)] * 3, abs=1e-3)
    )


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({"model_type": "vit"}, "describes no preprocessing"),
        ({**MOMENTS, "do_resize": False, "size": 64}, "do_resize"),
        ({**MOMENTS, "size": {"height": 64, "width": 96}}, "only square"),
        ({**MOMENTS, "size": {"shortest_edge": 64}, "do_center_crop": False}, "not square"),
        ({"mean": [0.5], "std": [0.5], "input_size": [3, 64, 64], "crop_mode": "odd"}, "crop_mode = odd"),
    ],
)
def test_a_configuration_that_cannot_be_followed_is_refused(table: dict[str, Any], match: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(table))
    with pytest.raises(ConfigError, match=match):
        read_preprocess(str(file))


def test_an_unknown_preset_and_an_unknown_size_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown preprocessing 'imagnet'") as error:
        read_preprocess("imagnet")
    assert "imagenet" in error.value.fix
    with pytest.raises(ConfigError, match="any size"):
        PRESETS["imagenet"].preprocess()
    with pytest.raises(ConfigError, match="224 pixels, the preprocessing is for 299"):
        PreprocessOptions(image_size=299).over(PRESETS["imagenet"]).preprocess(224)
