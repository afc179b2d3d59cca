"""The exit policy in pure NumPy, shared by the classifier and `edgekd tune`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from edgekd.confidence import CONFIDENCE_MEASURES
from edgekd.errors import nearest
from edgekd.types import Array

Average: TypeAlias = Literal["own", "mean", "geometric"]

NEVER_EXIT = 2.0
"""A threshold above every confidence."""
TEMPERATURES = (1e-3, 1e3)
"""Bounds of temperatures: beyond them, float32 probabilities are all 0 or 1, or all equal."""
FEW_CLASSES = 32
"""Up to this number of classes, `decide_one` is faster than `decide`."""
MAX_WEIGHT = 1e3
"""Bound of the pooling weights' magnitude."""


@dataclass(frozen=True)
class Policy:
    """Exit criterion, and computation of the predictions.

    An image exits at exit k if its confidence there is at least `thresholds[k]`; every image exits at the last exit.

    Attributes:
        temperatures: Softmax temperature of each exit.
        thresholds: Confidence threshold of each exit but the last, above 1 to disable the exit; empty before
            `edgekd tune`.
        confidence: Name of a confidence measure in `CONFIDENCE_MEASURES`.
        average: `own` predicts from the exit's own probabilities, `mean` from the mean over all exits so far,
            `geometric` from their weighted geometric mean: log p = sum over j of w_j log p_j + constant (Wolczyk et
            al. 2021, "Zero Time Waste"; a bias that is the same for all classes cancels out).
        pooling: With `geometric`, the weights of exits 0 to k for each exit k. The last exit's are 0, …, 0, 1: where no
            image exits early, the predictions are the last exit's own.
        defer_below: An image whose confidence at the exit it took is lower is passed on to a person; 0 for none.
    """

    temperatures: tuple[float, ...]
    thresholds: tuple[float, ...] = ()
    confidence: str = "max_probability"
    average: Average = "own"
    pooling: tuple[tuple[float, ...], ...] = ()
    defer_below: float = 0.0

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
        if not 0 <= self.defer_below < math.inf:
            raise ValueError("defer_below: must be finite and not negative")
        self._check_pooling()

    def _check_pooling(self) -> None:
        if self.average != "geometric":
            if self.pooling:
                raise ValueError(f"pooling: belongs to the average 'geometric', not to '{self.average}'")
            return
        exits = len(self.temperatures)
        if [len(row) for row in self.pooling] != list(range(1, exits + 1)):
            raise ValueError(f"pooling: rows of 1 to {exits} weights are required, one row per exit")
        if not all(abs(weight) <= MAX_WEIGHT for row in self.pooling for weight in row):
            raise ValueError(f"pooling: weights must be from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
        if self.pooling[-1] != (0.0,) * (exits - 1) + (1.0,):
            raise ValueError("pooling: the last exit's weights must be 0, …, 0, 1")

    @property
    def is_tuned(self) -> bool:
        """True if every exit but the last has a threshold (a single exit needs none)."""
        return len(self.thresholds) == len(self.temperatures) - 1

    @property
    def is_last_exit(self) -> bool:
        """True if all answers are the last exit's own: no threshold can be reached, and no other exit contributes."""
        never = self.is_tuned and all(t >= NEVER_EXIT for t in self.thresholds)
        return never and (self.average != "mean" or len(self.temperatures) == 1)

    def of_exits(self, keep: Sequence[int]) -> Policy:
        """Return the policy of some of the exits, as if the network had no others.

        Args:
            keep: Indices of the exits, rising; the last exit, which has no threshold, is one of them.
        """
        temperatures = tuple(self.temperatures[k] for k in keep)
        thresholds = tuple(self.thresholds[k] for k in keep[:-1] if self.thresholds)
        pooling = tuple(tuple(self.pooling[k][j] for j in keep if j <= k) for k in keep if self.pooling)
        return dataclasses.replace(self, temperatures=temperatures, thresholds=thresholds, pooling=pooling)

    def without_early_exit(self) -> Policy:
        """Return the same policy with thresholds above any confidence: the reference for what an early exit changes."""
        return dataclasses.replace(self, thresholds=(NEVER_EXIT,) * (len(self.temperatures) - 1))


@dataclass(frozen=True, eq=False)
class Decision:
    """Predictions for N images.

    Attributes:
        probabilities: Probabilities (N, C).
        exits: Index (N,) of the exit that each image took, from 0.
        confidence: Confidence (N,) at that exit.
        defer_below: See `Policy.defer_below`.
    """

    probabilities: Array
    exits: npt.NDArray[np.int64]
    confidence: Array
    defer_below: float = 0.0

    @property
    def deferred(self) -> npt.NDArray[np.bool_]:
        """Mask (N,) of the images that are passed on to a person."""
        return np.asarray(self.confidence < np.float32(self.defer_below))

    @classmethod
    def empty(cls, count: int, classes: int, defer_below: float = 0.0) -> Decision:
        """Allocate a decision for `count` images, to be filled by `put`."""
        probabilities, confidence = np.empty((count, classes), np.float32), np.empty(count, np.float32)
        return cls(probabilities, np.empty(count, np.int64), confidence, defer_below)

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
        state: What the next exit needs of the exits so far: with `mean` the sum (B, C) of their probabilities, with
            `geometric` their logits (B, K, C).
    """

    probabilities: Array
    confidence: Array
    exited: npt.NDArray[np.bool_]
    state: Array


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


def decide(policy: Policy, exit: int, logits: Array, state: Array) -> ExitDecision:
    """Decide which images of a batch exit here.

    Args:
        policy: The policy, with thresholds.
        exit: Index of the exit.
        logits: Logits (B, C) of this exit.
        state: `ExitDecision.state` of the exit before; zeros (B, C) at the first exit.

    Returns:
        The decision, with the state for the next exit.
    """
    probabilities, state = predict(policy, exit, logits, state)
    confidences = CONFIDENCE_MEASURES[policy.confidence].of_batch(probabilities)
    if exit == len(policy.temperatures) - 1:
        return ExitDecision(probabilities, confidences, np.ones(len(confidences), bool), state)
    return ExitDecision(probabilities, confidences, confidences >= policy.thresholds[exit], state)


def predict(policy: Policy, exit: int, logits: Array, state: Array) -> tuple[Array, Array]:
    """Return the probabilities (B, C) at an exit and the state for the next exit; see `decide`."""
    if policy.pooling:
        state = np.concatenate([state, logits[:, None]], axis=1) if exit else logits[:, None]
        return softmax(np.einsum("k,bkc->bc", np.array(_logit_weights(policy, exit), np.float32), state)), state
    probabilities = softmax(logits, policy.temperatures[exit])
    if policy.average == "own":
        return probabilities, state
    state = state + probabilities
    return state / np.float32(exit + 1), state


def decide_one(
    policy: Policy, exit: int, logits: list[float], state: list[Any]
) -> tuple[list[float], float, bool, list[Any]]:
    """Decide for one image of few classes, in plain floats.

    A dozen NumPy calls cost more than the arithmetic, most of all right after an engine has evicted the caches.

    Args:
        policy: The policy, with thresholds.
        exit: Index of the exit.
        logits: Logits (C) of this exit.
        state: State (C or K, C) of the exit before, as in `decide`; zeros (C) at the first exit.

    Returns:
        Probabilities (C), confidence, True if the image exits, and the state for the next exit.
    """
    top, temperature = max(logits), policy.temperatures[exit]
    if policy.pooling:
        state = [*state, logits] if exit else [logits]
        weights = _logit_weights(policy, exit)
        logits = [sum(w * x for w, x in zip(weights, of_class)) for of_class in zip(*state)]
        top, temperature = max(logits), 1.0
    powers = [math.exp((x - top) / temperature) for x in logits]
    norm = sum(powers)
    probabilities = [p / norm for p in powers]
    if policy.average == "mean":
        state = [t + p for t, p in zip(state, probabilities)]
        probabilities = [t / (exit + 1) for t in state]
    confidence = CONFIDENCE_MEASURES[policy.confidence].one(probabilities)
    is_last = exit == len(policy.temperatures) - 1
    return probabilities, confidence, is_last or bool(np.float32(confidence) >= policy.thresholds[exit]), state


def _logit_weights(policy: Policy, exit: int) -> list[float]:
    """Return the weights of the logits of exits 0 to `exit`, whose sum has the pooled probabilities as its softmax."""
    return [weight / temperature for weight, temperature in zip(policy.pooling[exit], policy.temperatures)]


def simulate(logits: Array, policy: Policy) -> Decision:
    """Compute the predictions of the cascade from the logits (E, N, C) of all exits.

    Args:
        logits: Logits of every exit for every image.
        policy: The policy, with thresholds.
    """
    _, count, classes = logits.shape
    decision = Decision.empty(count, classes, policy.defer_below)
    state, active = np.zeros((count, classes), np.float32), np.ones(count, bool)
    for exit, exit_logits in enumerate(logits):
        decided = decide(policy, exit, exit_logits, state)
        exited = active & decided.exited
        decision.put(np.flatnonzero(exited), exited, exit, decided)
        active &= ~exited
        state = decided.state
    return decision


def ensemble(logits: Array) -> Array:
    """Average the exits' probabilities at temperature 1: logits (E, N, C) to (N, C); eq. 7 of Gao et al. 2022."""
    return np.asarray(softmax(logits).mean(axis=0))
