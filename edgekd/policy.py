"""When to stop: pure numpy, no engine. The classifier and `edgekd tune` both decide with `step`, and with its like for
one image of few classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from edgekd.errors import closest
from edgekd.types import Array

Measure: TypeAlias = Literal["max_probability", "margin", "entropy"]
Average: TypeAlias = Literal["own", "mean"]

NEVER_EXIT = 2.0
"""A threshold that no confidence reaches."""
TEMPERATURES = (1e-3, 1e3)
"""Temperatures of exits; beyond, float32 probabilities are all 0 or 1, or all alike."""
FEW_CLASSES = 32
"""Up to so many, `step_of_one` is faster than `step`."""


@dataclass(frozen=True)
class Policy:
    """How exits decide. One temperature an exit; one threshold an exit but the last, none before `edgekd tune`.

    A sample leaves at exit k when its confidence is >= thresholds[k]; above 1 means never. The answer and its
    confidence come from the exit's own probabilities, or from the mean over the exits seen so far.
    """

    temperatures: tuple[float, ...]
    thresholds: tuple[float, ...] = ()
    confidence: Measure = "max_probability"
    average: Average = "own"

    def __post_init__(self) -> None:
        low, high = TEMPERATURES
        if not self.temperatures or not all(low <= t <= high for t in self.temperatures):
            raise ValueError(f"temperatures: one for each exit, from {low:g} to {high:g}")
        if self.thresholds and len(self.thresholds) != len(self.temperatures) - 1:
            raise ValueError("thresholds: one for each exit but the last, or none")
        if not all(0 <= t < math.inf for t in self.thresholds):
            raise ValueError("thresholds: numbers from 0 on")
        for name, value, known in (
            ("confidence", self.confidence, get_args(Measure)),
            ("average", self.average, get_args(Average)),
        ):
            if value not in known:
                raise ValueError(f"{name}: '{value}' is none of {', '.join(known)}. {closest(value, known)}".rstrip())

    @property
    def is_tuned(self) -> bool:
        """Whether every exit but the last has a threshold (a single exit needs none)."""
        return len(self.thresholds) == len(self.temperatures) - 1


@dataclass(frozen=True, eq=False)
class Decision:
    """Answers for N images: probabilities (N, C), the exit that gave each (N,), from 0, and its confidence (N,)."""

    probabilities: Array
    exits: npt.NDArray[np.int64]
    confidence: Array

    @classmethod
    def empty(cls, count: int, classes: int) -> Decision:
        """Room for `count` answers, to be written into."""
        return cls(np.empty((count, classes), np.float32), np.empty(count, np.int64), np.empty(count, np.float32))

    def put(self, rows: npt.NDArray[np.int64], which: npt.NDArray[np.bool_], exit: int, seen: ExitDecision) -> None:
        """Write the rows of `seen` where `which` holds, as the answers of `exit` for the images `rows`."""
        self.probabilities[rows] = seen.probabilities[which]
        self.confidence[rows] = seen.confidence[which]
        self.exits[rows] = exit


class ExitDecision(NamedTuple):
    """What one exit says of B samples: answer (B, C), confidence (B,), who leaves (B,), running total (B, C)."""

    probabilities: Array
    confidence: Array
    exited: npt.NDArray[np.bool_]
    total: Array


def softmax(logits: Array, temperature: float = 1.0) -> Array:
    """(..., C) logits to probabilities at a temperature; any magnitude is safe."""
    powers: Array = logits / np.float32(temperature)
    powers -= np.maximum.reduce(powers, axis=-1, keepdims=True)
    np.exp(powers, powers)
    powers /= np.add.reduce(powers, axis=-1, keepdims=True)
    return powers


def confidence(probabilities: Array, measure: Measure) -> Array:
    """(..., C) probabilities to (...) in 0..1, higher is surer.

    max_probability: p1. margin: p1 - p2. entropy: 1 - H / log C, so 0 when uniform and 1 when certain.
    """
    if measure == "max_probability":
        return np.asarray(np.maximum.reduce(probabilities, axis=-1))
    if measure == "margin":
        top = np.partition(probabilities, -2, axis=-1)
        return np.asarray(top[..., -1] - top[..., -2])
    logs = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
    negative_entropy: Array = (probabilities * logs).sum(axis=-1)
    return np.asarray(np.clip(1 + negative_entropy / np.float32(np.log(probabilities.shape[-1])), 0, 1))


def decide(policy: Policy, exit: int, logits: Array, total: Array) -> ExitDecision:
    """Exit number `exit` looks at B samples.

    logits: (B, C). total: (B, C), the sum of the probabilities of the exits before, zeros at the first.
    """
    answer = softmax(logits, policy.temperatures[exit])
    if policy.average == "mean":
        total = total + answer
        answer = total / np.float32(exit + 1)
    sure = confidence(answer, policy.confidence)
    is_last = exit == len(policy.temperatures) - 1
    return ExitDecision(answer, sure, np.ones(len(sure), bool) if is_last else sure >= policy.thresholds[exit], total)


def decide_one(
    policy: Policy, exit: int, logits: list[float], total: list[float]
) -> tuple[list[float], float, bool, list[float]]:
    """`step` for one sample: its answer (C), confidence, whether it leaves, and running total (C), in plain floats.

    A dozen calls into numpy cost more than the arithmetic does, and most right after an engine has emptied the caches.
    """
    top, temperature = max(logits), policy.temperatures[exit]
    powers = [math.exp((x - top) / temperature) for x in logits]
    norm = sum(powers)
    answer = [p / norm for p in powers]
    if policy.average == "mean":
        total = [t + p for t, p in zip(total, answer)]
        answer = [t / (exit + 1) for t in total]
    is_max = policy.confidence == "max_probability"
    sure = max(answer) if is_max else float(confidence(np.array(answer, np.float32), policy.confidence))
    is_last = exit == len(policy.temperatures) - 1
    return answer, sure, is_last or np.float32(sure) >= policy.thresholds[exit], total


def simulate(logits: Array, policy: Policy) -> Decision:
    """What the cascade answers, from logits (E, N, C) of all exits; `policy` must have its thresholds."""
    _, count, classes = logits.shape
    decision = Decision.empty(count, classes)
    total, waiting = np.zeros((count, classes), np.float32), np.ones(count, bool)
    for exit, found in enumerate(logits):
        seen = decide(policy, exit, found, total)
        leaving = waiting & seen.exited
        decision.put(np.flatnonzero(leaving), leaving, exit, seen)
        waiting &= ~leaving
        total = seen.total
    return decision


def ensemble(logits: Array) -> Array:
    """Mean of the exits' probabilities at temperature 1, (E, N, C) to (N, C): eq. 7 of Gao et al. 2022."""
    return np.asarray(softmax(logits).mean(axis=0))
