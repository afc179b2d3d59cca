"""The output of multi-exit networks."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from edgekd.artifacts.metadata import Exit
from edgekd.errors import ConfigError


def _tensors(boundary: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (boundary,) if isinstance(boundary, Tensor) else boundary


def exits_of(out: Outputs) -> tuple[Exit, ...]:
    """The tensor names for a network that answers so: `stage_k` for a boundary of one tensor, else `stage_k_0`, ….

    Raises:
        ConfigError: several exits, and not a map for each to cut the network at.
    """
    if not out.maps and len(out.logits) == 1:
        return (Exit("exit_0", ()),)
    counts = [len(_tensors(m)) for m in out.maps]
    if len(counts) != len(out.logits) or not all(counts):
        raise ConfigError(
            f"the network has {len(out.logits)} exits and returns {len(counts)} maps to cut it at",
            fix="return Outputs.maps with one entry an exit: what the exit's head and the next stage start from",
        )
    names = [[f"stage_{k}"] if n == 1 else [f"stage_{k}_{i}" for i in range(n)] for k, n in enumerate(counts)]
    return tuple(Exit(f"exit_{k}", tuple(boundary)) for k, boundary in enumerate(names))


FINAL = "final"
"""The deepest exit, by whatever number it has."""
Stem = Literal["imagenet", "small"]
"""How a network begins: 7x7 convolution of stride 2 and max-pooling, or the 3x3 one of stride 1 alone, as on CIFAR."""


class Outputs(NamedTuple):
    """What a network returns, one entry an exit, shallow to deep.

    logits: (B, C) each. features: (B, D) each, pooled, before the linear layer.
    maps: (B, D_k, H_k, W_k), the backbone's stage outputs, where the next stage takes over; where that takes over
    several (MSDNet), a tuple of them.
    """

    logits: tuple[Tensor, ...]
    features: tuple[Tensor, ...]
    maps: tuple[Tensor | tuple[Tensor, ...], ...]
