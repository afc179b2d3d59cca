"""Multi-exit ResNets of Gao et al. 2022 (Biomimetics 7:195), and exits on any other classifier.

Each exit is a global-context block, a chain of stride-2 blocks that brings the map to the size and width of the
deepest one (as in BYOT, arXiv 1905.08094), average pooling and a linear layer. On ResNets the blocks are bottlenecks,
at all four exits, as in the paper. On other networks they are depthwise-separable, and the deepest exit is the
network's own classifier: with that exit alone it is the plain network.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50
from torchvision.models.resnet import ResNet

from edgekd.errors import ConfigError, closest
from edgekd.models import feature_points
from edgekd.models.base import FINAL, FOUR_STAGES, Architecture, ExitPoint, MultiExitNetwork, Outputs, Stem
from edgekd.models.feature_points import FeaturePoint, MapShape


def bottleneck(inputs: int, outputs: int) -> nn.Sequential:
    """Build 1x1 - 3x3 stride 2 - 1x1, which halves the map: (B, inputs, H, W) -> (B, outputs, H/2, W/2)."""
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


def separable(inputs: int, outputs: int, *, stride: int = 2) -> nn.Sequential:
    """Build depthwise 3x3, 1x1 (MobileNet, arXiv 1704.04861): (B, inputs, H, W) to (B, outputs, H/stride, W/stride)."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride=stride, padding=1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class GlobalContext(nn.Module):
    """Global-context block (GCNet, arXiv 1904.11492), the identity at initialisation.

    The input is averaged with softmax attention from a 1x1 convolution, transformed by linear - LayerNorm - ReLU -
    linear (initialised to zero), and added to the input.

    Args:
        channels: Channels of the map.
        ratio: Channels divided by the width between the linear layers.
    """

    def __init__(self, channels: int, *, ratio: int = 16) -> None:
        super().__init__()
        hidden = max(channels // ratio, 4)  # normalised, one number would be a constant
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


class ExitHead(nn.Module):
    """Head of one exit: a map (B, widths[0], H, W) to logits (B, C) and the pooled feature (B, widths[-1]).

    Args:
        widths: Channels of the map, and behind each block.
        classes: Number of classes C.
        block: Makes the block from one width to the next.
    """

    def __init__(
        self, widths: Sequence[int], classes: int, *, block: Callable[[int, int], nn.Module] = bottleneck
    ) -> None:
        super().__init__()
        self.context = GlobalContext(widths[0])
        self.reduce = nn.Sequential(*[block(a, b) for a, b in itertools.pairwise(widths)])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.pool(self.reduce(self.context(x))).flatten(1)
        return self.fc(feature), feature


class MultiExitResNet(MultiExitNetwork):
    """A torchvision ResNet with an exit behind each of the chosen stages.

    Args:
        backbone: The ResNet; its classifier is removed.
        classes: Number of classes.
        exits: Stages 1 to 4 in rising order, or `layer1` to `layer4` and `final`.
        head: Makes an exit's head from the widths of its stage and of those behind it, and the number of classes.

    Raises:
        ConfigError: An exit is not a stage, or the deepest stage is missing.
    """

    backbone: ResNet

    def __init__(
        self,
        backbone: ResNet,
        *,
        classes: int,
        exits: Sequence[ExitPoint] = FOUR_STAGES,
        head: Callable[[Sequence[int], int], nn.Module] = ExitHead,
    ) -> None:
        super().__init__()
        stages = [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]
        numbers = {f"layer{k}": k for k in range(1, 5)} | {FINAL: 4}
        at = [numbers.get(e, 0) if isinstance(e, str) else e for e in exits]
        if sorted(set(at)) != at or not at or at[0] < 1 or at[-1] != len(stages):
            raise ConfigError(
                f"exits {exits_text(exits)} do not fit this network",
                fix=f"name stages from 1 to {len(stages)} in rising order and end with {len(stages)}, "
                f"for example --exits 1,2,3,4 or --exits 2,4",
            )
        widths = [_stage_width(stage) for stage in stages]
        del backbone.fc
        self.backbone = backbone
        self.exit_at = tuple(at)
        self.exits = nn.ModuleList(head(widths[k - 1 :], classes) for k in at)

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


def _stage_width(stage: nn.Module) -> int:
    return [m for m in stage.modules() if isinstance(m, nn.BatchNorm2d)][-1].num_features


def multi_exit_resnet18(
    *, classes: int, image_size: int = 224, stem: Stem = "imagenet", exits: Sequence[ExitPoint] = FOUR_STAGES
) -> MultiExitResNet:
    """Build the student of Gao et al. 2022.

    With 100 classes and the small stem it has 12.30 M parameters (the paper prints 12.33 M).
    """
    backbone = resnet_backbone(classes=classes, stem=stem)
    return MultiExitResNet(backbone, classes=classes, exits=exits)


def multi_exit_resnet50(
    *, classes: int, image_size: int = 224, stem: Stem = "imagenet", exits: Sequence[ExitPoint] = FOUR_STAGES
) -> MultiExitResNet:
    """Build ResNet50 with the same exits, for table 6 of Gao et al. 2022."""
    backbone = resnet_backbone(classes=classes, stem=stem, make=resnet50)
    return MultiExitResNet(backbone, classes=classes, exits=exits)


def resnet_backbone(*, classes: int, stem: Stem = "imagenet", make: Callable[..., ResNet] = resnet18) -> ResNet:
    """Build torchvision's ResNet18, or another ResNet with `make`, with random weights."""
    net = make(num_classes=classes)
    return small_image_stem(net) if stem == "small" else net


def small_image_stem(net: ResNet) -> ResNet:
    """Replace the ImageNet stem in place by a 3x3 stride-1 convolution without pooling, as for CIFAR."""
    net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    return net


class MultiExit(MultiExitNetwork):
    """Any classifier with exits at chosen feature points; its own classifier is the deepest exit.

    A shallow exit's map is brought to the size and width of the last stage's, whose average is the deepest exit's
    feature.

    Args:
        backbone: A classifier from images to logits.
        classes: Number of classes.
        image_size: Side of the images in pixels.
        exits: Stages, numbered from 1 (see `feature_points.stage_ends`), or names of feature points, in the order in
            which they run; the last is the highest stage's number or `final`.

    Raises:
        ConfigError: An exit is not a feature point, out of order, behind the last stage, or a point at which the
            network cannot be cut.
    """

    def __init__(
        self, backbone: nn.Module, *, classes: int, image_size: int, exits: Sequence[ExitPoint] = FOUR_STAGES
    ) -> None:
        super().__init__()
        points = _exit_points(backbone, exits, image_size=image_size)
        self.backbone = backbone
        self.cuts = tuple(point.name for point in points)
        self.exit_at = self.cuts
        self.exits = nn.ModuleList(_separable_head(point.shape, points[-1].shape, classes) for point in points[:-1])

    def forward(self, x: Tensor) -> Outputs:
        with feature_points.observe(self, self.cuts) as seen:
            deepest = main_logits(self.backbone(x))
        maps = [seen[name] for name in self.cuts]
        heads = [head(m) for head, m in zip(self.exits, maps)]
        logits, features = ([h[k] for h in heads] for k in range(2))
        return Outputs((*logits, deepest), (*features, feature_points.flat(maps[-1])), tuple(maps))


def _exit_points(backbone: nn.Module, exits: Sequence[ExitPoint], *, image_size: int) -> list[FeaturePoint]:
    """Return the feature points of the exits, checked; the deepest is the end of the last stage."""
    found = feature_points.trace(backbone, image_size=image_size).points()
    known = {point.name: point for point in found}
    ends, order = feature_points.stage_ends(found), list(known)
    stages = f"the stages are {', '.join(f'{k} {name}' for k, name in enumerate(ends, start=1))}"
    if not exits or exits[-1] not in (FINAL, len(ends)):
        raise ConfigError(
            f"exits {exits_text(exits)} omit the deepest; {stages}",
            fix=f"end with {FINAL}, for example --exits 2,{FINAL}",
        )
    names = [*(_point_name(backbone, point, ends, order, stages) for point in exits[:-1]), ends[-1]]
    for name, behind in itertools.pairwise(names):
        if order.index(name) >= order.index(behind):
            late = f"'{name}' does not come before '{behind}'" + (", the last stage" if behind == ends[-1] else "")
            raise ConfigError(
                f"exits {exits_text(exits)} are not in order: {late}", fix="name them shallow to deep, once each"
            )
    feature_points.check_cuts(backbone, names, image_size=image_size)
    return [known[name] for name in names]


def _point_name(backbone: nn.Module, point: ExitPoint, ends: Sequence[str], order: Sequence[str], stages: str) -> str:
    if isinstance(point, int):
        if not 1 <= point < len(ends):
            raise ConfigError(f"exit {point}: no such stage before the deepest; {stages}", fix="name one of these")
        return ends[point - 1]
    feature_points.find(backbone, point)
    if point not in order:
        raise ConfigError(f"exit '{point}' returns no map for images of this size", fix=closest(point, order) or stages)
    return point


def exits_text(exits: Sequence[ExitPoint]) -> str:
    """Return exits as they are given on the command line."""
    return ",".join(map(str, exits))


def main_logits(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the logits of a classifier without the auxiliary ones that some networks return in training."""
    return output if isinstance(output, Tensor) else output[0]


def _separable_head(shape: MapShape, last: MapShape, classes: int) -> ExitHead:
    """Build a head from a map (D, H, W) to the last stage's size and width: each halving doubles the width."""
    steps = max(round(math.log2(shape[1] / last[1])), 0)
    widths = [shape[0], *(min(shape[0] * 2**k, last[0]) for k in range(1, steps)), last[0]]
    return ExitHead(widths, classes, block=separable if steps else functools.partial(separable, stride=1))


MULTI_EXIT_RESNET18 = Architecture(multi_exit_resnet18, hub="resnet18", has_stems=True)
MULTI_EXIT_RESNET50 = Architecture(multi_exit_resnet50, hub="resnet50", has_stems=True)
