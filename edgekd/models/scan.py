"""SCAN: a ResNet whose shallow exits apply attention to their map before they reduce it (Zhang et al., NeurIPS 2019).

The exits are those of the published code (pytorch-scalable-neural-networks aac136e), whose stem is the small one. Train
it with method `scan`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models import resnet50

from edgekd.models.base import FOUR_STAGES, Architecture, ExitPoint, Stem
from edgekd.models.multi_exit import MultiExitResNet, resnet_backbone


class Attention(nn.Module):
    """Multiplies (B, channels, H, W) by a mask in 0..1: a strided convolution, a transposed one, a sigmoid.

    The transposed convolution doubles the side, so the mask of an odd side is one too long and is cropped.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mask = nn.Sequential(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1),
            nn.BatchNorm2d(channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        mask: Tensor = self.mask(x)
        return x * mask[:, :, : x.shape[2], : x.shape[3]]


def scala(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Build attention and a bottleneck: (B, inputs, H, W) -> (B, outputs, H // stride, W // stride).

    The bottleneck has 128 channels; its middle is a stride x stride convolution with that stride.
    """
    return nn.Sequential(
        Attention(inputs),
        nn.Conv2d(inputs, 128, 1),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Conv2d(128, 128, stride, stride=stride),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Conv2d(128, outputs, 1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class ScanHead(nn.Module):
    """Head of one exit: a map (B, widths[0], H, W) to logits and the pooled feature (B, widths[-1]).

    The deepest exit's head only pools.
    """

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        halvings = len(widths) - 1
        self.reduce = scala(widths[0], widths[-1], 2**halvings) if halvings else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.pool(self.reduce(x)).flatten(1)
        return self.fc(feature), feature


def scan_resnet18(
    *, classes: int, image_size: int = 224, stem: Stem = "imagenet", exits: Sequence[ExitPoint] = FOUR_STAGES
) -> MultiExitResNet:
    """Build SCAN on ResNet18; 15.16 M parameters with 100 classes and the small stem."""
    backbone = resnet_backbone(classes=classes, stem=stem)
    return MultiExitResNet(backbone, classes=classes, exits=exits, head=ScanHead)


def scan_resnet50(
    *, classes: int, image_size: int = 224, stem: Stem = "imagenet", exits: Sequence[ExitPoint] = FOUR_STAGES
) -> MultiExitResNet:
    """Build SCAN on ResNet50; 61.15 M parameters with 100 classes and the small stem, 34.42 M of them in attention."""
    backbone = resnet_backbone(classes=classes, stem=stem, make=resnet50)
    return MultiExitResNet(backbone, classes=classes, exits=exits, head=ScanHead)


SCAN_RESNET18 = Architecture(scan_resnet18, hub="resnet18", has_stems=True)
SCAN_RESNET50 = Architecture(scan_resnet50, hub="resnet50", has_stems=True)
