"""Which arithmetic a training step uses: what the device can do and, on a CPU, what a step of each takes."""

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
"""The batch of a timed step: large enough for the weights' conversion not to decide, small enough to be over soon."""


def choose(
    asked: Literal["auto", Precision], network: nn.Module, *, device: torch.device, image_size: int
) -> Precision:
    """The precision to train `network` in: `asked` unless that is `auto`; it is said what was taken, and why.

    `auto` is bf16-mixed on a GPU that has bf16, and on a CPU that has it and on which a step of this network takes less
    time so; else 32-true. Never 16-mixed: FP16 overflows in losses that compare maps.

    Raises:
        ConfigError: 16-mixed on a CPU.
    """
    can = _has_bf16(device)
    if asked == "16-mixed" and device.type == "cpu":
        raise ConfigError("precision 16-mixed: CPUs train in 32-true or bf16-mixed", fix="use --precision auto")
    if asked == "bf16-mixed" and not can:
        log.warning(
            "precision bf16-mixed: this %s has no bf16, a step can take 18 times as long as in 32-true", _name(device)
        )
    if asked != "auto":
        return asked
    if not can or device.type != "cpu":
        taken: Precision = "bf16-mixed" if can else "32-true"
        log.info("precision %s: this %s %s bf16", taken, _name(device), "has" if can else "has no")
        return taken
    plain, mixed = step_seconds(network, image_size=image_size)
    taken = "bf16-mixed" if mixed < plain else "32-true"
    log.info(
        "precision %s: %d images take %.2f CPU seconds in bf16-mixed, %.2f in 32-true", taken, IMAGES, mixed, plain
    )
    return taken


def _name(device: torch.device) -> str:
    return "CPU" if device.type == "cpu" else "GPU"


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def step_seconds(network: nn.Module, *, image_size: int) -> tuple[float, float]:
    """CPU seconds of a training step in 32-true and in bf16-mixed; the network and torch's generator stay as they are.

    CPU time and not the clock's: what else runs on the machine shall not decide. The first step of each warms up.
    """
    taken: dict[bool, list[float]] = {False: [], True: []}
    with torch.random.fork_rng(devices=[]):
        trial = copy.deepcopy(network).train().to(memory_format=torch.channels_last)
        images = torch.randn(IMAGES, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
        for _ in range(3):
            for mixed, seconds in taken.items():
                started = time.process_time()
                with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                    out: Outputs = trial(images)
                sum(logits.float().square().mean() for logits in out.logits).backward()  # type: ignore[union-attr]
                seconds.append(time.process_time() - started)
    return min(taken[False][1:]), min(taken[True][1:])
