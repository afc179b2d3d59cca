"""What a network with three exits answers, for the losses by which it teaches itself."""

from __future__ import annotations

import torch
from torch import Tensor

from edgekd.distill.base import Setting, Shapes, Step, View
from edgekd.models.base import Outputs

SETTING = Setting(Shapes(exits=3))


def outputs(batch: int = 6, *, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Outputs:
    """Three exits, 5 classes, 8 features."""
    generator = torch.Generator().manual_seed(1)

    def tensor(width: int) -> Tensor:
        return (torch.randn(batch, width, generator=generator) * scale).to(dtype).requires_grad_()

    return Outputs(tuple(tensor(5) for _ in range(3)), tuple(tensor(8) for _ in range(3)), ())


def step(out: Outputs, target: Tensor) -> Step:
    return Step(View(out), None, target, torch.arange(len(target)), 0)
