"""Losses of early exit: what an exit policy's answers to N images lose against the reference.

The reference of a policy is the same policy with every threshold at `NEVER_EXIT`, so it loses exactly nothing against
itself. An image that the policy defers to a person has no answer, and no loss.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekd.artifacts.certificate import OF_A_CLASS, WITHOUT_LABELS, Promise
from edgekd.errors import ConfigError
from edgekd.policy import Policy, simulate
from edgekd.types import Array, Labels

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Sample:
    """Recorded logits of N images.

    Attributes:
        logits: Logits (E, N, C) of the engine's exits, float32 as computed.
        labels: Class indices (N,); None if they are unknown.
        groups: Index (N,) of the picture or patient that each image belongs to; None if images are independent.
        reference: Logits (E, N, C) of the network that answers are compared with; None for the engine itself.
    """

    logits: Array
    labels: Labels | None = None
    groups: npt.NDArray[np.int64] | None = None
    reference: Array | None = None

    def __len__(self) -> int:
        return int(self.logits.shape[1])

    def take(self, rows: npt.NDArray[np.int64]) -> Sample:
        """Return the sample of some images, by their indices (K,)."""
        return Sample(
            self.logits[:, rows],
            None if self.labels is None else self.labels[rows],
            None if self.groups is None else self.groups[rows],
            None if self.reference is None else self.reference[:, rows],
        )


@dataclass(frozen=True, eq=False)
class Outcome:
    """Answers of a policy to N images.

    Attributes:
        answers: Class index (N,) of each image.
        reference: Class index (N,) that the reference answers.
        exits: Index (N,) of the exit taken.
        confidence: Confidence (N,) there.
        is_answered: Mask (N,) of the images that are not deferred.
    """

    answers: Labels
    reference: Labels
    exits: npt.NDArray[np.int64]
    confidence: Array
    is_answered: Mask

    def take(self, rows: npt.NDArray[np.int64]) -> Outcome:
        """Return the outcome for some images, by their indices (K,)."""
        return Outcome(*(column[rows] for column in vars(self).values()))


def can_exit_early(policy: Policy, exits: int | None = None) -> bool:
    """Return True if a threshold (of the first `exits` exits) is within the range of confidences."""
    return any(threshold <= 1 for threshold in policy.thresholds[:exits])


def outcomes(policies: tuple[Policy, ...], sample: Sample) -> list[Outcome]:
    """Compute what each policy and its reference answer, in the float32 arithmetic of the classifier."""
    logits = sample.logits if sample.reference is None else sample.reference
    references: dict[Policy, Labels] = {}
    found = []
    for policy in policies:
        slowest = dataclasses.replace(policy.without_early_exit(), defer_below=0.0)
        if slowest not in references:
            references[slowest] = simulate(logits, slowest).probabilities.argmax(axis=1)
        decision = simulate(sample.logits, policy)
        answers = decision.probabilities.argmax(axis=1)
        found.append(Outcome(answers, references[slowest], decision.exits, decision.confidence, ~decision.deferred))
    return found


@dataclass(frozen=True, eq=False)
class Losses:
    """Losses of one outcome.

    Attributes:
        values: Loss (N,) of each image, at most 1.
        is_counted: Mask (N,) of the images whose mean loss is bounded. It depends on the policy.
    """

    values: Floats
    is_counted: Mask


def losses(promise: Promise, outcome: Outcome, sample: Sample, costs: Floats | None = None) -> Losses:
    """Compute the losses that a promise bounds.

    Args:
        promise: The promise.
        outcome: Answers of the policy.
        sample: The images, with labels unless the promise is `change`.
        costs: Costs (C, C) of answering the column's class to an image of the row's class; for `cost`.
    """
    answers, reference, labels = outcome.answers, outcome.reference, sample.labels
    everything = np.ones(len(answers), bool)
    if promise.loss == "change":
        values = answers != reference
    elif labels is None:
        raise ConfigError(
            f"a promise on '{promise.loss}' needs labels", fix=f"give --split, or promise {WITHOUT_LABELS[0]}"
        )
    elif promise.loss in ("lost", "miss"):
        values = (answers != labels) & (reference == labels)
    elif promise.loss == "drop":
        values = (answers != labels).astype(np.float64) - (reference != labels)
    elif promise.loss == "cost":
        assert costs is not None, "the costs of the promise"
        values = (costs[labels, answers] - costs[labels, reference]) / largest_rise(costs)
    else:  # absolute: conditional on being answered
        values = answers != labels
        everything = outcome.is_answered
    is_counted = everything if promise.exit is None else everything & (outcome.exits <= promise.exit)
    return Losses(np.where(outcome.is_answered, values, 0).astype(np.float64), is_counted)


def largest_rise(costs: Floats) -> float:
    """Return the largest rise of the cost of an image by another answer, from costs (C, C); it scales `cost` to 1."""
    return float((costs.max(axis=1) - costs.min(axis=1)).max())


def eligible(promise: Promise, sample: Sample, classes: tuple[str, ...]) -> Mask:
    """Return the mask (N,) of the images that a promise is about, whatever the policy answers."""
    if promise.loss not in OF_A_CLASS:
        return np.ones(len(sample), bool)
    if promise.class_name not in classes:
        raise ConfigError(f"no class '{promise.class_name}'", fix=f"classes: {', '.join(classes)}")
    if sample.labels is None:
        raise ConfigError(f"a promise on '{promise.loss}' needs labels", fix="give --split")
    return np.asarray(sample.labels == classes.index(promise.class_name))
