"""Choice of the training precision from the device and, on a CPU, from the duration of a step."""

from __future__ import annotations

import copy
import logging
import time
from typing import Literal

import torch
from torch import nn

from edgekd.errors import ConfigError
from edgekd.models.base import Outputs

log = logging.getLogger(__name__)

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
IMAGES = 8
"""Batch of a timed step: large enough that converting the weights does not dominate, small enough to be fast."""


def choose(
    requested: Literal["auto", Precision], network: nn.Module, *, device: torch.device, image_size: int
) -> Precision:
    """Choose the precision to train in, and log it with the reason.

    Args:
        requested: The protocol's setting. `auto` is bf16-mixed on a GPU that has bf16, and on a CPU that has it and on
            which a step of this network is faster in it; else 32-true. It is never 16-mixed: FP16 overflows in losses
            that compare maps.
        network: The network to train.
        device: The device to train on.
        image_size: Side of the images in pixels.

    Raises:
        ConfigError: 16-mixed on a CPU.
    """
    has_bf16 = _has_bf16(device)
    if requested == "16-mixed" and device.type == "cpu":
        raise ConfigError("precision 16-mixed: CPUs train in 32-true or bf16-mixed", fix="use --precision auto")
    if requested == "bf16-mixed" and not has_bf16:
        log.warning(
            "precision bf16-mixed: this %s has no bf16, a step can take 18 times as long as in 32-true", _name(device)
        )
    if requested != "auto":
        return requested
    if not has_bf16 or device.type != "cpu":
        chosen: Precision = "bf16-mixed" if has_bf16 else "32-true"
        log.info("precision %s: this %s %s bf16", chosen, _name(device), "has" if has_bf16 else "has no")
        return chosen
    plain, mixed = step_seconds(network, image_size=image_size)
    chosen = "bf16-mixed" if mixed < plain else "32-true"
    log.info(
        "precision %s: %d images take %.2f CPU seconds in bf16-mixed, %.2f in 32-true", chosen, IMAGES, mixed, plain
    )
    return chosen


def _name(device: torch.device) -> str:
    return "CPU" if device.type == "cpu" else "GPU"


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def step_seconds(network: nn.Module, *, image_size: int) -> tuple[float, float]:
    """Measure a training step on the CPU; the network and torch's random generator are unchanged.

    CPU time is measured, not wall time, so that other load on the machine has no influence. The first step of each
    precision is a warm-up.

    Returns:
        CPU seconds of a step of `IMAGES` images in 32-true and in bf16-mixed.
    """
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with torch.random.fork_rng(devices=[]):
        trial = copy.deepcopy(network).train().to(memory_format=torch.channels_last)
        images = torch.randn(IMAGES, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
        for _ in range(3):
            for mixed, taken in seconds.items():
                started = time.process_time()
                with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                    outputs: Outputs = trial(images)
                torch.autograd.backward([logits.float().square().mean() for logits in outputs.logits])
                taken.append(time.process_time() - started)
    return min(seconds[False][1:]), min(seconds[True][1:])
