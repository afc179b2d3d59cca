"""Temperatures, pooling weights and exit thresholds, fitted to recorded logits; no engine is needed.

Every exit gets a logistic model of the loss of an image that leaves there, given its confidence: linear in the
log-odds of the confidence (Platt 1999). One number δ then sets all thresholds: an image leaves where its modelled loss
is at most δ times the time that it saves. So the thresholds of an engine form one curve from "never" to "always at the
first exit", and a point of it owes little to luck: of many free combinations, the best on some images is often not the
best on others. PCEE (arXiv 2412.19325) has one δ as well, from the accuracy at similar confidences and regardless of
time. `benchmarks/exit_policies.py` compares this with a grid of thresholds, isotonic regression and coordinate descent;
benchmarks/results/exit-policies.md has the results.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgekd.policy import NEVER_EXIT, Policy, confidence, predict
from edgekd.types import Array, Labels

Floats = npt.NDArray[np.float64]
LEVELS = 200
"""Number of values of δ that are tried."""
COMBINATIONS = 2000
"""Largest number of combinations of a grid of thresholds."""
GRID_EXITS = 5
"""Largest number of exits with such a grid: with more, it would have too few thresholds for each."""
FIT_ELEMENTS = 1_000_000
"""Largest number of logits of one exit that a temperature or pooling weights are fitted to: they are few parameters."""
_LARGEST = float(np.nextafter(np.float32(1), np.float32(0)))
"""The largest float32 below 1."""


def fit_temperature(logits: Array, labels: Labels) -> float:
    """Find the temperature in 0.25..10 with the least negative log-likelihood.

    Golden-section search on the logarithm of the temperature.

    Args:
        logits: Logits (N, C) of one exit.
        labels: Class indices (N,).

    Returns:
        The temperature; logits are divided by it.
    """
    logits, labels = logits[: _rows(logits)].astype(np.float64), labels[: _rows(logits)]
    images = np.arange(len(labels))

    def loss(at: float) -> float:
        scaled = logits / np.exp(at)
        scaled -= scaled.max(axis=1, keepdims=True)
        return float((np.log(np.exp(scaled).sum(axis=1)) - scaled[images, labels]).sum())

    low, high, golden = np.log(0.25), np.log(10.0), (5**0.5 - 1) / 2
    while high - low > 1e-3:
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return float(np.exp((low + high) / 2))


def _rows(logits: Array) -> int:
    """Return the number of images to fit few parameters to."""
    return int(max(FIT_ELEMENTS // logits.shape[1], 200))


def fit_pooling(logits: Array, targets: Labels, temperatures: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """Find the weights of the exits' geometric mean (`Policy.pooling`) with the least negative log-likelihood.

    A ridge penalty holds them near the exit's own answer. Convex, one problem of k + 1 weights for exit k; the last
    exit keeps its own answer.

    Args:
        logits: Logits (E, N, C) of all exits.
        targets: Class indices (N,): labels, or the answers of the last exit.
        temperatures: Temperature of each exit.
    """
    from scipy.optimize import minimize

    exits, rows = len(logits), _rows(logits[0])
    targets = targets[:rows]
    scaled = logits[:, :rows].astype(np.float64) / np.reshape(temperatures, (-1, 1, 1))
    images = np.arange(len(targets))

    def loss(weights: Floats, own: Floats) -> tuple[float, Floats]:
        earlier = scaled[: len(weights)]
        pooled = np.tensordot(weights, earlier, 1)
        pooled -= pooled.max(axis=1, keepdims=True)
        probabilities = np.exp(pooled)
        norms = probabilities.sum(axis=1, keepdims=True)
        likelihood = (pooled[images, targets] - np.log(norms[:, 0])).sum()
        probabilities /= norms
        probabilities[images, targets] -= 1
        away = weights - own
        return away @ away - likelihood, np.einsum("nc,jnc->j", probabilities, earlier) + 2 * away

    pooling = []
    for exit in range(exits - 1):
        own = np.eye(exit + 1)[exit]
        found = minimize(loss, own, (own,), jac=True, method="L-BFGS-B", bounds=[(-10, 10)] * (exit + 1))
        pooling.append(tuple(found.x.tolist()))
    return (*pooling, (0.0,) * (exits - 1) + (1.0,))


def at_every_exit(logits: Array, policy: Policy, measures: Sequence[str]) -> tuple[list[Array], Labels]:
    """Return the confidences (E, N) by each measure and the answers (E, N) of every image at every exit.

    These are the numbers that `decide` compares with the thresholds, as if no image had exited before.
    """
    state = np.zeros_like(logits[0])
    confidences = [np.empty(logits.shape[:2], np.float32) for _ in measures]
    answers = np.empty(logits.shape[:2], np.int64)
    for exit, exit_logits in enumerate(logits):
        probabilities, state = predict(policy, exit, exit_logits, state)
        answers[exit] = probabilities.argmax(axis=1)
        for found, measure in zip(confidences, measures):
            found[exit] = confidence(probabilities, measure)
    return confidences, answers


def exits_taken(confidences: Array, thresholds: Array) -> npt.NDArray[np.int8]:
    """Return the exit (S, N) of every image under each of S settings.

    Args:
        confidences: Confidences (E, N), from `at_every_exit`.
        thresholds: Thresholds (S, E - 1).
    """
    exits, count = confidences.shape
    taken = np.full((len(thresholds), count), exits - 1, np.int8)
    for exit in reversed(range(exits - 1)):
        taken[confidences[exit] >= thresholds[:, exit, None]] = exit
    return taken


def candidate_thresholds(confidences: Array, losses: Floats, stages: Sequence[float]) -> Array:
    """Return thresholds (S, E - 1) for rising δ, from never to always at the first exit.

    Args:
        confidences: Confidences (E, N), from `at_every_exit`.
        losses: Loss (E, N), 0..1, of each image if it leaves at an exit.
        stages: Milliseconds of each stage.
    """
    ends = np.cumsum(stages)
    saved = (ends[-1] - ends[:-1]) / max(ends[-1] - ends[0], 1e-12)
    levels = np.geomspace(1e-6, 1, LEVELS)[:, None] * saved
    thresholds = np.empty_like(levels)
    for exit, allowed in enumerate(levels.T):
        intercept, slope = _loss_model(_log_odds(confidences[exit]), losses[exit])
        with np.errstate(divide="ignore"):
            needed = 1 / (1 + np.exp((intercept - np.log(allowed / (1 - allowed))) / slope))
        thresholds[:, exit] = np.where(needed > _LARGEST, NEVER_EXIT, needed)
    thresholds[0], thresholds[-1] = NEVER_EXIT, 0
    return np.asarray(thresholds, np.float32)


def threshold_grid(confidences: Array) -> Array:
    """Return every combination (S, E - 1) of a few quantiles of the confidence; none beyond `GRID_EXITS` exits.

    Where some exits are more accurate than later ones, an image may gain from an early exit, and the thresholds that
    keep the accuracy are not those that keep the answers: free combinations then have faster settings than
    `candidate_thresholds`. Most quantiles are low, because the images at a late exit have a low confidence.
    """
    exits = len(confidences)
    if not 1 < exits <= GRID_EXITS:
        return np.empty((0, exits - 1), np.float32)
    each = min(50, int(COMBINATIONS ** (1 / (exits - 1)) + 1e-9))
    quantiles = np.linspace(0, 1, each)[1:-1] ** 2
    columns = [[0.0, *np.quantile(of_exit, quantiles), NEVER_EXIT] for of_exit in confidences[:-1]]
    return np.array(list(itertools.product(*columns)), np.float32)


def _log_odds(confidences: Array) -> Floats:
    clipped = np.clip(confidences.astype(np.float64), 1e-7, _LARGEST)
    return np.asarray(np.log(clipped / (1 - clipped)))


def _loss_model(log_odds: Floats, losses: Floats) -> tuple[float, float]:
    """Fit intercept and (negative) slope of the log-odds of the loss.

    Half a lost and half a kept image of average confidence, and a weak prior on the slope, keep both finite.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    centre, spread = log_odds.mean(), log_odds.std() + 1e-9
    x = np.append((log_odds - centre) / spread, 0)
    y, weights = np.append(losses, 0.5), np.append(np.ones(len(losses)), 1)

    def loss(at: Floats) -> tuple[float, Floats]:
        odds = at[0] + at[1] * x
        slip = weights * (expit(odds) - y)
        value = (weights * (np.logaddexp(0, odds) - y * odds)).sum() + (at[1] + 1) ** 2 / 2
        return value, np.array([slip.sum(), slip @ x + at[1] + 1])

    rate = y.mean()
    start = np.array([np.log(rate / (1 - rate)), -1])
    a, b = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(-30, 30), (-30, -0.01)]).x
    return float(a - b * centre / spread), float(b / spread)
