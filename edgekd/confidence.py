"""Confidence measures: how certain an exit is of its prediction, as a number from 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgekd.registry import Registry
from edgekd.types import Array


@dataclass(frozen=True)
class ConfidenceMeasure:
    """One confidence measure; higher is more certain.

    Attributes:
        name: Name in a policy and for `edgekd tune --confidence`.
        of_batch: Maps float32 probabilities (..., C) to confidences (...) in 0..1.
        of_one: The same for the probabilities (C) of one image in plain floats, which is faster there than NumPy;
            without it, `of_batch` is called.
        cuda: CUDA expression of the confidence, for `--device-side-exit`. It may use the floats `first` and `second`
            (the two largest probabilities) and `negative_entropy` (sum of p log p), and the int `classes`. Without it,
            the measure cannot be evaluated on the device.
    """

    name: str
    of_batch: Callable[[Array], Array]
    of_one: Callable[[Sequence[float]], float] | None = None
    cuda: str | None = None

    def one(self, probabilities: Sequence[float]) -> float:
        """Return the confidence of one image, by `of_one` if there is one."""
        if self.of_one is not None:
            return self.of_one(probabilities)
        return float(self.of_batch(np.array(probabilities, np.float32)))


def _max_probability(probabilities: Array) -> Array:
    return np.asarray(np.maximum.reduce(probabilities, axis=-1))


def _margin(probabilities: Array) -> Array:
    top = np.partition(probabilities, -2, axis=-1)
    return np.asarray(top[..., -1] - top[..., -2])


def _margin_of_one(probabilities: Sequence[float]) -> float:
    second, first = sorted(probabilities)[-2:]
    return first - second


def _entropy(probabilities: Array) -> Array:
    logs = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
    negative_entropy: Array = (probabilities * logs).sum(axis=-1)
    return np.asarray(np.clip(1 + negative_entropy / np.float32(np.log(probabilities.shape[-1])), 0, 1))


def _entropy_of_one(probabilities: Sequence[float]) -> float:
    negative_entropy = sum(p * math.log(p) for p in probabilities if p > 0)
    return min(max(1 + negative_entropy / math.log(len(probabilities)), 0.0), 1.0)


MAX_PROBABILITY = ConfidenceMeasure("max_probability", _max_probability, max, "first")
"""The largest probability, p1."""
MARGIN = ConfidenceMeasure("margin", _margin, _margin_of_one, "first - second")
"""The difference of the two largest probabilities, p1 - p2."""
ENTROPY = ConfidenceMeasure(
    "entropy", _entropy, _entropy_of_one, "fminf(fmaxf(1 + negative_entropy / logf(classes), 0.0f), 1.0f)"
)
"""1 - H / log C with the entropy H: 0 for uniform probabilities, 1 for a certain prediction."""

CONFIDENCE_MEASURES: Registry[ConfidenceMeasure] = Registry(
    "confidence measure",
    "confidence_measures",
    ConfidenceMeasure,
    {
        "max_probability": "edgekd.confidence:MAX_PROBABILITY",
        "margin": "edgekd.confidence:MARGIN",
        "entropy": "edgekd.confidence:ENTROPY",
    },
)
