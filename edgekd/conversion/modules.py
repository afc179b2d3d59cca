"""Classifiers in torch, of whatever class, as student.onnx or as input of `add_exits`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.conversion.source import TrainedClassifier
from edgekd.data.preprocess import Preprocess
from edgekd.errors import ConfigError
from edgekd.export import check_parity, export, model_metadata, to_onnx
from edgekd.models.base import MultiExitNetwork, Outputs
from edgekd.types import Array


class _OneExit(MultiExitNetwork):
    """A classifier from images (B, 3, S, S) to logits (B, C), as a network with one exit."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.backbone = module
        self.exits = nn.ModuleList()

    def forward(self, x: Tensor) -> Outputs:
        found = self.backbone(x)
        return Outputs((found.logits[-1] if isinstance(found, Outputs) else found,), (), ())


def export_module(
    module: nn.Module,
    *,
    classes: Sequence[str],
    preprocess: Preprocess,
    out: Path | str,
    images: Array | None = None,
) -> float:
    """Write a trained classifier as a student.onnx with one exit, for `edgekd add-exits`, `compile` and the rest.

    Args:
        module: Maps images (B, 3, S, S) to logits (B, C), S being `preprocess.image_size`. It is put into eval mode.
        classes: Names of the classes, in the order of the logits.
        preprocess: Preprocessing of the images.
        out: The file to write.
        images: Preprocessed images (N, 3, S, S) to compare both networks on; random ones if None.

    Returns:
        The largest difference of logits from torch.

    Raises:
        ArtifactError: `out` exists and is another kind of file.
        ConfigError: The module has other outputs.
        GateError: The logits differ from torch's. Nothing is written.
    """
    network, images = _one_exit(module, len(classes), preprocess), _images(images, preprocess)
    with torch.no_grad():
        outputs = network(torch.from_numpy(images[:1]))
    metadata = model_metadata(type(module).__name__, tuple(classes), preprocess, outputs)
    return export(network, metadata, out=Path(out), images=images, names=[f"image {i}" for i in range(len(images))])


def classifier_of(
    module: nn.Module,
    *,
    classes: Sequence[str],
    preprocess: Preprocess,
    name: str,
    images: Array | None = None,
    provenance: dict[str, Any] | None = None,
) -> TrainedClassifier:
    """Return a classifier in torch as `read_classifier` returns those of ONNX files.

    Args:
        module: As for `export_module`.
        classes: Names of the classes.
        preprocess: Preprocessing of the images.
        name: The network's name.
        images: As for `export_module`.
        provenance: Where the weights come from.

    Raises:
        ConfigError: The module has other outputs.
        GateError: The logits differ from torch's.
    """
    network, images = _one_exit(module, len(classes), preprocess), _images(images, preprocess)
    model = to_onnx(network, image_size=preprocess.image_size)
    names = [f"image {i}" for i in range(len(images))]
    difference = check_parity(network, model.SerializeToString(), images, names=names)
    return TrainedClassifier(model, tuple(classes), preprocess, name, difference, (), dict(provenance or {}))


def _one_exit(module: nn.Module, classes: int, preprocess: Preprocess) -> _OneExit:
    network = _OneExit(module).eval()
    size = preprocess.image_size
    with torch.no_grad():
        found = network(torch.zeros(2, 3, size, size)).logits[0]
    if not (isinstance(found, Tensor) and found.shape == (2, classes)):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(
            f"{type(module).__name__} maps images (2, 3, {size}, {size}) to {shape}, not to logits (2, {classes})",
            fix="give a module that returns one tensor of logits, and the names of all classes",
        )
    return network


def _images(images: Array | None, preprocess: Preprocess) -> Array:
    size = preprocess.image_size
    return np.random.default_rng(0).normal(size=(4, 3, size, size)).astype(np.float32) if images is None else images
