"""The exit policy in pure NumPy, shared by the classifier and `edgekd tune`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from edgekd.confidence import CONFIDENCE_MEASURES
from edgekd.errors import nearest
from edgekd.types import Array

Average: TypeAlias = Literal["own", "mean"]

NEVER_EXIT = 2.0
"""A threshold above every confidence."""
TEMPERATURES = (1e-3, 1e3)
"""Bounds of temperatures: beyond them, float32 probabilities are all 0 or 1, or all equal."""
FEW_CLASSES = 32
"""Up to this number of classes, `decide_one` is faster than `decide`."""


@dataclass(frozen=True)
class Policy:
    """Exit criterion, and computation of the predictions.

    An image exits at exit k if its confidence there is at least `thresholds[k]`; every image exits at the last exit.

    Attributes:
        temperatures: Softmax temperature of each exit.
        thresholds: Confidence threshold of each exit but the last, above 1 to disable the exit; empty before
            `edgekd tune`.
        confidence: Name of a confidence measure in `CONFIDENCE_MEASURES`.
        average: `own` predicts from the exit's own probabilities, `mean` from the mean over all exits so far.
    """

    temperatures: tuple[float, ...]
    thresholds: tuple[float, ...] = ()
    confidence: str = "max_probability"
    average: Average = "own"

    def __post_init__(self) -> None:
        low, high = TEMPERATURES
        if not self.temperatures or not all(low <= t <= high for t in self.temperatures):
            raise ValueError(f"temperatures: one per exit is required, from {low:g} to {high:g}")
        if self.thresholds and len(self.thresholds) != len(self.temperatures) - 1:
            raise ValueError("thresholds: one per exit but the last is required, or none at all")
        if not all(0 <= t < math.inf for t in self.thresholds):
            raise ValueError("thresholds: must be finite and not negative")
        if self.confidence not in CONFIDENCE_MEASURES:
            known = nearest(self.confidence, CONFIDENCE_MEASURES)
            raise ValueError(f"confidence: no measure '{self.confidence}' in edgekd or an installed package; {known}")
        if self.average not in get_args(Average):
            raise ValueError(f"average: '{self.average}'; {nearest(self.average, get_args(Average))}")

    @property
    def is_tuned(self) -> bool:
        """True if every exit but the last has a threshold (a single exit needs none)."""
        return len(self.thresholds) == len(self.temperatures) - 1

    @property
    def never_exits(self) -> bool:
        """True if every image takes the last exit, because no exit has a threshold that can be reached."""
        return self.is_tuned and all(t >= NEVER_EXIT for t in self.thresholds)

    def of_exits(self, keep: Sequence[int]) -> Policy:
        """Return the policy of some of the exits, as if the network had no others.

        Args:
            keep: Indices of the exits, rising; the last exit, which has no threshold, is one of them.
        """
        temperatures = tuple(self.temperatures[k] for k in keep)
        return replace(
            self, temperatures=temperatures, thresholds=tuple(self.thresholds[k] for k in keep[:-1] if self.thresholds)
        )


@dataclass(frozen=True, eq=False)
class Decision:
    """Predictions for N images.

    Attributes:
        probabilities: Probabilities (N, C).
        exits: Index (N,) of the exit that each image took, from 0.
        confidence: Confidence (N,) at that exit.
    """

    probabilities: Array
    exits: npt.NDArray[np.int64]
    confidence: Array

    @classmethod
    def empty(cls, count: int, classes: int) -> Decision:
        """Allocate a decision for `count` images, to be filled by `put`."""
        return cls(np.empty((count, classes), np.float32), np.empty(count, np.int64), np.empty(count, np.float32))

    def put(self, images: npt.NDArray[np.int64], rows: npt.NDArray[np.bool_], exit: int, decided: ExitDecision) -> None:
        """Store the predictions of images that take an exit.

        Args:
            images: Indices (K,) of the images in this decision.
            rows: Mask (B,) of their rows in `decided`, K of them True.
            exit: Index of the exit.
            decided: Decision of that exit for a batch of B.
        """
        self.probabilities[images] = decided.probabilities[rows]
        self.confidence[images] = decided.confidence[rows]
        self.exits[images] = exit


class ExitDecision(NamedTuple):
    """Decision of one exit for a batch of B images.

    Attributes:
        probabilities: Predicted probabilities (B, C).
        confidence: Confidence (B,).
        exited: Mask (B,) of the images that exit here.
        total: Sum (B, C) of the probabilities of all exits so far, for the next exit.
    """

    probabilities: Array
    confidence: Array
    exited: npt.NDArray[np.bool_]
    total: Array


def softmax(logits: Array, temperature: float = 1.0) -> Array:
    """Convert logits (..., C) to probabilities; numerically safe for logits of any magnitude."""
    powers: Array = logits / np.float32(temperature)
    powers -= np.maximum.reduce(powers, axis=-1, keepdims=True)
    np.exp(powers, powers)
    powers /= np.add.reduce(powers, axis=-1, keepdims=True)
    return powers


def confidence(probabilities: Array, measure: str) -> Array:
    """Compute the confidence (...) of probabilities (..., C) by the measure of this name."""
    return CONFIDENCE_MEASURES[measure].of_batch(probabilities)


def decide(policy: Policy, exit: int, logits: Array, total: Array) -> ExitDecision:
    """Decide which images of a batch exit here.

    Args:
        policy: The policy, with thresholds.
        exit: Index of the exit.
        logits: Logits (B, C) of this exit.
        total: Sum (B, C) of the probabilities of the earlier exits; zeros at the first exit.

    Returns:
        The decision, with the updated sum for the next exit.
    """
    probabilities = softmax(logits, policy.temperatures[exit])
    if policy.average == "mean":
        total = total + probabilities
        probabilities = total / np.float32(exit + 1)
    confidences = confidence(probabilities, policy.confidence)
    if exit == len(policy.temperatures) - 1:
        return ExitDecision(probabilities, confidences, np.ones(len(confidences), bool), total)
    return ExitDecision(probabilities, confidences, confidences >= policy.thresholds[exit], total)


def decide_one(
    policy: Policy, exit: int, logits: list[float], total: list[float]
) -> tuple[list[float], float, bool, list[float]]:
    """Decide for one image of few classes, in plain floats.

    A dozen NumPy calls cost more than the arithmetic, most of all right after an engine has evicted the caches.

    Args:
        policy: The policy, with thresholds.
        exit: Index of the exit.
        logits: Logits (C) of this exit.
        total: Sum (C) of the probabilities of the earlier exits; zeros at the first exit.

    Returns:
        Probabilities (C), confidence, True if the image exits, and the updated sum (C).
    """
    top, temperature = max(logits), policy.temperatures[exit]
    powers = [math.exp((x - top) / temperature) for x in logits]
    norm = sum(powers)
    probabilities = [p / norm for p in powers]
    if policy.average == "mean":
        total = [t + p for t, p in zip(total, probabilities)]
        probabilities = [t / (exit + 1) for t in total]
    confidence = CONFIDENCE_MEASURES[policy.confidence].one(probabilities)
    is_last = exit == len(policy.temperatures) - 1
    return probabilities, confidence, is_last or bool(np.float32(confidence) >= policy.thresholds[exit]), total


def simulate(logits: Array, policy: Policy) -> Decision:
    """Compute the predictions of the cascade from the logits (E, N, C) of all exits.

    Args:
        logits: Logits of every exit for every image.
        policy: The policy, with thresholds.
    """
    _, count, classes = logits.shape
    decision = Decision.empty(count, classes)
    total, active = np.zeros((count, classes), np.float32), np.ones(count, bool)
    for exit, exit_logits in enumerate(logits):
        decided = decide(policy, exit, exit_logits, total)
        exited = active & decided.exited
        decision.put(np.flatnonzero(exited), exited, exit, decided)
        active &= ~exited
        total = decided.total
    return decision


def ensemble(logits: Array) -> Array:
    """Average the exits' probabilities at temperature 1: logits (E, N, C) to (N, C); eq. 7 of Gao et al. 2022."""
    return np.asarray(softmax(logits).mean(axis=0))
