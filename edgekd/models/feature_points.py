"""Feature points: named places in a network whose maps a distillation method compares or an exit starts from."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from edgekd.errors import ConfigError, closest
from edgekd.models.base import MultiExitNetwork, Outputs

MapShape: TypeAlias = tuple[int, int, int]
"""Channels, height and width of a map."""
INPUT = ":input"
"""Suffix of a point's name: the module's input in place of its output."""

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish)
DROPOUTS = (nn.Dropout, nn.Dropout2d)
POOLS = (nn.MaxPool2d, nn.AvgPool2d)
NO_STAGE_END = (*DROPOUTS, nn.Identity, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)  # the last two are classifiers'


@dataclass(frozen=True)
class FeaturePoint:
    """A module that returns a map.

    Attributes:
        name: The module's name, relative to the backbone.
        kind: Name of the module's class.
        shape: Shape of its map.
    """

    name: str
    kind: str
    shape: MapShape


def backbone_of(network: nn.Module) -> nn.Module:
    """Return the module that feature points are named relative to: the backbone, or a plain network itself."""
    return network.backbone if isinstance(network, MultiExitNetwork) else network


def find(network: nn.Module, name: str) -> nn.Module:
    """Return the module called `name`.

    Raises:
        ConfigError: There is no such module; the nearest name is given.
    """
    modules: dict[str, nn.Module] = dict(backbone_of(network).named_modules())
    if name not in modules or not name:
        advice = f"{closest(name, filter(None, modules))} edgekd models show NAME --features lists them all"
        raise ConfigError(f"the network has no feature point '{name}'", fix=advice.strip())
    return modules[name]


@contextlib.contextmanager
def observe(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record outputs, or with the suffix `:input` inputs, of modules while the block runs; the last call counts.

    Inputs are copied, since the activation that follows may work in place. Outputs are not: a batch normalisation
    followed by an in-place ReLU is recorded after it, as the rest of the network receives it.

    Yields:
        Name to tensor, filled while the network runs.

    Raises:
        ConfigError: An unknown name (the nearest is given) or, at the end of the block, a module that did not run.
    """
    seen: dict[str, Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for name in names:
            module = find(network, name.removesuffix(INPUT))
            if name.endswith(INPUT):
                hooks.enter_context(module.register_forward_pre_hook(_record_input(seen, name)))
            else:
                hooks.enter_context(module.register_forward_hook(_record_output(seen, name)))
        yield seen
    if silent := [name for name in names if name not in seen]:
        raise _never_ran(silent[0])


def _record_input(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name] = args[0].clone()

    return hook


def _record_output(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = output

    return hook


def _never_ran(name: str) -> ConfigError:
    return ConfigError(
        f"feature point '{name}' never fired: the network's forward does not call it",
        fix="edgekd models show NAME --features lists the points that it calls",
    )


@dataclass(frozen=True)
class _Event:
    """Start or end of a module's call, with its input or output."""

    name: str
    module: nn.Module
    tensor: Tensor
    is_end: bool


@dataclass(frozen=True)
class Trace:
    """One dry run of a network in eval mode: every call of its modules, in order.

    The image is a gradient and not black, so that two maps are equal only if they are the same. Modules with several
    outputs, or without a tensor as first argument, are not recorded.

    Attributes:
        network: The network.
        outputs: What it returned; a plain classifier's logits as one exit.
    """

    network: nn.Module
    outputs: Outputs
    events: tuple[_Event, ...]

    def points(self) -> list[FeaturePoint]:
        """Return every module that returns a map, in the order in which their last calls end.

        Maps of square images are square; other tensors with four axes, such as attention weights, are excluded.
        """
        found: dict[str, FeaturePoint] = {}
        for event in self.events:
            if event.is_end and event.tensor.dim() == 4 and event.tensor.shape[2] == event.tensor.shape[3]:
                found.pop(event.name, None)
                found[event.name] = FeaturePoint(event.name, type(event.module).__name__, _map_shape(event.tensor))
        return list(found.values())

    def stages(self) -> tuple[str, ...]:
        """Return the names of the ends of the last four stages; see `stage_ends`.

        Raises:
            ConfigError: The network has no maps.
        """
        return stage_ends(self.points())

    def preactivations(self, ends: Sequence[str]) -> tuple[str, ...]:
        """Return, for each stage's end, the name of the input of the last activation of a map inside the stage.

        If the end only pools, it is the last activation before it. Activations of 1x1 maps are skipped: they belong to
        squeeze-and-excitation.

        Raises:
            ConfigError: A stage has no activation module (its forward calls a function), or does not run.
        """
        return tuple(self._preactivation(end) + INPUT for end in ends)

    def _preactivation(self, end: str) -> str:
        pools = isinstance(find(self.network, end), POOLS)
        calls = [k for k, event in enumerate(self.events) if event.name == end]
        if not calls:
            raise _never_ran(end)
        inside = [
            event.name
            for event in self.events[: calls[-1]]
            if isinstance(event.module, ACTIVATIONS) and event.tensor.dim() == 4 and event.tensor.shape[-1] > 1
            if pools or f"{event.name}.".startswith(f"{end}.")
        ]
        if not inside:
            raise ConfigError(
                f"stage '{end}' has no activation module whose input could be taken",
                fix="use a method that needs no pre-activations, or name other points",
            )
        return inside[-1]

    def pooled(self) -> str:
        """Return the name of the feature that is classified, (B, D) or a map to be averaged.

        It is the input of the last linear layer or convolution that runs, before dropout if there is any.
        """
        layers = (nn.Linear, nn.Conv2d)
        at = [k for k, e in enumerate(self.events) if isinstance(e.module, layers) and not e.is_end][-1]
        feature = flat(self.events[at].tensor)
        for event in reversed(self.events[:at]):  # where dropout is a function, an earlier module returned the same
            is_dropout = isinstance(event.module, DROPOUTS)
            if event.is_end != is_dropout and event.tensor.dim() > 1 and _close(flat(event.tensor), feature):
                return event.name + (INPUT if is_dropout else "")
        return self.events[at].name + INPUT

    def map_shape(self, name: str) -> MapShape:
        """Return the shape of the map at a feature point.

        Raises:
            ConfigError: There is no such point, it does not run, or it is not a map (D, H, W).
        """
        tensor = self._tensor(name)
        if tensor.dim() != 4:
            raise ConfigError(
                f"feature point '{name}' is not a map: its shape is {tuple(tensor.shape)}",
                fix="edgekd models show NAME --features lists the maps",
            )
        return _map_shape(tensor)

    def flat(self, name: str) -> Tensor:
        """Return the feature (1, D) at a feature point; a map is averaged.

        Raises:
            ConfigError: There is no such point, or it does not run.
        """
        return flat(self._tensor(name))

    def _tensor(self, name: str) -> Tensor:
        module, at_end = name.removesuffix(INPUT), not name.endswith(INPUT)
        find(self.network, module)
        tensors = [e.tensor for e in self.events if e.name == module and e.is_end == at_end]
        if not tensors:
            raise _never_ran(name)
        return tensors[-1]


def _map_shape(tensor: Tensor) -> MapShape:
    channels, height, width = tensor.shape[1:]
    return channels, height, width


def flat(feature: Tensor) -> Tensor:
    """Return a feature as (B, D); a map (B, D, H, W) is averaged over its positions."""
    return feature.mean((2, 3)) if feature.dim() == 4 else feature.flatten(1)


def _close(a: Tensor, b: Tensor) -> bool:
    """Return True if two features differ by rounding alone; an untrained network's may be as small as 1e-9."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def trace(network: nn.Module, *, image_size: int) -> Trace:
    """Run a network once on one image; its mode and state are unchanged.

    Args:
        network: A `MultiExitNetwork`, or a plain classifier.
        image_size: Side of the image in pixels.

    Raises:
        ConfigError: The network cannot process images of this size.
    """
    events: list[_Event] = []

    def on_start(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                events.append(_Event(name, module, args[0], False))

        return hook

    def on_end(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                events.append(_Event(name, module, output, True))

        return hook

    with contextlib.ExitStack() as hooks:
        for name, module in backbone_of(network).named_modules():
            if name:
                hooks.enter_context(module.register_forward_pre_hook(on_start(name)))
                hooks.enter_context(module.register_forward_hook(on_end(name)))
        with torch.no_grad(), evaluating(network), image_size_errors(image_size):
            outputs: Outputs | Tensor = network(gradient_image(network, image_size))
    return Trace(network, outputs if isinstance(outputs, Outputs) else Outputs((outputs,), (), ()), tuple(events))


@contextlib.contextmanager
def image_size_errors(image_size: int) -> Iterator[None]:
    """Turn errors of a network's first run into errors of the image size.

    Raises:
        ConfigError: The network's own error, which is quoted.
    """
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"the network cannot work on images of {image_size} x {image_size} pixels: {reason}",
            fix="give the size it was made for, or a larger one, with --image-size",
        ) from error


def gradient_image(network: nn.Module, image_size: int) -> Tensor:
    """Return an image (1, 3, image_size, image_size) on the network's device, rising from -1 to 1."""
    device = next(network.parameters()).device
    return torch.linspace(-1, 1, 3 * image_size**2, device=device).reshape(1, 3, image_size, image_size)


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into eval mode for the block and restore every module's own mode."""
    mode = {m: m.training for m in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in mode.items():
            module.training = training


def stage_ends(points: Sequence[FeaturePoint]) -> tuple[str, ...]:
    """Return the names of the ends of the last four stages, shallow to deep.

    A stage ends at the outermost module that ends last at its resolution. A layer that only pools is taken if there is
    no other; dropout, adaptive pooling and identities never are.

    Args:
        points: Feature points of a network, in the order in which they end.

    Raises:
        ConfigError: There are no maps but pooled images.
    """
    best: dict[int, tuple[int, bool]] = {}
    names: dict[int, str] = {}
    for point in points:
        size, rank = point.shape[1], (point.name.count("."), point.kind in _class_names(POOLS))
        if size > 1 and point.kind not in _class_names(NO_STAGE_END) and rank <= best.get(size, rank):
            best[size], names[size] = rank, point.name
    if all(pools for _, pools in best.values()):
        raise ConfigError(
            "the network has no maps, and so no stages",
            fix="use a convolutional one, or a method that needs none, such as kd",
        )
    return tuple(names[size] for size in sorted(names, reverse=True))[-4:]


def _class_names(kinds: tuple[type[nn.Module], ...]) -> set[str]:
    return {kind.__name__ for kind in kinds}


def check_cuts(network: nn.Module, names: Sequence[str], *, image_size: int) -> None:
    """Check that a plain network can be cut at each of these points.

    Everything behind a cut must depend on the image through the point's map alone. That is read off autograd's graph,
    not off values.

    Args:
        network: The network.
        names: Feature points, shallow to deep.
        image_size: Side of the image in pixels.

    Raises:
        ConfigError: A skip connection or branch bypasses a point, or two points have the same map.
    """
    with torch.enable_grad(), evaluating(network), observe(network, names) as seen:
        image = gradient_image(network, image_size).requires_grad_()
        logits: Tensor = network(image)
    for name, behind in itertools.pairwise(names):
        if seen[name] is seen[behind]:
            raise ConfigError(f"'{name}' and '{behind}' return the same map", fix="remove one of them")
    for name in names:
        if _bypasses(image, logits, cut=seen[name]):
            raise ConfigError(
                f"the network cannot be cut at '{name}': a skip connection or branch bypasses it",
                fix="take the end of a block; edgekd models show NAME --features lists the points",
            )


def _bypasses(image: Tensor, logits: Tensor, *, cut: Tensor) -> bool:
    """Return True if autograd's graph leads from `logits` to `image` other than through `cut`."""
    pending: list[tuple[Any, int]] = [(logits.grad_fn, logits.output_nr)]
    done: set[tuple[Any, int]] = {(cut.grad_fn, cut.output_nr)}
    while pending:
        edge = pending.pop()
        if edge[0] is not None and edge not in done:
            done.add(edge)
            if getattr(edge[0], "variable", None) is image:
                return True
            pending += edge[0].next_functions
    return False
