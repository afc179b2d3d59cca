"""Networks by name: edgekd's own, any timm or torchvision classifier, and each of these with exits."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import get_args

import timm
import torchvision.models
from torch import Tensor, nn

from edgekd.errors import ConfigError, closest, nearest
from edgekd.models.base import FOUR_STAGES, Architecture, ExitPoint, MultiExitNetwork, Outputs, Stem
from edgekd.models.multi_exit import MultiExit, main_logits, small_image_stem
from edgekd.registry import Registry

PREFIX = "multi-exit-"
"""Prefix to the name of a timm or torchvision classifier: that network with exits."""
LIBRARY_STEMS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
"""The libraries' networks that have a choice of stem."""

NETWORKS: Registry[Architecture] = Registry(
    "network",
    "networks",
    Architecture,
    {
        "multi-exit-resnet18": "edgekd.models.multi_exit:MULTI_EXIT_RESNET18",
        "multi-exit-resnet50": "edgekd.models.multi_exit:MULTI_EXIT_RESNET50",
        "msdnet": "edgekd.models.msdnet:MSDNET",
        "scan-resnet18": "edgekd.models.scan:SCAN_RESNET18",
        "scan-resnet50": "edgekd.models.scan:SCAN_RESNET50",
        "mlp": "edgekd.models.papers:MLP",
        "compact-vgg": "edgekd.models.papers:COMPACT_VGG",
        "deep-pap": "edgekd.models.papers:DEEP_PAP",
    },
)
"""Networks of edgekd and of other packages; timm's and torchvision's are found by `library`."""


class SingleExit(MultiExitNetwork):
    """A plain classifier as a network with one exit, without features or maps.

    Args:
        backbone: A classifier from images (B, 3, H, W) to logits (B, C).
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Outputs:
        return Outputs((main_logits(self.backbone(x)),), (), ())


def build(
    name: str,
    *,
    classes: int,
    image_size: int,
    exits: Sequence[ExitPoint] = FOUR_STAGES,
    pretrained: bool = False,
    stem: Stem = "imagenet",
) -> MultiExitNetwork:
    """Build a network from images (B, 3, H, W) to `Outputs`, on the CPU.

    Args:
        name: A name in `NETWORKS`, any timm or torchvision classifier (timm has precedence), or `multi-exit-` and such
            a name.
        classes: Number of classes.
        image_size: Side of the images in pixels.
        exits: Exits of a multi-exit network, shallow to deep: stages by number, or names of feature points; the last is
            the highest stage or `final`.
        pretrained: Download a library network's weights from its hub.
        stem: `small` makes the maps of images of up to about 64 pixels four times as wide and high, at 15 times the
            multiply-adds for ResNet18. Only some networks have that choice (`has_stems`).

    Raises:
        ConfigError: An unknown name, exits that do not fit, weights that cannot be downloaded, or no such stem.
    """
    if stem == "small" and not has_stems(name):
        own = [known for known in NETWORKS if has_stems(known)]
        raise ConfigError(f"'{name}' has no small stem", fix=f"omit it; it is for {', '.join([*LIBRARY_STEMS, *own])}")
    if name in NETWORKS:
        net = NETWORKS[name].build(classes=classes, image_size=image_size, stem=stem, exits=exits)
        return net if isinstance(net, MultiExitNetwork) else SingleExit(net)
    net = _library_network(name, classes=classes, pretrained=pretrained)
    if stem == "small":
        net = small_image_stem(net)
    if name.startswith(PREFIX):
        return MultiExit(net, classes=classes, image_size=image_size, exits=exits)
    return SingleExit(net)


def has_stems(name: str) -> bool:
    """Return True if a network can be built with either stem."""
    if name in NETWORKS:
        return NETWORKS[name].has_stems
    return name.removeprefix(PREFIX).partition(".")[0] in LIBRARY_STEMS


def _library_network(name: str, *, classes: int, pretrained: bool) -> nn.Module:
    """Build timm's or torchvision's network called `name`, with or without `multi-exit-`."""
    of_timm, of_vision = library()
    plain = name.removeprefix(PREFIX)
    if plain.partition(".")[0] not in of_timm | of_vision:
        raise ConfigError(f"no network '{name}'", fix=nearest_network(name))
    try:
        if plain in of_vision - of_timm:
            net = torchvision.models.get_model(plain, weights="DEFAULT" if pretrained else None)
            return _with_new_head(net, classes)
        return timm.create_model(plain, pretrained=pretrained, num_classes=classes)
    except (OSError, RuntimeError) as error:  # hub errors are OSError or RuntimeError
        if not pretrained:
            raise
        raise ConfigError(
            f"weights of '{plain}' cannot be fetched ({type(error).__name__}: {str(error).splitlines()[0]})",
            fix="give a local file with --weights FILE, or --weights none",
        ) from error


@functools.cache
def library() -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of timm's and of torchvision's classifiers."""
    return frozenset(timm.list_models()), frozenset(torchvision.models.list_models(module=torchvision.models))


def nearest_network(name: str) -> str:
    """Return advice for an unknown name, without the whole list of 1,000 names."""
    names = frozenset().union(*library())
    close = closest(name, [*NETWORKS, *names, *(PREFIX + n for n in names)])
    return f"{close} edgekd's own: {', '.join(NETWORKS)}; others: edgekd models list, and {PREFIX}NAME for each".strip()


def _with_new_head(net: nn.Module, classes: int) -> nn.Module:
    """Replace the last linear or 1x1-convolution classifier of a torchvision network."""
    name, last = [(n, m) for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    new: nn.Module
    if isinstance(last, nn.Linear):
        new = nn.Linear(last.in_features, classes)
    else:
        height, width = last.kernel_size
        new = nn.Conv2d(last.in_channels, classes, (height, width))
    parent, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(parent), leaf, new)
    return net


def hub_name(name: str) -> str:
    """Return the library network whose pretrained weights fit the backbone of `name`.

    Raises:
        ConfigError: There is none.
    """
    if name not in NETWORKS:
        return name.removeprefix(PREFIX)
    if not NETWORKS[name].hub:
        raise ConfigError(f"no hub has weights for '{name}'", fix="train it from random weights with --weights none")
    return NETWORKS[name].hub


def stem_of(name: str, state: Mapping[str, Tensor]) -> Stem:
    """Return the stem of the network `name` that weights belong to, from their first convolution."""
    first = next((v for v in state.values() if v.dim() == 4 and v.shape[1] == 3), None)
    return "small" if has_stems(name) and first is not None and first.shape[-1] == 3 else "imagenet"


def stem_named(text: str) -> Stem:
    """Return the stem called `imagenet` or `small`.

    Raises:
        ConfigError: Another word.
    """
    stems: tuple[Stem, ...] = get_args(Stem)
    for stem in stems:
        if text == stem:
            return stem
    raise ConfigError(f"--stem {text}: no such stem", fix=nearest(text, stems))
