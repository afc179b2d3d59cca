"""Computational cost of a network, counted rather than measured: table 3 of Chen et al. 2022 (Sensors 22:3272)."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edgekd.models.base import Stem
from edgekd.models.feature_points import image_size_errors
from edgekd.models.networks import build


@dataclass(frozen=True)
class Cost:
    """Cost of one network at one image size.

    Attributes:
        network: The network's name.
        classes: Number of classes.
        image_size: Side of the images in pixels.
        parameters: Trained parameters.
        macs: Multiply-adds of one image's forward pass in convolutions, linear layers and matrix products, where one
            multiplication and its addition are 1; additions, normalisations, activations and pooling are not counted,
            as in most papers.
        activation_mib: Outputs of all modules without children for one image in FP32, in 2^20 bytes: torchstat's
            memory, which is more than inference holds at a time.
        checkpoint_mb: Weights and buffers, in 10^6 bytes.
    """

    network: str
    classes: int
    image_size: int
    parameters: int
    macs: int
    activation_mib: float
    checkpoint_mb: float


def cost(name: str, *, classes: int, image_size: int, stem: Stem = "imagenet") -> Cost:
    """Count the cost of a network without allocating its weights.

    Args:
        name: A name for `edgekd.models.networks.build`.
        classes: Number of classes.
        image_size: Side of the images in pixels.
        stem: First layers, for networks that have a choice.

    Raises:
        ConfigError: An unknown network, or one that cannot process such images or does not have that stem.
    """
    with torch.device("meta"):
        network = build(name, classes=classes, image_size=image_size, stem=stem)
        image = torch.zeros(1, 3, image_size, image_size)
    with image_size_errors(image_size):
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
    """Return the multiply-adds, and the bytes that modules without children return, of one pass in eval mode."""
    returned = 0

    def add_output(module: nn.Module, args: object, output: object) -> None:
        nonlocal returned
        returned += output.nbytes if isinstance(output, Tensor) else 0

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, contextlib.ExitStack() as hooks:
        for module in network.modules():
            if not any(module.children()):
                hooks.enter_context(module.register_forward_hook(add_output))
        network.eval()(image)
    return counter.get_total_flops() // 2, returned
