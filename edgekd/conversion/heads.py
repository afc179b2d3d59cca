"""Exit heads on pooled features of a frozen network, trained on the network's own final answers (self-distillation)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgekd.types import Array, Labels, Progress

if TYPE_CHECKING:
    from torch import Tensor, nn

Kind = Literal["linear", "hidden"]
KINDS: tuple[Kind, ...] = ("linear", "hidden")
DECAYS = 0.01, 0.3, 3.0
"""Weight decays that are tried on the candidate in the middle; the best of each kind is used for all."""
HIDDEN = 128
"""Units of the hidden layer; a quarter of the classes if that is more."""
BATCH = 512
EPOCHS = 30
STEPS = 200, 600
"""Fewest and most steps of a training."""
RATE = 3e-3
"""Peak of the one-cycle learning rate."""
LABEL_WEIGHT = 0.25
"""Weight of the labels' cross-entropy, where there are labels, beside that of the network's answers."""
LEAST_DEVIATION = 1e-3
"""Least standard deviation of a feature, as a fraction of its mean: what varies less is mostly rounding."""
CHUNK = 1024
"""Pictures whose features are in memory together when all are gone through."""


@dataclass(frozen=True)
class Head:
    """A trained exit head, standardisation of the features included.

    Attributes:
        kind: `linear`, or `hidden` with one hidden layer and ReLU.
        layers: Weights (out, in) and biases (out,) of the linear layers.
        logits: Logits (H, C) of the held-out pictures.
        loss: Their mean cross-entropy to the network's own answers, in nats.
        decay: Weight decay that it was trained with.
    """

    kind: Kind
    layers: tuple[tuple[Array, Array], ...]
    logits: Array
    loss: float
    decay: float


@dataclass(frozen=True)
class Lesson:
    """The pictures that heads learn from, by row of the features, and the network's answers.

    Attributes:
        learned: Rows of the pictures to learn from.
        held_out: Rows of the pictures that choose between heads.
        answers: The network's logits (N, V, C).
        labels: Labels (N,), if there are any.
    """

    learned: Labels
    held_out: Labels
    answers: Array
    labels: Labels | None = None


def train_heads(
    pooled: Sequence[Array], lesson: Lesson, *, seed: int = 0, progress: Progress | None = None
) -> tuple[Head, ...]:
    """Train a head at each candidate: of each kind, the one that answers held-out pictures most like the network.

    Args:
        pooled: Features (N, V, F) of each candidate.
        lesson: The pictures and answers.
        seed: Seed of the initial weights and of the order of pictures.
        progress: Called with the trainings done and their number.
    """
    middle, done = len(pooled) // 2, 0
    total = len(KINDS) * (len(DECAYS) + len(pooled) - 1)
    decays, best = dict[Kind, float](), dict[int, Head]()

    def trained(at: int, kind: Kind, decay: float) -> Head:
        nonlocal done
        head = _train(pooled[at], lesson, kind, decay, seed)
        done += 1
        if progress:
            progress(done, total)
        return head

    for kind in KINDS:
        head = min((trained(middle, kind, decay) for decay in DECAYS), key=lambda head: head.loss)
        decays[kind] = head.decay
        best[middle] = min(best.get(middle, head), head, key=lambda head: head.loss)
    for at in range(len(pooled)):
        if at != middle:
            best[at] = min((trained(at, kind, decays[kind]) for kind in KINDS), key=lambda head: head.loss)
    return tuple(best[at] for at in range(len(pooled)))


def _train(pooled: Array, lesson: Lesson, kind: Kind, decay: float, seed: int) -> Head:
    """Train one head with AdamW and a one-cycle rate, on batches that are read from the file of the features."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for such small products, threads wait for each other longer than they work
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _trained(pooled, lesson, kind, decay, np.random.default_rng(seed))
    finally:
        torch.set_num_threads(threads)


def _trained(pooled: Array, lesson: Lesson, kind: Kind, decay: float, rng: np.random.Generator) -> Head:
    import torch

    views, classes = lesson.answers.shape[1:]
    mean, deviation = _moments(pooled, lesson.learned)
    network, count = _network(kind, len(mean), classes).train(), len(lesson.learned) * views
    steps = min(max(EPOCHS * math.ceil(count / BATCH), STEPS[0]), STEPS[1])
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for rows in _batches(lesson.learned, views, steps, rng):
        features = torch.from_numpy((pooled[rows] - mean) / deviation)
        answers = torch.from_numpy(lesson.answers[rows]).softmax(dim=1)
        logits = network(features)
        loss = _soft_cross_entropy(logits, answers)
        if lesson.labels is not None:
            labels = torch.from_numpy(lesson.labels[rows[0]])
            loss = torch.lerp(loss, torch.nn.functional.cross_entropy(logits, labels), LABEL_WEIGHT)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        parts = [network(torch.from_numpy((pooled[rows, 0] - mean) / deviation)) for rows in _chunks(lesson.held_out)]
        logits = torch.cat(parts)
        answers = torch.from_numpy(lesson.answers[lesson.held_out, 0]).softmax(dim=1)
        loss_value = float(_soft_cross_entropy(logits, answers))
    return Head(kind, _layers(network, mean, deviation), logits.numpy(), loss_value, decay)


def _network(kind: Kind, features: int, classes: int) -> nn.Sequential:
    from torch import nn

    if kind == "linear":
        return nn.Sequential(nn.Linear(features, classes))
    width = max(HIDDEN, classes // 4)
    return nn.Sequential(
        nn.Dropout(0.1), nn.Linear(features, width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, classes)
    )


def _soft_cross_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Return the mean of −Σ_c p_c log q_c, both (B, C)."""
    return -(probabilities * logits.log_softmax(dim=1)).sum(dim=1).mean()


def _batches(rows: Labels, views: int, steps: int, rng: np.random.Generator) -> list[tuple[Labels, Labels]]:
    """Return the pictures and views (B,) of each step: one random order of all after the other."""
    count = len(rows) * views
    orders = [rng.permutation(count) for _ in range(math.ceil(steps * BATCH / count))]
    order = np.concatenate(orders)[: steps * BATCH].reshape(steps, BATCH)
    return [(rows[batch // views], batch % views) for batch in order]


def _chunks(rows: Labels) -> list[Labels]:
    return [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]


def _moments(pooled: Array, rows: Labels) -> tuple[Array, Array]:
    """Return the mean and the standard deviation (F,) of the features.

    Where the deviation is less than `LEAST_DEVIATION` of the mean, it is infinite: the feature is not used.
    """
    total = squares = np.zeros(pooled.shape[2], np.float64)
    count = len(rows) * pooled.shape[1]
    for chunk in _chunks(rows):
        total = total + pooled[chunk].sum(axis=(0, 1), dtype=np.float64)
    mean = total / count
    for chunk in _chunks(rows):
        squares = squares + ((pooled[chunk] - mean) ** 2).sum(axis=(0, 1))
    deviation = np.sqrt(squares / count)
    deviation = np.where(deviation > LEAST_DEVIATION * np.abs(mean), deviation, np.inf)
    return mean.astype(np.float32), deviation.astype(np.float32)


def _layers(network: nn.Sequential, mean: Array, deviation: Array) -> tuple[tuple[Array, Array], ...]:
    """Return the weights of the linear layers, the standardisation folded into the first: W/σ and b − W·(μ/σ)."""
    from torch import nn

    linear = [module for module in network if isinstance(module, nn.Linear)]
    layers = [(m.weight.detach().numpy().astype(np.float64), m.bias.detach().numpy()) for m in linear]
    weights, bias = layers[0]
    layers[0] = weights / deviation, bias - weights @ (mean.astype(np.float64) / deviation)
    return tuple((w.astype(np.float32), b.astype(np.float32)) for w, b in layers)
