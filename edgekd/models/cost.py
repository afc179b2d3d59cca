"""What a network costs, counted and not measured: the columns of Chen et al. 2022 (Sensors 22:3272), table 3."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edgekd.models.base import Stem
from edgekd.models.feature_points import fitting
from edgekd.models.networks import build


@dataclass(frozen=True)
class Cost:
    """The cost of one network at one image size.

    parameters: numbers that are trained. macs: multiply-adds of one image's forward pass, one multiplication and its
    addition being 1, in convolutions, linear layers and matrix products; additions, normalisations, activations and
    pooling are left out, as in most papers. activation_mib: what all modules without children return for one image in
    FP32, in 2^20 bytes: what torchstat calls memory, more than inference holds at a time. checkpoint_mb: weights and
    buffers, in 10^6 bytes.
    """

    network: str
    classes: int
    image_size: int
    parameters: int
    macs: int
    activation_mib: float
    checkpoint_mb: float


def cost(name: str, *, classes: int, image_size: int, stem: Stem = "imagenet") -> Cost:
    """The cost of the network `name` (see `models.build`), without memory or time for its weights.

    Raises:
        ConfigError: an unknown network, one that cannot work on such images, or lacks that stem.
    """
    with torch.device("meta"):
        network = build(name, classes=classes, image_size=image_size, stem=stem)
        image = torch.zeros(1, 3, image_size, image_size)
    with fitting(image_size):
        macs, activations = count(network, image)
    return Cost(
        name,
        classes,
        image_size,
        parameters=sum(p.numel() for p in network.parameters()),
        macs=macs,
        activation_mib=activations / 2**20,
        checkpoint_mb=sum(t.nbytes for t in network.state_dict().values()) / 1e6,
    )


def count(network: nn.Module, image: Tensor) -> tuple[int, int]:
    """(multiply-adds, bytes that modules without children return) of one forward pass in eval mode."""
    returned = 0

    def note(module: nn.Module, args: object, output: object) -> None:
        nonlocal returned
        returned += output.nbytes if isinstance(output, Tensor) else 0

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, contextlib.ExitStack() as hooks:
        for module in network.modules():
            if not any(module.children()):
                hooks.enter_context(module.register_forward_hook(note))
        network.eval()(image)
    return counter.get_total_flops() // 2, returned
