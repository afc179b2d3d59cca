"""Feature points: the named places in a network whose maps a distillation method compares or an exit grows from."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.errors import ConfigError, closest

INPUT = ":input"
"""After a point's name: what goes into the module, not what comes out."""

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish)
DROPOUTS = (nn.Dropout, nn.Dropout2d)
POOLS = (nn.MaxPool2d, nn.AvgPool2d)
PASSIVE = (*DROPOUTS, nn.Identity, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)  # the last two belong to classifiers


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
    time counts. What they take is copied: the activation behind it may work in place. What they return is not: a
    batch normalisation whose ReLU works in place is seen after it, as the rest of the network sees it.

    Raises:
        ConfigError: an unknown name (the nearest are given), or, at the block's end, one that never fired.
    """
    seen: dict[str, Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for name in names:
            module = find(network, name.removesuffix(INPUT))
            if name.endswith(INPUT):
                hooks.enter_context(module.register_forward_pre_hook(_before(seen, name)))
            else:
                hooks.enter_context(module.register_forward_hook(_after(seen, name)))
        yield seen
    if silent := [name for name in names if name not in seen]:
        raise _never_fired(silent[0])


def _never_fired(name: str) -> ConfigError:
    return ConfigError(
        f"feature point '{name}' never fired: the network's forward does not go through it",
        fix="edgekd models show NAME --features lists the points that do",
    )


def _before(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name] = args[0].clone()

    return hook


def _after(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = output

    return hook


def find(network: nn.Module, name: str) -> nn.Module:
    """The module of that name.

    Raises:
        ConfigError: no such module; the nearest name is given.
    """
    modules: dict[str, nn.Module] = dict(root(network).named_modules())
    if name not in modules or not name:
        advice = f"{closest(name, filter(None, modules))} edgekd models show NAME --features lists them all"
        raise ConfigError(f"the network has no feature point '{name}'", fix=advice.strip())
    return modules[name]


@dataclass(frozen=True)
class _Event:
    """A module that starts, seen with what it takes, or ends, seen with what it returns."""

    name: str
    module: nn.Module
    seen: Tensor
    ends: bool


def _run(network: nn.Module, image_size: int) -> list[_Event]:
    """One image through the network in eval mode: what its modules take and return, in order. Its own mode is put
    back. The image is a ramp and not black, so that two maps are only equal if they are the same."""
    events: list[_Event] = []

    def started(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                events.append(_Event(name, module, args[0], False))

        return hook

    def ended(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                events.append(_Event(name, module, output, True))

        return hook

    with contextlib.ExitStack() as hooks:
        for name, module in root(network).named_modules():
            if name:
                hooks.enter_context(module.register_forward_pre_hook(started(name)))
                hooks.enter_context(module.register_forward_hook(ended(name)))
        with torch.no_grad(), evaluating(network), fitting(image_size):
            network(ramp(network, image_size))
    return events


@contextlib.contextmanager
def fitting(image_size: int) -> Iterator[None]:
    """For a first run of a network on such images: what it cannot take is the user's to mend.

    Raises:
        ConfigError: the network's own error, which is quoted.
    """
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"the network cannot work on images of {image_size} x {image_size} pixels: {reason}",
            fix="give the size it was made for, or a larger one, with --image-size",
        ) from error


def ramp(network: nn.Module, image_size: int) -> Tensor:
    """An image (1, 3, image_size, image_size) on the network's device, rising from -1 to 1."""
    device = next(network.parameters()).device
    return torch.linspace(-1, 1, 3 * image_size**2, device=device).reshape(1, 3, image_size, image_size)


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode for the block; every module's own mode is put back."""
    mode = {m: m.training for m in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in mode.items():
            module.training = training


def points(network: nn.Module, *, image_size: int) -> list[Point]:
    """Every module that returns a map for images of that size, in the order in which they end.

    A module that runs twice counts where it last ends. Maps of square images are square: other tensors with four
    axes, such as attention, are none.
    """
    found: dict[str, Point] = {}
    for event in _run(network, image_size):
        if event.ends and event.seen.dim() == 4 and event.seen.shape[2] == event.seen.shape[3]:
            found.pop(event.name, None)
            channels, height, width = event.seen.shape[1:]
            found[event.name] = Point(event.name, type(event.module).__name__, (channels, height, width))
    return list(found.values())


def stages(network: nn.Module, *, image_size: int) -> tuple[str, ...]:
    """The ends of the last four stages, shallow to deep; see `ends`.

    Raises:
        ConfigError: the network has no maps.
    """
    return ends(points(network, image_size=image_size))


def ends(known: Sequence[Point]) -> tuple[str, ...]:
    """Of a network's points, the ends of its last four stages, shallow to deep.

    A stage ends at the outermost module that ends last at its resolution; a layer that only pools is taken if there
    is no other; dropout, adaptive pooling and identities never are.

    Raises:
        ConfigError: there are no points but pooled images.
    """
    best: dict[int, tuple[int, bool]] = {}
    names: dict[int, str] = {}
    for point in known:
        size, rank = point.shape[1], (point.name.count("."), point.kind in _names(POOLS))
        if size > 1 and point.kind not in _names(PASSIVE) and rank <= best.get(size, rank):
            best[size], names[size] = rank, point.name
    if all(pools for _, pools in best.values()):
        raise ConfigError(
            "the network has no maps, and so no stages", fix="take a convolutional one, or a method such as kd"
        )
    return tuple(names[size] for size in sorted(names, reverse=True))[-4:]


def _names(kinds: tuple[type[nn.Module], ...]) -> set[str]:
    return {kind.__name__ for kind in kinds}


def check_cuts(network: nn.Module, names: Sequence[str], *, image_size: int) -> None:
    """Whether a network can be cut at each of these points, shallow to deep: all that follows must depend on the image
    through the point's map alone. Found in autograd's graph, without numbers.

    Raises:
        ConfigError: a skip connection or branch goes around a point, or two points are one map.
    """
    with torch.enable_grad(), evaluating(network), observe(network, names) as seen:
        image = ramp(network, image_size).requires_grad_()
        answer: Tensor = network(image)
    for name, behind in itertools.pairwise(names):
        if seen[name] is seen[behind]:
            raise ConfigError(f"'{name}' and '{behind}' return one and the same map", fix="leave one of them out")
    for name in names:
        if _reaches(image, answer, around=seen[name]):
            raise ConfigError(
                f"the network cannot be cut at '{name}': a skip connection or branch goes around it",
                fix="take the end of a block; edgekd models show NAME --features lists the points",
            )


def _reaches(image: Tensor, answer: Tensor, *, around: Tensor) -> bool:
    waiting: list[tuple[Any, int]] = [(answer.grad_fn, answer.output_nr)]
    done: set[tuple[Any, int]] = {(around.grad_fn, around.output_nr)}
    while waiting:
        edge = waiting.pop()
        if edge[0] is not None and edge not in done:
            done.add(edge)
            if getattr(edge[0], "variable", None) is image:
                return True
            waiting += edge[0].next_functions
    return False


def preactivations(network: nn.Module, ends: Sequence[str], *, image_size: int) -> tuple[str, ...]:
    """For each stage's end, what goes into the last activation of a map inside it, or before it if it only pools.
    Activations of 1x1 maps are passed over: they belong to squeeze-and-excitation.

    Raises:
        ConfigError: a stage that has no activation module (its forward calls a function instead), or never fired.
    """
    events = _run(network, image_size)
    return tuple(_preactivation(network, end, events) + INPUT for end in ends)


def _preactivation(network: nn.Module, end: str, events: Sequence[_Event]) -> str:
    pools, ran = isinstance(find(network, end), POOLS), [k for k, e in enumerate(events) if e.name == end]
    if not ran:
        raise _never_fired(end)
    inside = [
        e.name
        for e in events[: ran[-1]]
        if isinstance(e.module, ACTIVATIONS) and e.seen.dim() == 4 and e.seen.shape[-1] > 1
        if pools or f"{e.name}.".startswith(f"{end}.")
    ]
    if not inside:
        raise ConfigError(
            f"stage '{end}' has no activation module to look in front of",
            fix="use a method that needs no pre-activations, or name other points",
        )
    return inside[-1]


def pooled(network: nn.Module, *, image_size: int) -> str:
    """The feature that is classified, (B, D) or a map to be averaged: what goes into the last linear layer or
    convolution that runs, in front of dropout if there is any."""
    events = _run(network, image_size)
    at = [k for k, e in enumerate(events) if isinstance(e.module, (nn.Linear, nn.Conv2d)) and not e.ends][-1]
    taken = flat(events[at].seen)
    for event in reversed(events[:at]):  # dropout may be a function: what a module returned before is the same then
        drops = isinstance(event.module, DROPOUTS)
        if event.ends != drops and event.seen.dim() > 1 and _same(flat(event.seen), taken):
            return event.name + (INPUT if drops else "")
    return events[at].name + INPUT


def flat(feature: Tensor) -> Tensor:
    """(B, D) of a feature, or of a map (B, D, H, W) by averaging."""
    return feature.mean((2, 3)) if feature.dim() == 4 else feature.flatten(1)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two features are one but for rounding; of an untrained network they may be as small as 1e-9."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-4 * b.abs().max())
