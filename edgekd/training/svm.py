"""A linear support vector machine on a trained network's features, a baseline in the tables of Gao et al. 2022."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgekd.data.images import load_batch, require_unchanged
from edgekd.data.preprocess import Preprocess
from edgekd.data.split import Split
from edgekd.models.feature_points import flat, observe
from edgekd.types import Array

BATCH = 64


def fit_svm(
    network: nn.Module, point: str, *, split: Split, data: Path, preprocess: Preprocess
) -> Callable[[Array], Array]:
    """Fit an SVM (linear kernel, C = 1, standardised features) on the training images' features.

    Args:
        network: The trained network.
        point: Name of the feature point; a map is averaged over its positions.
        split: The split, of which the training images are used.
        data: Folder of the images.
        preprocess: Preprocessing of the images.

    Returns:
        A function from images (N, 3, H, W) to scores (1, N, C). They rank the classes; their softmax is not a fitted
        probability.

    Raises:
        ConfigError: There is no such feature point.
    """
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    items = split.subset("train")
    require_unchanged(items, data)
    chunks = [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
    rows = [features(network, point, load_batch([data / i.path for i in chunk], preprocess)) for chunk in chunks]
    svm = make_pipeline(StandardScaler(), SVC(kernel="linear", break_ties=True))
    svm.fit(np.concatenate(rows), [i.label for i in items])

    def scores_of(images: Array) -> Array:
        scores = svm.decision_function(features(network, point, images))
        scores = np.stack([-scores, scores], axis=1) if scores.ndim == 1 else scores
        return scores.astype(np.float32)[None]

    return scores_of


@torch.no_grad()
def features(network: nn.Module, point: str, images: Array) -> Array:
    """Compute the features (N, D) of images (N, 3, H, W) at a feature point."""
    network.eval()
    device, rows = next(network.parameters()).device, []
    for start in range(0, len(images), BATCH):
        with observe(network, [point]) as seen:
            network(torch.from_numpy(images[start : start + BATCH]).to(device))
        rows.append(flat(seen[point]).float().cpu().numpy())
    return np.concatenate(rows)
