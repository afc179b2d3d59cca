"""Predictions of a trained network in torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from edgekd.host import default_threads
from edgekd.models.base import MultiExitNetwork, Outputs
from edgekd.training.run_folder import RunMetadata, load_model
from edgekd.types import Array


def load(run: Path) -> tuple[MultiExitNetwork, RunMetadata, str]:
    """Load the trained network of a run folder, on the GPU if there is one.

    Returns:
        The network, its metadata, and a description of the device and of torch.

    Raises:
        ArtifactError: See `run_folder.load_model`.
    """
    torch.set_num_threads(min(torch.get_num_threads(), default_threads()))
    network, metadata = load_model(run)
    if torch.cuda.is_available():
        return network.cuda(), metadata, f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return network, metadata, f"CPU, torch {torch.__version__}"


@torch.no_grad()
def logits(network: MultiExitNetwork, images: Array, *, batch_size: int = 64) -> Array:
    """Compute the logits of every exit.

    Args:
        network: The network, on any device.
        images: (N, 3, H, W), preprocessed.
        batch_size: Images that are processed at a time.

    Returns:
        (E, N, C), FP32.
    """
    network.eval()
    device = next(network.parameters()).device
    batches = []
    for start in range(0, len(images), batch_size):
        outputs: Outputs = network(torch.from_numpy(images[start : start + batch_size]).to(device))
        batches.append(torch.stack(outputs.logits).float().cpu().numpy())
    return np.concatenate(batches, axis=1)
