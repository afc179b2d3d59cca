"""Multi-exit ResNet: a classifier after each stage, as in Gao et al. 2022 (Biomimetics 7:195).

Each exit is a global-context block, a chain of stride-2 bottlenecks that brings the map to the size and
width of the deepest one (as in BYOT, arXiv 1905.08094), average pooling and a linear layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.resnet import ResNet

from edgekd.errors import ConfigError

SMALL_IMAGE = 64
"""Images up to this side (pixels) get the 3x3 stride-1 stem without max-pooling used on CIFAR."""


class Outputs(NamedTuple):
    """What a network returns, one entry an exit, shallow to deep.

    logits: (B, C) each. features: (B, D) each, pooled, before the linear layer.
    maps: (B, D_k, H_k, W_k), the backbone's stage outputs, where the next stage takes over.
    """

    logits: tuple[Tensor, ...]
    features: tuple[Tensor, ...]
    maps: tuple[Tensor, ...]


class GlobalContext(nn.Module):
    """Global-context block (GCNet, arXiv 1904.11492): identity at initialisation.

    Softmax-pooled 1x1 attention, then 1x1 - LayerNorm - ReLU - 1x1 (zero-initialised), added to the input.
    """

    def __init__(self, channels: int, *, ratio: int = 16) -> None:
        super().__init__()
        hidden = max(channels // ratio, 1)
        self.attention = nn.Conv2d(channels, 1, 1)
        last = nn.Linear(hidden, channels)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.transform = nn.Sequential(nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]  # reshaped with -1 for B, so that the exported graph computes no shapes
        weights = self.attention(x).reshape(-1, height * width, 1).softmax(dim=1)
        context = torch.matmul(x.reshape(-1, channels, height * width), weights).reshape(-1, channels)  # (B, C)
        added: Tensor = self.transform(context)[:, :, None, None]
        return x + added


def bottleneck(inputs: int, outputs: int) -> nn.Sequential:
    """1x1 - 3x3 stride 2 - 1x1, halving the map: (B, inputs, H, W) -> (B, outputs, H/2, W/2)."""
    middle = outputs // 4
    return nn.Sequential(
        nn.Conv2d(inputs, middle, 1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Conv2d(middle, middle, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Conv2d(middle, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class ExitHead(nn.Module):
    """One exit: widths[0] channels in, widths[-1] features and the logits out."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.context = GlobalContext(widths[0])
        self.reduce = nn.Sequential(*[bottleneck(a, b) for a, b in itertools.pairwise(widths)])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.pool(self.reduce(self.context(x))).flatten(1)
        return self.fc(feature), feature


class MultiExitResNet(nn.Module):
    """A torchvision ResNet whose chosen stages (1 to 4) each end in an exit.

    Raises:
        ConfigError: an exit that is no stage, or the deepest stage left out.
    """

    def __init__(self, backbone: ResNet, *, classes: int, exits: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__()
        stages = [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]
        if sorted(set(exits)) != list(exits) or not exits or exits[0] < 1 or exits[-1] != len(stages):
            raise ConfigError(
                f"exits {','.join(map(str, exits))} do not fit this network",
                fix=f"name stages from 1 to {len(stages)} in rising order and end with {len(stages)}, "
                f"for example --exits 1,2,3,4 or --exits 2,4",
            )
        widths = [_width(stage) for stage in stages]
        del backbone.fc
        self.backbone = backbone
        self.exit_at = tuple(exits)
        self.exits = nn.ModuleList(ExitHead(widths[at - 1 :], classes) for at in exits)

    def forward(self, x: Tensor) -> Outputs:
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        maps = []
        for at, stage in enumerate((net.layer1, net.layer2, net.layer3, net.layer4), start=1):
            x = stage(x)
            if at in self.exit_at:
                maps.append(x)
        heads = [head(m) for head, m in zip(self.exits, maps)]
        return Outputs(tuple(h[0] for h in heads), tuple(h[1] for h in heads), tuple(maps))


def _width(stage: nn.Module) -> int:
    return [m for m in stage.modules() if isinstance(m, nn.BatchNorm2d)][-1].num_features


def small_image_stem(net: ResNet) -> ResNet:
    """Replace the ImageNet stem by a 3x3 stride-1 convolution without pooling, as for CIFAR."""
    net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    return net


def resnet_backbone(*, classes: int, image_size: int) -> ResNet:
    """torchvision's ResNet18 without weights, its stem chosen by image_size (pixels)."""
    net = resnet18(num_classes=classes)
    return small_image_stem(net) if image_size <= SMALL_IMAGE else net


def multi_exit_resnet18(*, classes: int, image_size: int, exits: Sequence[int] = (1, 2, 3, 4)) -> MultiExitResNet:
    """Paper A's student. 100 classes and the small-image stem: 12.30 M parameters (the paper prints 12.33 M)."""
    return MultiExitResNet(resnet_backbone(classes=classes, image_size=image_size), classes=classes, exits=exits)
