"""Small classifiers that the tables of Gao et al. 2022 compare with, each from images (B, 3, H, W) to logits (B, C).

Their sources give the kind of network but, as far as we could read them, not every width; widths that edgekd chose are
marked as such.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torchvision.models.vgg import make_layers

from edgekd.models.base import FOUR_STAGES, Architecture, ExitPoint, Stem

COMPACT: list[str | int] = [32, "M", 64, "M", 128, 128, "M", 256, 256, "M", 256, 256, "M"]
"""VGG11's layers with half of its channels; M halves the map."""


def mlp(
    *, classes: int, image_size: int = 224, stem: Stem = "imagenet", exits: Sequence[ExitPoint] = FOUR_STAGES
) -> nn.Module:
    """Build a perceptron on the image averaged over squares to about 32 x 32.

    The paper specifies neither input nor layers of its MLP (it is one of SIPaKMeD's published baselines); 512 and 128
    hidden units, ReLU and dropout 0.5 are edgekd's choice.
    """
    square = max(round(image_size / 32), 1)
    side = image_size // square
    return nn.Sequential(nn.AvgPool2d(square), nn.Flatten(), *dense(3 * side * side, 512, 128, classes, dropout=0.5))


def compact_vgg(
    *, classes: int, image_size: int = 224, stem: Stem = "imagenet", exits: Sequence[ExitPoint] = FOUR_STAGES
) -> nn.Module:
    """Build a narrow VGG with batch norm (Chen et al. 2021, CytoBrain): 2.4 M parameters, for images from 32 pixels.

    The widths, average pooling in place of VGG's flattening, and the 256 hidden units are edgekd's choice.
    """
    return nn.Sequential(
        make_layers(COMPACT, batch_norm=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        *dense(256, 256, classes, dropout=0.5),
    )


def deep_pap(
    *, classes: int, image_size: int = 224, stem: Stem = "imagenet", exits: Sequence[ExitPoint] = FOUR_STAGES
) -> nn.Module:
    """Build DeepPap (Zhang et al. 2017, arXiv 1801.08616): CaffeNet's five convolutions, then three linear layers.

    The convolutions are CaffeNet's, made for 227 pixels, without its response normalisation, which would export as a
    dozen nodes. Up to 128 pixels the first one's stride is 2, and up to 64 it is 1, where CaffeNet's 4 would shrink the
    map to nothing. The linear widths 1024 and 256 are edgekd's choice.
    """
    stride = 1 if image_size <= 64 else 2 if image_size <= 128 else 4
    features = nn.Sequential(
        nn.Conv2d(3, 96, 11, stride=stride),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(96, 256, 5, padding=2, groups=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(256, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 384, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, ceil_mode=True),
    )
    with torch.no_grad():
        width = features(torch.zeros(1, 3, image_size, image_size)).numel()
    return nn.Sequential(features, nn.Flatten(), *dense(width, 1024, 256, classes, dropout=0.5))


def dense(*widths: int, dropout: float) -> list[nn.Module]:
    """Build linear layers from each width to the next, with ReLU and dropout between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
    return layers[:-2]


MLP, COMPACT_VGG, DEEP_PAP = Architecture(mlp), Architecture(compact_vgg), Architecture(deep_pap)
