"""Small networks that paper A's tables compare with, each from image to logits.

Their sources give the kind of network but, as far as we could read them, not every width; what is ours is said.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torchvision.models.vgg import make_layers

COMPACT: list[str | int] = [32, "M", 64, "M", 128, 128, "M", 256, 256, "M", 256, 256, "M"]
"""VGG11's plan with half of its channels; M halves the map."""


def dense(*widths: int, dropout: float) -> list[nn.Module]:
    """Linear layers from each width to the next, with ReLU and dropout between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
    return layers[:-2]


def mlp(*, classes: int, image_size: int) -> nn.Module:
    """A perceptron on the image averaged over squares to about 32 x 32.

    The paper names neither input nor layers of its MLP (it stands among SIPaKMeD's published baselines); 512 and 128
    hidden units, ReLU and dropout 0.5 are ours.
    """
    square = max(round(image_size / 32), 1)
    side = image_size // square
    return nn.Sequential(nn.AvgPool2d(square), nn.Flatten(), *dense(3 * side * side, 512, 128, classes, dropout=0.5))


def compact_vgg(*, classes: int, image_size: int) -> nn.Module:
    """A narrow VGG with batch norm (Chen et al. 2021, CytoBrain): 2.4 M parameters for any image of 32 pixels or more.

    The widths, the average in place of VGG's flattening, and the 256 hidden units are ours.
    """
    return nn.Sequential(
        make_layers(COMPACT, batch_norm=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        *dense(256, 256, classes, dropout=0.5),
    )


def deep_pap(*, classes: int, image_size: int) -> nn.Module:
    """DeepPap (Zhang et al. 2017, arXiv 1801.08616): CaffeNet's five convolutions, then three linear layers.

    At 227 pixels the convolutions are CaffeNet's, without its response normalisation, which would export as a dozen
    nodes. Up to 128 pixels the first one's stride is 2, and up to 64 it is 1, instead of 4: the map would shrink to
    nothing. The linear widths 1024 and 256 are ours.
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
