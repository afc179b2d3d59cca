"""Feature points: the named places in a network whose maps a distillation method compares or an exit grows from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekd.errors import ConfigError, nearest

INPUT = ":input"
"""After a point's name: what goes into the module, not what comes out."""


@dataclass(frozen=True)
class Point:
    """A module's output map: its name, the module's class, and (channels, height, width)."""

    name: str
    kind: str
    shape: tuple[int, int, int]


def root(network: nn.Module) -> nn.Module:
    """The module that feature points are named from: the backbone of edgekd's networks, else the network itself."""
    inner = getattr(network, "backbone", network)
    assert isinstance(inner, nn.Module)
    return inner


@contextlib.contextmanager
def observe(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """While the block runs, note what the named modules return, or take with `:input` behind the name; the last
    time counts. What they take is copied: the activation behind it may work in place.

    Raises:
        ConfigError: an unknown name (the nearest are given), or, at the block's end, one that never fired.
    """
    seen: dict[str, Tensor] = {}
    handles = []
    try:
        for name in names:
            module = find(network, name.removesuffix(INPUT))
            if name.endswith(INPUT):
                handles.append(module.register_forward_pre_hook(_before(seen, name)))
            else:
                handles.append(module.register_forward_hook(_after(seen, name)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
    if silent := [name for name in names if name not in seen]:
        raise ConfigError(
            f"feature point '{silent[0]}' never fired: the network's forward does not go through it",
            fix="edgekd models show NAME --features lists the points that do",
        )


def _before(seen: dict[str, Tensor], name: str):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name] = args[0].clone()

    return hook


def _after(seen: dict[str, Tensor], name: str):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = output

    return hook


def find(network: nn.Module, name: str) -> nn.Module:
    """The module of that name.

    Raises:
        ConfigError: no such module; the nearest names are given.
    """
    modules: dict[str, nn.Module] = dict(root(network).named_modules())
    if name not in modules or not name:
        close = nearest(name, [n for n in modules if n])
        raise ConfigError(f"the network has no feature point '{name}'", fix=close.partition(". ")[2] or close[:300])
    return modules[name]


def points(network: nn.Module, *, image_size: int) -> list[Point]:
    """Every module that returns a map for images of that size, in the order in which they end."""
    found: dict[str, Point] = {}
    handles = []

    def note(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                found.pop(name, None)  # a module that runs twice counts where it last ends
                found[name] = Point(name, type(module).__name__, (output.shape[1], output.shape[2], output.shape[3]))

        return hook

    try:
        for name, module in root(network).named_modules():
            if name:
                handles.append(module.register_forward_hook(note(name)))
        _dry_run(network, image_size)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def _dry_run(network: nn.Module, image_size: int) -> None:
    """One black image through the network in eval mode; its own mode is put back."""
    mode = {m: m.training for m in network.modules()}
    device = next(network.parameters()).device
    network.eval()
    try:
        with torch.no_grad():
            network(torch.zeros(1, 3, image_size, image_size, device=device))
    finally:
        for module, training in mode.items():
            module.training = training


def stages(network: nn.Module, *, image_size: int, count: int = 4) -> tuple[str, ...]:
    """The ends of the last `count` stages, shallow to deep: of each resolution, the outermost module that ends last."""
    best: dict[int, Point] = {}
    for point in points(network, image_size=image_size):
        height = point.shape[1]
        if height > 1 or not best:
            known = best.get(height)
            if known is None or point.name.count(".") <= known.name.count("."):
                best[height] = point
    return tuple(best[height].name for height in sorted(best, reverse=True))[-count:]


ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish)


def preactivations(network: nn.Module, ends: Sequence[str], *, image_size: int) -> tuple[str, ...]:
    """For each stage's end, what goes into the last activation inside it.

    Raises:
        ConfigError: a stage that has no activation module (its forward calls a function instead).
    """
    order = _fired(network, ACTIVATIONS, image_size)
    found = []
    for end in ends:
        inside = [name for name in order if f"{name}.".startswith(f"{end}.")]
        if not inside:
            raise ConfigError(
                f"stage '{end}' has no activation module to look in front of",
                fix="use a method that needs no pre-activations, or name other points",
            )
        found.append(inside[-1] + INPUT)
    return tuple(found)


def pooled(network: nn.Module, *, image_size: int) -> str:
    """What goes into the classifier: the last linear layer or convolution that runs."""
    return _fired(network, (nn.Linear, nn.Conv2d), image_size)[-1] + INPUT


def _fired(network: nn.Module, kinds: tuple[type[nn.Module], ...], image_size: int) -> list[str]:
    """The modules of these kinds in the order in which they run; one that runs twice comes twice."""
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: order.append(name))
        for name, module in root(network).named_modules()
        if isinstance(module, kinds)
    ]
    try:
        _dry_run(network, image_size)
    finally:
        for handle in handles:
            handle.remove()
    return order
