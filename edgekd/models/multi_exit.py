"""Networks that answer at several depths: the ResNets of Gao et al. 2022 (Biomimetics 7:195), and any other.

Each exit is a global-context block, a chain of stride-2 blocks that brings the map to the size and width of the
deepest one (as in BYOT, arXiv 1905.08094), average pooling and a linear layer. On ResNets the blocks are bottlenecks,
at all four exits, as in the paper. On other networks they are depthwise-separable, and the deepest exit is the
network's own classifier: with that exit alone it is the plain network."""

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
from edgekd.models.base import FINAL, Outputs, Stem


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


def separable(inputs: int, outputs: int, *, stride: int = 2) -> nn.Sequential:
    """Depthwise 3x3 - 1x1 (MobileNet, arXiv 1704.04861): (B, inputs, H, W) -> (B, outputs, H/stride, W/stride)."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride=stride, padding=1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class ExitHead(nn.Module):
    """One exit: widths[0] channels in, widths[-1] features and the logits out; a block from each width to the next."""

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


class MultiExitResNet(nn.Module):
    """A torchvision ResNet whose chosen stages (1 to 4, or `layer1` to `layer4` and `final`) each end in an exit.

    head: makes one from the widths of the stage and of those behind it, and the number of classes.

    Raises:
        ConfigError: an exit that is no stage, or the deepest stage left out.
    """

    def __init__(
        self,
        backbone: ResNet,
        *,
        classes: int,
        exits: Sequence[int | str] = (1, 2, 3, 4),
        head: Callable[[Sequence[int], int], nn.Module] = ExitHead,
    ) -> None:
        super().__init__()
        stages = [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]
        numbers = {f"layer{k}": k for k in range(1, 5)} | {FINAL: 4}
        at = [numbers.get(e, 0) if isinstance(e, str) else e for e in exits]
        if sorted(set(at)) != at or not at or at[0] < 1 or at[-1] != len(stages):
            raise ConfigError(
                f"exits {_text(exits)} do not fit this network",
                fix=f"name stages from 1 to {len(stages)} in rising order and end with {len(stages)}, "
                f"for example --exits 1,2,3,4 or --exits 2,4",
            )
        widths = [_width(stage) for stage in stages]
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


class MultiExit(nn.Module):
    """Any classifier with exits at chosen feature points; its own classifier is the deepest.

    exits: stages (numbers from 1, the ends that `points.stages` finds) or names of feature points, in the order in
    which they run; the last is the highest stage's number or `final`. A shallow exit's map is brought to the size
    and width of the last stage's, whose average is the deepest exit's feature.

    Raises:
        ConfigError: an exit that is no point, out of order, behind the last stage, or where the network cannot be cut.
    """

    def __init__(
        self, backbone: nn.Module, *, classes: int, image_size: int, exits: Sequence[int | str] = (1, 2, 3, 4)
    ) -> None:
        super().__init__()
        at = _exit_points(backbone, exits, image_size=image_size)
        self.backbone = backbone
        self.exit_at = tuple(point.name for point in at)
        self.exits = nn.ModuleList(_light_head(point.shape, at[-1].shape, classes) for point in at[:-1])

    def forward(self, x: Tensor) -> Outputs:
        with feature_points.observe(self, self.exit_at) as seen:
            answer = deepest(self.backbone(x))
        maps = [seen[name] for name in self.exit_at]
        heads = [head(m) for head, m in zip(self.exits, maps)]
        logits, features = ([h[k] for h in heads] for k in range(2))
        return Outputs((*logits, answer), (*features, feature_points.flat(maps[-1])), tuple(maps))


def deepest(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The logits of a classifier, without the auxiliary ones that some return in training."""
    return out if isinstance(out, Tensor) else out[0]


def _light_head(shape: tuple[int, int, int], last: tuple[int, int, int], classes: int) -> ExitHead:
    """From a map (D, H, W) to the last stage's size and width: each halving doubles the width."""
    steps = max(round(math.log2(shape[1] / last[1])), 0)
    widths = [shape[0], *(min(shape[0] * 2**k, last[0]) for k in range(1, steps)), last[0]]
    return ExitHead(widths, classes, block=separable if steps else functools.partial(separable, stride=1))


def _exit_points(backbone: nn.Module, exits: Sequence[int | str], *, image_size: int) -> list[feature_points.Point]:
    """The points of the exits, checked; the deepest is the end of the last stage."""
    known = {point.name: point for point in feature_points.points(backbone, image_size=image_size)}
    ends, order = feature_points.ends(list(known.values())), list(known)
    where = f"the stages are {', '.join(f'{k} {name}' for k, name in enumerate(ends, start=1))}"
    if not exits or exits[-1] not in (FINAL, len(ends)):
        raise ConfigError(
            f"exits {_text(exits)} leave out the deepest; {where}",
            fix=f"end with {FINAL}, for example --exits 2,{FINAL}",
        )
    names = [*(_point_name(backbone, e, ends, order, where) for e in exits[:-1]), ends[-1]]
    for name, behind in itertools.pairwise(names):
        if order.index(name) >= order.index(behind):
            late = f"'{name}' does not come before '{behind}'" + (", the last stage" if behind == ends[-1] else "")
            raise ConfigError(
                f"exits {_text(exits)} are not in order: {late}", fix="name them shallow to deep, once each"
            )
    feature_points.check_cuts(backbone, names, image_size=image_size)
    return [known[name] for name in names]


def _point_name(backbone: nn.Module, asked: int | str, ends: Sequence[str], order: Sequence[str], where: str) -> str:
    if isinstance(asked, int):
        if not 1 <= asked < len(ends):
            raise ConfigError(f"exit {asked}: no such stage before the deepest; {where}", fix="name one of these")
        return ends[asked - 1]
    feature_points.find(backbone, asked)
    if asked not in order:
        raise ConfigError(f"exit '{asked}' returns no map for images of this size", fix=closest(asked, order) or where)
    return asked


def _text(exits: Sequence[int | str]) -> str:
    return ",".join(map(str, exits))


def _width(stage: nn.Module) -> int:
    return [m for m in stage.modules() if isinstance(m, nn.BatchNorm2d)][-1].num_features


def small_image_stem(net: ResNet) -> ResNet:
    """Replace the ImageNet stem by a 3x3 stride-1 convolution without pooling, as for CIFAR."""
    net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    return net


def resnet_backbone(*, classes: int, stem: Stem = "imagenet", make: Callable[..., ResNet] = resnet18) -> ResNet:
    """torchvision's ResNet18 (or what `make` makes) without weights."""
    net = make(num_classes=classes)
    return small_image_stem(net) if stem == "small" else net


def multi_exit_resnet18(
    *, classes: int, stem: Stem = "imagenet", exits: Sequence[int | str] = (1, 2, 3, 4)
) -> MultiExitResNet:
    """Paper A's student. 100 classes and the small-image stem: 12.30 M parameters (the paper prints 12.33 M)."""
    return MultiExitResNet(resnet_backbone(classes=classes, stem=stem), classes=classes, exits=exits)


def multi_exit_resnet50(
    *, classes: int, stem: Stem = "imagenet", exits: Sequence[int | str] = (1, 2, 3, 4)
) -> MultiExitResNet:
    """The same exits on ResNet50, for paper A's table 6."""
    backbone = resnet_backbone(classes=classes, stem=stem, make=resnet50)
    return MultiExitResNet(backbone, classes=classes, exits=exits)
