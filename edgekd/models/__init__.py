"""Networks by name: teachers (any timm or torchvision classifier) and multi-exit students."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import timm
import torchvision.models
from torch import Tensor, nn

from edgekd.errors import ConfigError, nearest
from edgekd.models.multi_exit import SMALL_IMAGE as SMALL_IMAGE
from edgekd.models.multi_exit import MultiExitResNet, Outputs, multi_exit_resnet18, small_image_stem

STUDENTS: dict[str, Callable[..., MultiExitResNet]] = {"multi-exit-resnet18": multi_exit_resnet18}


class SingleExit(nn.Module):
    """A classifier from timm or torchvision, returning `Outputs` with one exit and no features or maps."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Outputs:
        out = self.backbone(x)
        return Outputs((out if isinstance(out, Tensor) else out[0],), (), ())


def build(
    name: str, *, classes: int, image_size: int, exits: Sequence[int] = (1, 2, 3, 4), pretrained: bool = False
) -> nn.Module:
    """A network that maps (B, 3, H, W) to `Outputs`, on the CPU.

    name: one of `STUDENTS`, or any timm or torchvision classifier (timm is asked first).
    pretrained: weights from the library's hub (students: torchvision's ImageNet ResNet18).

    Raises:
        ConfigError: an unknown name, or weights that cannot be fetched.
    """
    if name in STUDENTS:
        return STUDENTS[name](classes=classes, image_size=image_size, exits=exits)
    return SingleExit(_classifier(name, classes=classes, image_size=image_size, pretrained=pretrained))


def hub_name(name: str) -> str:
    """The hub network whose weights fit `name`'s backbone."""
    return name.removeprefix("multi-exit-") if name in STUDENTS else name


def _classifier(name: str, *, classes: int, image_size: int, pretrained: bool) -> nn.Module:
    timm_names, vision_names = timm.list_models(), torchvision.models.list_models(module=torchvision.models)
    if name not in timm_names and name.partition(".")[0] not in timm_names and name not in vision_names:
        raise ConfigError(f"no network '{name}'", fix=nearest_network(name, [*timm_names, *vision_names]))
    try:
        if name in vision_names and name not in timm_names:
            net = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
            return _new_head(net, classes)
        net = timm.create_model(name, pretrained=pretrained, num_classes=classes)
    except (OSError, RuntimeError) as error:  # hub errors are OSError or RuntimeError
        if not pretrained:
            raise
        raise ConfigError(
            f"weights of '{name}' cannot be fetched ({type(error).__name__}: {str(error).splitlines()[0]})",
            fix="give a local file with --weights FILE, or --weights none",
        ) from error
    return small_image_stem(net) if image_size <= SMALL_IMAGE and name in ("resnet18", "resnet34") else net


def nearest_network(name: str, names: Sequence[str]) -> str:
    """Advice for an unknown name; the whole list of 1,000 would help nobody."""
    advice = nearest(name, names)
    tail = advice.partition(".")[2].strip() if "Did you mean" in advice else ""
    return f"{tail} Students: {', '.join(STUDENTS)}; others: any name of timm.list_models()".strip()


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
