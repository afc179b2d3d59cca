"""Answers of a trained network in torch, for `edgekd evaluate RUN` and for fitting what follows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgekd.host import default_threads
from edgekd.training.run_folder import Header, load_model
from edgekd.types import Array


def load(run: Path) -> tuple[nn.Module, Header, str]:
    """The trained network of a run folder on the GPU if there is one, its header, and what runs it."""
    torch.set_num_threads(min(torch.get_num_threads(), default_threads()))
    network, header = load_model(run)
    if torch.cuda.is_available():
        return network.cuda(), header, f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return network, header, f"CPU, torch {torch.__version__}"


@torch.no_grad()
def logits(network: nn.Module, images: Array, *, batch_size: int = 64) -> Array:
    """Logits (E, N, C) of every exit on preprocessed images (N, 3, H, W), FP32."""
    network.eval()
    device = next(network.parameters()).device
    batches = []
    for start in range(0, len(images), batch_size):
        out = network(torch.from_numpy(images[start : start + batch_size]).to(device))
        batches.append(torch.stack(out.logits).float().cpu().numpy())
    return np.concatenate(batches, axis=1)
