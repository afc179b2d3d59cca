"""Base class, outputs and registry entries of networks with one or more exits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias

from torch import Tensor, nn

from edgekd.artifacts.metadata import Exit
from edgekd.errors import ConfigError

FINAL = "final"
"""Name of the deepest exit, which needs no number."""
Stem: TypeAlias = Literal["imagenet", "small"]
"""First layers of a network: a 7x7 convolution of stride 2 and max-pooling, or a 3x3 one of stride 1, as for CIFAR."""
ExitPoint: TypeAlias = int | str
"""A stage's number from 1, or the name of a feature point."""
FOUR_STAGES: tuple[ExitPoint, ...] = (1, 2, 3, 4)


class Outputs(NamedTuple):
    """Outputs of a network for B images, one entry for each exit, shallow to deep.

    Attributes:
        logits: (B, C).
        features: (B, D), pooled, the input of the exit's linear layer; empty for a plain classifier.
        maps: The boundary at which the network can be cut behind the exit: the map (B, D_k, H_k, W_k) that the exit's
            head and the next stage start from, or a tuple of maps where they start from several (MSDNet).
    """

    logits: tuple[Tensor, ...]
    features: tuple[Tensor, ...]
    maps: tuple[Tensor | tuple[Tensor, ...], ...]


class MultiExitNetwork(nn.Module):
    """Base class of the networks that edgekd trains and exports.

    A subclass sets the attributes and returns `Outputs` from `forward`. Stage k + 1 must depend on the images through
    `Outputs.maps[k]` alone: there `edgekd compile` cuts the network. Each exit's head reads nothing else, either.

    Attributes:
        backbone: Layers before and between the exits. Names of feature points, and of the tensors in weights of a plain
            network, are relative to it.
        exits: Heads of the exits, shallow to deep, as far as the backbone does not contain them.
        exit_at: Where the exits are, for error messages.
    """

    backbone: nn.Module
    exits: nn.ModuleList
    exit_at: tuple[ExitPoint, ...] = ()

    def forward(self, x: Tensor) -> Outputs:
        """Return the outputs of all exits for images (B, 3, H, W)."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")


class NetworkBuilder(Protocol):
    """Builds a network; a network without a choice of exits or stem ignores these arguments."""

    def __call__(
        self, *, classes: int, image_size: int, stem: Stem = "imagenet", exits: Sequence[ExitPoint] = FOUR_STAGES
    ) -> nn.Module:
        """Build a network with random weights.

        Args:
            classes: Number of classes C.
            image_size: Side of the images in pixels.
            stem: First layers.
            exits: Exits, shallow to deep: numbers of stages, or names of feature points.

        Returns:
            A `MultiExitNetwork`, or a plain classifier from images (B, 3, H, W) to logits (B, C).
        """
        ...


@dataclass(frozen=True)
class Architecture:
    """A network that can be built by name, an entry of `edgekd.models.networks.NETWORKS`.

    Another package adds one by an entry point in the group `edgekd.networks`.

    Attributes:
        build: Builds the network with random weights.
        hub: Network in timm or torchvision whose weights fit the backbone; empty if there is none.
        has_stems: The network can be built with either stem.
    """

    build: NetworkBuilder
    hub: str = ""
    has_stems: bool = False


def exits_of(outputs: Outputs) -> tuple[Exit, ...]:
    """Name the tensors of a network's exits: `stage_k` for a boundary of one tensor, else `stage_k_0`, ….

    Raises:
        ConfigError: The network has several exits, but not a boundary for each of them.
    """
    if not outputs.maps and len(outputs.logits) == 1:
        return (Exit("exit_0", ()),)
    counts = [len(boundary_tensors(boundary)) for boundary in outputs.maps]
    if len(counts) != len(outputs.logits) or not all(counts):
        raise ConfigError(
            f"the network has {len(outputs.logits)} exits and returns {len(counts)} maps to cut it at",
            fix="return one entry for each exit in Outputs.maps: what the exit's head and the next stage start from",
        )
    names = [[f"stage_{k}"] if n == 1 else [f"stage_{k}_{i}" for i in range(n)] for k, n in enumerate(counts)]
    return tuple(Exit(f"exit_{k}", tuple(boundary)) for k, boundary in enumerate(names))


def boundary_tensors(boundary: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the tensors of one entry of `Outputs.maps`."""
    return (boundary,) if isinstance(boundary, Tensor) else boundary
