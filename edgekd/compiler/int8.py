"""Causes of the accuracy loss of an int8 network, and quantisations that lose less.

Everything here is chosen by the logits on calibration images: one half of them calibrates, the error is measured on the
other half. The validation images of the gate choose nothing; they judge the few networks that come of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import onnx

from edgekd.artifacts.metadata import StudentModel
from edgekd.backends.onnxruntime import open_graph
from edgekd.progress import Span
from edgekd.quantization import quantize
from edgekd.quantization.bias_correction import correct_biases
from edgekd.quantization.blocks import Block, blocks
from edgekd.quantization.calibration import CALIBRATORS
from edgekd.quantization.equalization import equalize
from edgekd.quantization.fold_batchnorm import fold_batchnorm
from edgekd.quantization.qdq import named
from edgekd.types import Array

CORRECTION_IMAGES = 32
"""Calibration images for bias correction, at most; it runs the network once for each convolution."""
ERROR_IMAGES = 128
"""Calibration images that errors are measured on, at most."""
WORTHWHILE = 0.95
"""A measure is kept if it lowers the error to this fraction or less."""


@dataclass(frozen=True)
class Target:
    """Needs of a backend for a Q/DQ graph; backends with the same needs share it.

    Attributes:
        name: See `Backend.quantization_target`.
        reduce_range: See `Backend.reduces_range`.
    """

    name: str
    reduce_range: bool


@dataclass(frozen=True)
class Quantization:
    """Settings of the quantisation of a network.

    Attributes:
        heads: The exit heads are quantised, too.
        method: How the ends of activation ranges are chosen.
        equalized: The ranges of channels are made more even first.
        corrected: Biases are corrected by the mean error of each convolution.
        floats: The blocks that stay float.
    """

    heads: bool
    method: str
    equalized: bool = False
    corrected: bool = False
    floats: tuple[Block, ...] = ()


@dataclass(frozen=True)
class Step:
    """A measure that was tried.

    Attributes:
        name: The measure.
        error: Error of the logits with it.
        kept: It is part of the result.
    """

    name: str
    error: float
    kept: bool = False

    def __str__(self) -> str:
        return f"{self.name} {_percent(self.error)}{' (kept)' if self.kept else ''}"


@dataclass(frozen=True)
class Improvement:
    """The quantisation that is nearest to the float network.

    Attributes:
        quantization: The quantisation.
        before: Error of the logits before.
        after: Error of the logits with it.
        steps: What was tried.
    """

    quantization: Quantization
    before: float
    after: float
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        tried = ", ".join(str(step) for step in self.steps)
        return f"angular error of the logits on calibration images {_percent(self.before)}; tried: {tried}"


class Int8Search:
    """The quantisations of one network.

    Args:
        student: The network.
        images: Calibration images (N, 3, H, W).
    """

    def __init__(self, student: StudentModel, images: Array) -> None:
        self._metadata = student.metadata
        self._images = images
        self._model = named(fold_batchnorm(student.model))
        few = len(images) < 2
        self._fit, held_out = (images, images) if few else (images[::2], images[1::2])
        self._held_out = _spread(held_out, ERROR_IMAGES)
        self._reference: Array | None = None
        self._equalized: onnx.ModelProto | None = None
        self._improved: dict[tuple[Target, Quantization], Improvement] = {}
        self._sensitive: dict[tuple[Target, Quantization], list[Block]] = {}

    def graph(self, target: Target, quantization: Quantization, span: Span) -> onnx.ModelProto:
        """Return the Q/DQ graph, calibrated on all images."""
        return self._graph(target, quantization, self._images, span)

    def improve(self, target: Target, start: Quantization, span: Span) -> Improvement:
        """Choose activation ranges, then whether to equalise channels and to correct biases, by the error.

        Args:
            target: The target.
            start: The quantisation that lost too much.
            span: Progress.
        """
        if (target, start) not in self._improved:
            self._improved[target, start] = self._improve(target, start, span)
        return self._improved[target, start]

    def sensitive_blocks(self, target: Target, start: Quantization, span: Span) -> list[Block]:
        """Return the blocks that lower the error if they alone are left in float, the most sensitive first.

        Args:
            target: The target.
            start: The quantisation to leave blocks out of.
            span: Progress.
        """
        if (target, start) not in self._sensitive:
            start_uncorrected = replace(start, corrected=False)  # correction takes long, and the order is what counts
            whole = self._error(target, start_uncorrected, span.part(0.05))
            candidates = [b for b in blocks(self._model, self._metadata) if start.heads or not self._is_head(b)]
            errors = [
                self._error(target, replace(start_uncorrected, floats=(block,)), span.part(0.95 / len(candidates)))
                for block in candidates
            ]
            order = np.argsort(errors, kind="stable")
            self._sensitive[target, start] = [candidates[i] for i in order if errors[i] < whole]
        return self._sensitive[target, start]

    def layers(self, heads: bool) -> tuple[int, int]:
        """Return the number of convolutions, of the heads only if these are quantised, and of all layers."""
        found = blocks(self._model, self._metadata)
        every = sum(node.op_type in ("Conv", "Gemm", "MatMul") for node in self._model.graph.node)
        return sum(block.convolutions for block in found if heads or not self._is_head(block)), every

    def _is_head(self, block: Block) -> bool:
        return bool(block.outputs.intersection(self._metadata.outputs)) and len(self._metadata.exits) > 1

    def _improve(self, target: Target, start: Quantization, span: Span) -> Improvement:
        before = self._error(target, start, span.part(0.1))
        steps, best, least = list[Step](), start, before

        def consider(tried: Iterable[tuple[str, Quantization]], share: float) -> None:
            nonlocal best, least
            tried = list(tried)
            errors = [self._error(target, how, span.part(share / len(tried))) for _, how in tried]
            first = len(steps)
            steps.extend(Step(name, error) for (name, _), error in zip(tried, errors))
            winner = int(np.argmin(errors))
            if errors[winner] <= WORTHWHILE * least:
                best, least = tried[winner][1], errors[winner]
                steps[first + winner] = replace(steps[first + winner], kept=True)

        others = [method for method in CALIBRATORS if method != start.method]
        consider(((f"{method} ranges", replace(start, method=method)) for method in others), 0.2)
        base = best
        consider(
            (
                (" and ".join(_measures(how)), how)
                for equalized, corrected in itertools.product((False, True), repeat=2)
                if (how := replace(base, equalized=equalized, corrected=corrected)) != base
            ),
            0.7,
        )
        return Improvement(best, before, least, tuple(steps))

    def _error(self, target: Target, quantization: Quantization, span: Span) -> float:
        """Return the mean of one minus the cosine of an image's centred logits with those of the float network.

        A common factor of the logits, which bias correction may bring along, changes no answer and counts for nothing:
        the squared error of a MobileNetV2 rose while 99 % of its answers were the float network's, not 96 %. Half of
        the calibration images calibrate, and this is the error on the others.
        """
        if self._reference is None:
            self._reference = _directions(self._model, self._held_out)
        found = _directions(self._graph(target, quantization, self._fit, span), self._held_out)
        return float(1 - (found * self._reference).sum(axis=2).mean())

    def _graph(self, target: Target, how: Quantization, images: Array, span: Span) -> onnx.ModelProto:
        model = self._model
        if how.equalized:
            self._equalized = self._equalized or equalize(model, self._images)
            model = self._equalized
        quantised = quantize(
            model,
            self._metadata,
            images,
            target=target.name,
            heads=how.heads,
            floats=frozenset[str]().union(*(block.outputs for block in how.floats)),
            reduce_range=target.reduce_range,
            method=how.method,
            progress=span.part(0.3 if how.corrected else 1),
        )
        if how.corrected:
            quantised = correct_biases(model, quantised, _spread(images, CORRECTION_IMAGES), progress=span.part(0.7))
        return quantised


def described(quantization: Quantization, start: Quantization) -> str:
    """Describe what differs from `start`; empty if nothing does."""
    parts = [f"{quantization.method} ranges"] if quantization.method != start.method else []
    parts += _measures(quantization)
    if quantization.floats:
        blocks_, count = len(quantization.floats), sum(block.convolutions for block in quantization.floats)
        parts.append(f"{blocks_} block{'s' * (blocks_ > 1)} ({count} convolution{'s' * (count > 1)}) in float")
    return ", ".join(parts)


def _measures(quantization: Quantization) -> list[str]:
    found = ("equalised channels", quantization.equalized), ("bias correction", quantization.corrected)
    return [name for name, applied in found if applied]


def _directions(model: onnx.ModelProto, images: Array) -> Array:
    """Run a network, and return the centred logits (E, N, C) of each image, divided by their length."""
    run = open_graph(model.SerializeToString(), threads=1)
    batches = [np.stack(run(images[i : i + 32])) for i in range(0, len(images), 32)]
    logits = np.concatenate(batches, axis=1, dtype=np.float32)
    centred: Array = logits - logits.mean(axis=2, keepdims=True, dtype=np.float32)
    lengths = np.linalg.norm(centred, axis=2, keepdims=True)
    directions: Array = centred / np.maximum(lengths, np.float32(1e-30))
    return directions


def _spread(images: Array, most: int) -> Array:
    """Return at most `most` images, evenly spread."""
    spread: Array = images[:: -(-len(images) // most)]
    return spread


def _percent(error: float) -> str:
    return f"{100 * error:.2g} %"
