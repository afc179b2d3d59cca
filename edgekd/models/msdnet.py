"""MSDNet: dense layers on several scales at once, an exit after each block (Huang et al., arXiv 1703.09844).

Wiring and widths are those of the authors' PyTorch code (MSDNet-PyTorch f654595). Between layers the network holds
one map for each scale, fine to coarse; each layer widens every map by its growth, and the finest scales are dropped one
by one. Weights keep torch's default initialisation, as in that code, whose own affects no convolution. Train it
with method `ce`, the paper's joint training.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekd.errors import ConfigError
from edgekd.models.base import FOUR_STAGES, Architecture, ExitPoint, MultiExitNetwork, Outputs, Stem
from edgekd.models.multi_exit import exits_text


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Hyperparameters of one of the paper's networks.

    Attributes:
        channels: Channels of the finest map at the start.
        growth: Channels that a layer adds to the finest map.
        factors: For each scale, the multiple of `channels` and `growth`, and of the bottleneck before its convolutions.
        base: Layers of the first block.
        step: Layers of each further block.
        head: Channels of the exits' convolutions; 0 for those of the coarsest map.
        small_stem: The stem is a 3x3 convolution of stride 1.
    """

    channels: int
    growth: int
    factors: tuple[int, ...]
    base: int = 4
    step: int
    head: int
    small_stem: bool


SMALL = Variant(channels=16, growth=6, factors=(1, 2, 4), step=2, head=128, small_stem=True)
"""CIFAR: three scales, a 3x3 stem."""
LARGE = Variant(channels=32, growth=16, factors=(1, 2, 4, 4), step=4, head=0, small_stem=False)
"""ImageNet: four scales, a 7x7 stem of stride 2 and max-pooling."""


def conv(inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1) -> nn.Sequential:
    """Build convolution, batch norm and ReLU; with stride 2 the map is halved (rounded up)."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def bottlenecked(inputs: int, outputs: int, factor: int, *, stride: int = 1) -> nn.Sequential:
    """Build a 3x3 `conv` behind a 1x1 one with at most `factor * outputs` channels."""
    inner = min(inputs, factor * outputs)
    return nn.Sequential(conv(inputs, inner, 1), conv(inner, outputs, stride=stride))


class Pyramid(nn.ModuleList):
    """Image (B, 3, H, W) to the first map of each scale: the stem, then a strided convolution for each coarser one."""

    def __init__(self, variant: Variant) -> None:
        widths = [variant.channels * factor for factor in variant.factors]
        stem = conv(3, widths[0]) if variant.small_stem else _large_stem(widths[0])
        super().__init__([stem, *(conv(a, b, stride=2) for a, b in itertools.pairwise(widths))])

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for module in self:
            x = module(x)
            maps.append(x)
        return maps


def _large_stem(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, outputs, 7, 2, 3), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(3, 2, 1))


class Layer(nn.Module):
    """One dense layer: each scale concatenates its map with `growth` new channels per unit of its factor.

    Half of the new channels are computed from the same scale and half from the next finer one. The finest scale's are
    computed from itself alone, or the scale is dropped.

    Args:
        width: Channels of a map of factor 1.
        factors: Factors of the scales that come in.
        growth: Channels that are added to a map of factor 1.
        drop: Drop the finest scale.
    """

    def __init__(self, width: int, factors: Sequence[int], growth: int, *, drop: bool) -> None:
        super().__init__()
        first = factors[0]
        self.finest = None if drop else bottlenecked(width * first, growth * first, first)
        pairs = list(itertools.pairwise(factors))
        self.down = nn.ModuleList(bottlenecked(width * a, growth * b // 2, a, stride=2) for a, b in pairs)
        self.same = nn.ModuleList(bottlenecked(width * b, growth * b // 2, b) for _, b in pairs)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        grown = [] if self.finest is None else [torch.cat([maps[0], self.finest(maps[0])], 1)]
        for finer, own, down, same in zip(maps, maps[1:], self.down, self.same):
            grown.append(torch.cat([own, down(finer), same(own)], 1))
        return grown


class Transition(nn.ModuleList):
    """1x1 convolutions, one for each scale, that halve the channels."""

    def __init__(self, width: int, factors: Sequence[int]) -> None:
        super().__init__([conv(width * f, width // 2 * f, 1) for f in factors])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [module(x) for module, x in zip(self, maps)]


class ExitHead(nn.Module):
    """Head of one exit: the coarsest map (B, inputs, H, W) to logits (B, C) and the pooled feature (B, width)."""

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.reduce = nn.Sequential(conv(inputs, width, stride=2), conv(width, width, stride=2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.pool(self.reduce(x)).flatten(1)
        return self.fc(feature), feature


class MSDNet(MultiExitNetwork):
    """Multi-scale dense network with an exit behind chosen blocks.

    `Outputs.maps` holds for each exit the maps (B, D_s, H_s, W_s) of all scales, fine to coarse, that the next block
    starts from; for the last exit only the coarsest, which its head reads. With factors (1, 2, 4, 4) the exits' pooled
    features differ in width, and methods that compare them refuse.

    Args:
        variant: Hyperparameters.
        classes: Number of classes.
        exits: Blocks that end in an exit, from 1; the last is also the number of blocks.

    Raises:
        ConfigError: The exits are not ascending numbers from 1.
    """

    backbone: nn.ModuleList

    def __init__(self, variant: Variant, *, classes: int, exits: Sequence[ExitPoint]) -> None:
        super().__init__()
        at = [e for e in exits if isinstance(e, int)]
        if len(at) < len(exits) or sorted(set(at)) != at or not at or at[0] < 1:
            raise ConfigError(
                f"exits {exits_text(exits)} do not fit this network",
                fix="name blocks in ascending order from 1; the last is their number, for example --exits 1,2,3,4",
            )
        self.exit_at = tuple(at)
        self.backbone, widths = _blocks(variant, at[-1])
        inputs = [widths[k - 1] * variant.factors[-1] for k in at]
        self.exits = nn.ModuleList(ExitHead(i, variant.head or i, classes) for i in inputs)

    def forward(self, x: Tensor) -> Outputs:
        state, maps = x, []
        for at, block in enumerate(self.backbone, start=1):
            state = block(state)
            if at in self.exit_at:
                maps.append(tuple(state))
        heads = [head(scales[-1]) for head, scales in zip(self.exits, maps)]
        maps[-1] = maps[-1][-1:]
        return Outputs(tuple(h[0] for h in heads), tuple(h[1] for h in heads), tuple(maps))


def _blocks(variant: Variant, count: int) -> tuple[nn.ModuleList, list[int]]:
    """Build the blocks, with the pyramid in front of the first, and return each one's final width for factor 1.

    The layers are divided into as many equal parts as there are scales; each part but the first starts by dropping the
    finest scale, followed by a transition.
    """
    steps = [variant.base] + [variant.step] * (count - 1)
    part = -(-sum(steps) // len(variant.factors))
    blocks, widths, width, at, factors = nn.ModuleList(), [], variant.channels, 0, variant.factors
    for step in steps:
        modules: list[nn.Module] = [] if blocks else [Pyramid(variant)]
        for _ in range(step):
            drop = at > 0 and at % part == 0
            modules.append(Layer(width, factors, variant.growth, drop=drop))
            width += variant.growth
            if drop:
                factors = factors[1:]
                modules.append(Transition(width, factors))
                width //= 2
            at += 1
        blocks.append(nn.Sequential(*modules))
        widths.append(width)
    return blocks, widths


def msdnet(
    *, classes: int, image_size: int = 224, stem: Stem = "imagenet", exits: Sequence[ExitPoint] = FOUR_STAGES
) -> MSDNet:
    """Build MSDNet for ImageNet or, with the small stem, for CIFAR.

    The default has four blocks; the published code's examples have 5 and 7. The small variant has 1.53 M parameters
    with 100 classes, the large one 19.50 M with 1,000 classes.
    """
    return MSDNet(SMALL if stem == "small" else LARGE, classes=classes, exits=exits)


MSDNET = Architecture(msdnet, has_stems=True)
