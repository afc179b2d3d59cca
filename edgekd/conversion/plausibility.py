"""Plausibility of a classifier: mistakes of preprocessing and class order, and pictures that it was not made for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment
from scipy.special import softmax
from scipy.stats import binomtest

from edgekd.conversion.preprocessing import PRESETS
from edgekd.conversion.source import TrainedClassifier
from edgekd.data.images import Source, load_batch
from edgekd.data.preprocess import Preprocess
from edgekd.types import Array, Labels

TRIED = 200
"""Largest number of images that other settings are tried on."""
CERTAINTY = 0.99
BELOW_EXPECTED = 2.0
"""Points below the expected accuracy that are still no cause for a warning."""
ONE_ANSWER = 0.95
"""Share of images with the same answer from which on a warning is due."""


@dataclass(frozen=True)
class Plausibility:
    """Accuracy of a classifier on labelled images, and what may be wrong.

    Attributes:
        accuracy: Share of images classified correctly.
        warning: What is suspicious, and what to do; empty if nothing is.
    """

    accuracy: float
    warning: str = ""


def check_accuracy(
    classifier: TrainedClassifier, pictures: Sequence[Source], labels: Labels, *, expect: float | None = None
) -> Plausibility:
    """Measure the accuracy, and where it is suspicious try which mistake would explain it.

    Suspicious is an accuracy that is not significantly above that of the most frequent class (one-sided binomial test,
    1 %), or whose 99 % upper bound is more than `BELOW_EXPECTED` points below `expect`. Then other scaling and order of
    channels, and another order of classes, are tried on up to `TRIED` images. An order of classes is fitted on one half
    of them and measured on the other.

    Args:
        classifier: The classifier.
        pictures: Labelled images (N,), none of which it was trained on.
        labels: Their classes (N,).
        expect: Accuracy in percent that its makers state.
    """
    images = load_batch(pictures, classifier.preprocess)
    logits = _logits(classifier, images)
    right = int((logits.argmax(axis=1) == labels).sum())
    accuracy = right / len(labels)
    frequent = int(np.bincount(labels).max())
    problem = ""
    if binomtest(right, len(labels), frequent / len(labels), "greater").pvalue > 1 - CERTAINTY:
        problem = f"no better than always answering the most frequent class ({frequent / len(labels):.1%})"
    elif expect is not None:
        upper = binomtest(right, len(labels)).proportion_ci(2 * CERTAINTY - 1).high
        if 100 * upper < expect - BELOW_EXPECTED:
            problem = f"far below the expected {expect:g} %"
    if not problem:
        return Plausibility(accuracy)
    chosen = np.linspace(0, len(labels) - 1, min(TRIED, len(labels))).astype(int)
    cause = _likely_cause(classifier, images[chosen], logits[chosen], labels[chosen])
    return Plausibility(
        accuracy,
        f"{accuracy:.1%} of {len(labels)} images are classified correctly, {problem}: "
        f"likely a mistake of preprocessing or class order; {cause}",
    )


def _likely_cause(classifier: TrainedClassifier, images: Array, logits: Array, labels: Labels) -> str:
    right = logits.argmax(axis=1) == labels
    tried = [(text, _logits(classifier, x).argmax(axis=1) == labels) for text, x in _variants(classifier, images)]
    order, rows = _ordered(logits, labels)
    candidates = [(text, right, other) for text, other in tried]
    candidates += [("the classes in another order (--classes)", right[rows], order)]
    better = [(other.mean() - own.mean(), text, own, other) for text, own, other in candidates]
    _, text, own, other = max(better, key=lambda entry: entry[0])
    gained, lost = int((other & ~own).sum()), int((own & ~other).sum())
    chance = np.bincount(labels).max() / len(labels)
    is_clear = gained > lost and binomtest(gained, gained + lost).pvalue * len(candidates) < 1 - CERTAINTY
    if is_clear and binomtest(int(other.sum()), len(other), chance, "greater").pvalue < 1 - CERTAINTY:
        return f"{text} gives {other.mean():.1%} where this gives {own.mean():.1%} ({len(own)} images)"
    return "neither another preset, the other order of channels nor another order of classes does much better"


def _variants(classifier: TrainedClassifier, images: Array) -> Iterator[tuple[str, Array]]:
    """Yield descriptions of other settings and the images under them; their resizing stays."""
    given = classifier.preprocess
    if given.channels == "grey":
        return
    pixels = np.rint((images * _column(given.std) + _column(given.mean)) / np.float32(given.scale)).astype(np.uint8)
    pixels = pixels if given.channels == "rgb" else pixels[:, ::-1]
    seen = {_scaling(given)}
    for name, preset in (("", None), *PRESETS.items()):
        like = preset.preprocess(given.image_size) if preset else given
        for channels in ("rgb", "bgr"):
            one = dataclasses.replace(given, mean=like.mean, std=like.std, scale=like.scale, channels=channels)
            if _scaling(one) not in seen:
                seen.add(_scaling(one))
                words = [f"--preprocess {name}"] if name else []
                words += [f"--channels {channels}"] if channels != like.channels else []
                yield " ".join(words), one.normalised(pixels.transpose(0, 2, 3, 1))


def _scaling(preprocess: Preprocess) -> tuple[object, ...]:
    return preprocess.mean, preprocess.std, preprocess.scale, preprocess.channels


def _column(values: tuple[float, float, float]) -> Array:
    return np.array(values, np.float32).reshape(3, 1, 1)


def _ordered(logits: Array, labels: Labels) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Fit an order of classes on half of the images; return which of the others it gets right, and their places."""
    count, answers = logits.shape[1], logits.argmax(axis=1)
    fitted, rows = np.array_split(np.random.default_rng(0).permutation(len(labels)), 2)
    counts = np.zeros((count, count))
    np.add.at(counts, (answers[fitted], labels[fitted]), 1)
    _, order = linear_sum_assignment(counts, maximize=True)
    return order[answers[rows]] == labels[rows], rows


def _logits(classifier: TrainedClassifier, images: Array) -> Array:
    return np.concatenate([classifier.logits(images[i : i + 32]) for i in range(0, len(images), 32)])


def check_answers(logits: Array) -> str:
    """Return a warning if a classifier was probably not made for these pictures, or an empty text.

    Args:
        logits: Its answers (N, C) to pictures without labels.
    """
    count, classes = logits.shape
    shares = np.bincount(logits.argmax(axis=1), minlength=classes) / count
    confidence = float(np.median(softmax(logits, axis=1).max(axis=1)))
    if count >= 20 and shares.max() >= ONE_ANSWER:
        return f"{shares.max():.0%} of {count} pictures get the same answer: {_FOREIGN}"
    if confidence < 1 / classes + 0.05 * (1 - 1 / classes):
        return f"the median confidence on {count} pictures is {confidence:.1%}, hardly more than guessing: {_FOREIGN}"
    return ""


_FOREIGN = "the classifier was not made for such pictures, or the preprocessing is wrong"
