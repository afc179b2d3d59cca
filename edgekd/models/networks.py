"""Networks by name: edgekd's own students, any timm or torchvision classifier, and exits on each of these."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, get_args

import timm
import torchvision.models
from torch import Tensor, nn

from edgekd.errors import ConfigError, closest, nearest
from edgekd.models.base import Outputs, Stem
from edgekd.models.msdnet import msdnet
from edgekd.models.multi_exit import MultiExit, deepest, multi_exit_resnet18, multi_exit_resnet50, small_image_stem
from edgekd.models.papers import compact_vgg, deep_pap, mlp
from edgekd.models.scan import scan_resnet18, scan_resnet50

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
"""The libraries' networks that have a choice of stem."""
PREFIX = "multi-exit-"
"""In front of any library's name: that network with exits."""


class Own(NamedTuple):
    """A network of edgekd's own.

    make: takes classes and, if it is plain, image_size, else stem and exits. hub: the network whose weights fit its
    backbone, if there is one. plain: it returns logits alone.
    """

    make: Callable[..., nn.Module]
    hub: str = ""
    plain: bool = False


OWN: dict[str, Own] = {
    "multi-exit-resnet18": Own(multi_exit_resnet18, hub="resnet18"),
    "multi-exit-resnet50": Own(multi_exit_resnet50, hub="resnet50"),
    "msdnet": Own(msdnet),
    "scan-resnet18": Own(scan_resnet18, hub="resnet18"),
    "scan-resnet50": Own(scan_resnet50, hub="resnet50"),
    "mlp": Own(mlp, plain=True),
    "compact-vgg": Own(compact_vgg, plain=True),
    "deep-pap": Own(deep_pap, plain=True),
}
STEMS = (*RESNETS, *(name for name, own in OWN.items() if not own.plain))
"""The networks that have a choice of stem; a library's also with exits."""


class SingleExit(nn.Module):
    """A plain classifier, returning `Outputs` with one exit and no features or maps."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Outputs:
        return Outputs((deepest(self.backbone(x)),), (), ())


def build(
    name: str,
    *,
    classes: int,
    image_size: int,
    exits: Sequence[int | str] = (1, 2, 3, 4),
    pretrained: bool = False,
    stem: Stem = "imagenet",
) -> nn.Module:
    """A network that maps (B, 3, H, W) to `Outputs`, on the CPU.

    name: one of `OWN`, any timm or torchvision classifier (timm is asked first), or `multi-exit-` and such a name.
    exits: where a multi-exit network answers, shallow to deep: stages by number, or names of feature points; the last
    is the highest stage or `final`. pretrained: weights of a library's network from its hub. stem: `small` keeps the
    map of images of up to about 64 pixels four times as wide and high, at 15 times the
    multiply-adds for ResNet18; only the networks of `has_stems` have that choice.

    Raises:
        ConfigError: an unknown name, exits that do not fit, weights that cannot be fetched, or a stem that it lacks.
    """
    if stem == "small" and not has_stems(name):
        raise ConfigError(f"'{name}' has no small stem", fix=f"leave it out; it is there for {', '.join(STEMS)}")
    if name in OWN:
        make, _, plain = OWN[name]
        if plain:
            return SingleExit(make(classes=classes, image_size=image_size))
        return make(classes=classes, stem=stem, exits=exits)
    net = _classifier(name, classes=classes, pretrained=pretrained)
    if stem == "small":
        net = small_image_stem(net)
    if name.startswith(PREFIX):
        return MultiExit(net, classes=classes, image_size=image_size, exits=exits)
    return SingleExit(net)


def hub_name(name: str) -> str:
    """The hub network whose weights fit `name`'s backbone.

    Raises:
        ConfigError: there is none.
    """
    if name not in OWN:
        return name.removeprefix(PREFIX)
    if not OWN[name].hub:
        raise ConfigError(f"no hub has weights for '{name}'", fix="train it from chance with --weights none")
    return OWN[name].hub


def stem_named(text: str) -> Stem:
    """`imagenet` or `small`."""
    if text in get_args(Stem):
        return text  # type: ignore[return-value]
    raise ConfigError(f"--stem {text}: no such stem", fix=nearest(text, get_args(Stem)))


def has_stems(name: str) -> bool:
    """Whether a network can be built with either stem."""
    return (name if name in OWN else name.removeprefix(PREFIX).partition(".")[0]) in STEMS


def stem_of(name: str, state: Mapping[str, Tensor]) -> Stem:
    """The stem of the network `name` that these weights are of, told by the convolution that takes the image."""
    first = next((v for v in state.values() if v.dim() == 4 and v.shape[1] == 3), None)
    return "small" if has_stems(name) and first is not None and first.shape[-1] == 3 else "imagenet"


@functools.cache
def library() -> tuple[frozenset[str], frozenset[str]]:
    """The names of timm's and of torchvision's classifiers."""
    return frozenset(timm.list_models()), frozenset(torchvision.models.list_models(module=torchvision.models))


def _classifier(name: str, *, classes: int, pretrained: bool) -> nn.Module:
    """The library's network behind `name`, with or without `multi-exit-`."""
    of_timm, of_vision = library()
    plain = name.removeprefix(PREFIX)
    if plain.partition(".")[0] not in of_timm | of_vision:
        raise ConfigError(f"no network '{name}'", fix=nearest_network(name))
    try:
        if plain in of_vision - of_timm:
            net = torchvision.models.get_model(plain, weights="DEFAULT" if pretrained else None)
            return _new_head(net, classes)
        return timm.create_model(plain, pretrained=pretrained, num_classes=classes)
    except (OSError, RuntimeError) as error:  # hub errors are OSError or RuntimeError
        if not pretrained:
            raise
        raise ConfigError(
            f"weights of '{plain}' cannot be fetched ({type(error).__name__}: {str(error).splitlines()[0]})",
            fix="give a local file with --weights FILE, or --weights none",
        ) from error


def nearest_network(name: str) -> str:
    """Advice for an unknown name; the whole list of 1,000 would help nobody."""
    names = frozenset().union(*library())
    close = closest(name, [*OWN, *names, *(PREFIX + n for n in names)])
    return f"{close} edgekd's own: {', '.join(OWN)}; others: edgekd models list, and {PREFIX}NAME for each".strip()


def _new_head(net: nn.Module, classes: int) -> nn.Module:
    """Replace the last linear or 1x1-convolution classifier of a torchvision network."""
    name, last = [(n, m) for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    new: nn.Module
    if isinstance(last, nn.Linear):
        new = nn.Linear(last.in_features, classes)
    else:
        new = nn.Conv2d(last.in_channels, classes, last.kernel_size)  # type: ignore[arg-type]
    parent, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(parent), leaf, new)
    return net
