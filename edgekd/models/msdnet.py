"""MSDNet: dense layers on several scales at once, an exit after each block (Huang et al., arXiv 1703.09844).

Wiring and widths are those of the authors' PyTorch code (MSDNet-PyTorch f654595). Between layers the network holds
one map a scale, fine to coarse; each layer widens every map by its growth and, on the way, the finest scales are
dropped. Weights start as torch's own, as they do there: that code's initialisation reaches no convolution. Train it
with method `ce`, the paper's joint training.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekd.errors import ConfigError
from edgekd.models.base import Outputs, Stem


@dataclass(frozen=True, kw_only=True)
class Form:
    """A setting of the paper.

    channels: of the finest map at the start. growth: channels that a layer adds to it. factors: a scale's multiple of
    both, and of the bottleneck in front of its convolutions. base, step: layers of the first and of each further
    block. head: channels of the exits' convolutions; 0 for as many as the coarsest map has. small_stem: 3x3, stride 1.
    """

    channels: int
    growth: int
    factors: tuple[int, ...]
    base: int = 4
    step: int
    head: int
    small_stem: bool


SMALL = Form(channels=16, growth=6, factors=(1, 2, 4), step=2, head=128, small_stem=True)
"""CIFAR: three scales, a 3x3 stem."""
LARGE = Form(channels=32, growth=16, factors=(1, 2, 4, 4), step=4, head=0, small_stem=False)
"""ImageNet: four scales, a 7x7 stem of stride 2 and max-pooling."""


def conv(inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU; the map keeps its size or is halved (rounded up)."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def squeezed(inputs: int, outputs: int, factor: int, *, stride: int = 1) -> nn.Sequential:
    """A 3x3 `conv` behind a 1x1 one that leaves at most `factor * outputs` channels."""
    inner = min(inputs, factor * outputs)
    return nn.Sequential(conv(inputs, inner, 1), conv(inner, outputs, stride=stride))


class Pyramid(nn.ModuleList):
    """Image (B, 3, H, W) to the first map of each scale: the stem, then a strided convolution for each further one."""

    def __init__(self, form: Form) -> None:
        widths = [form.channels * factor for factor in form.factors]
        stem = conv(3, widths[0]) if form.small_stem else _large_stem(widths[0])
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
    """One dense layer. A scale's new map is its old one and what it grows, half from itself and half from the finer
    scale; the finest has no finer one and grows from itself alone, or is dropped.

    width: channels of a map of factor 1. factors: of the scales that come in.
    """

    def __init__(self, width: int, factors: Sequence[int], growth: int, *, drop: bool) -> None:
        super().__init__()
        first = factors[0]
        self.finest = None if drop else squeezed(width * first, growth * first, first)
        pairs = list(itertools.pairwise(factors))
        self.down = nn.ModuleList(squeezed(width * a, growth * b // 2, a, stride=2) for a, b in pairs)
        self.same = nn.ModuleList(squeezed(width * b, growth * b // 2, b) for _, b in pairs)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        grown = [] if self.finest is None else [torch.cat([maps[0], self.finest(maps[0])], 1)]
        for finer, own, down, same in zip(maps, maps[1:], self.down, self.same):
            grown.append(torch.cat([own, down(finer), same(own)], 1))
        return grown


class Transition(nn.ModuleList):
    """1x1 convolutions, one a scale, that halve the channels."""

    def __init__(self, width: int, factors: Sequence[int]) -> None:
        super().__init__([conv(width * f, width // 2 * f, 1) for f in factors])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [module(x) for module, x in zip(self, maps)]


class Exit(nn.Module):
    """Coarsest map (B, inputs, H, W) to logits and the pooled feature (B, width)."""

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.reduce = nn.Sequential(conv(inputs, width, stride=2), conv(width, width, stride=2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.pool(self.reduce(x)).flatten(1)
        return self.fc(feature), feature


class MSDNet(nn.Module):
    """`Outputs.maps` holds for each exit the tuple of scale maps (B, D_s, H_s, W_s), fine to coarse, that the next
    block takes over; for the last exit only the coarsest, which it reads.

    exits: the blocks that end in one; the last is also how many blocks there are. With factors (1, 2, 4, 4) the
    pooled features of the exits differ in width, and methods that compare them refuse.

    Raises:
        ConfigError: exits that are not numbers rising from 1 or more.
    """

    def __init__(self, form: Form, *, classes: int, exits: Sequence[int | str]) -> None:
        super().__init__()
        at = [e for e in exits if isinstance(e, int)]
        if len(at) < len(exits) or sorted(set(at)) != at or not at or at[0] < 1:
            raise ConfigError(
                f"exits {','.join(map(str, exits))} do not fit this network",
                fix="name blocks from 1 in rising order; the last is how many there are, for example --exits 1,2,3,4",
            )
        self.exit_at = tuple(at)
        self.backbone, widths = _blocks(form, at[-1])
        inputs = [widths[k - 1] * form.factors[-1] for k in at]
        self.exits = nn.ModuleList(Exit(i, form.head or i, classes) for i in inputs)

    def forward(self, x: Tensor) -> Outputs:
        state, maps = x, []
        for at, block in enumerate(self.backbone, start=1):
            state = block(state)
            if at in self.exit_at:
                maps.append(tuple(state))
        heads = [head(scales[-1]) for head, scales in zip(self.exits, maps)]
        maps[-1] = maps[-1][-1:]
        return Outputs(tuple(h[0] for h in heads), tuple(h[1] for h in heads), tuple(maps))


def _blocks(form: Form, count: int) -> tuple[nn.ModuleList, list[int]]:
    """The blocks, the pyramid in front of the first, and each one's width at its end (channels of factor 1).

    The layers are cut into as many equal parts as there are scales; each part but the first starts by dropping the
    finest scale, with a transition behind.
    """
    steps = [form.base] + [form.step] * (count - 1)
    part = -(-sum(steps) // len(form.factors))
    blocks, widths, width, at, factors = nn.ModuleList(), [], form.channels, 0, form.factors
    for step in steps:
        modules: list[nn.Module] = [] if blocks else [Pyramid(form)]
        for _ in range(step):
            drop = at > 0 and at % part == 0
            modules.append(Layer(width, factors, form.growth, drop=drop))
            width += form.growth
            if drop:
                factors = factors[1:]
                modules.append(Transition(width, factors))
                width //= 2
            at += 1
        blocks.append(nn.Sequential(*modules))
        widths.append(width)
    return blocks, widths


def msdnet(*, classes: int, stem: Stem = "imagenet", exits: Sequence[int | str] = (1, 2, 3, 4)) -> MSDNet:
    """MSDNet in its ImageNet form, or with the small stem in its CIFAR form; four blocks unless exits say otherwise
    (the published code's examples have 7 and 5).

    Parameters: 1.53 M with 100 classes in the small form, 19.50 M with 1,000 classes in the large one.
    """
    return MSDNet(SMALL if stem == "small" else LARGE, classes=classes, exits=exits)
