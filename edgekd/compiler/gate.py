"""The gate that a built engine must pass: logits near student.onnx's, accuracy, the requested precision; and timing."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekd.artifacts.manifest import Accuracy, BatchParity, Parity, PredictionAccuracy
from edgekd.artifacts.metadata import ModelMetadata
from edgekd.artifacts.partition import graph_names
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import AnyBackend
from edgekd.backends.runner import StagedRunner
from edgekd.compiler.mcnemar import Drop
from edgekd.errors import BackendError, GateError
from edgekd.policy import ensemble
from edgekd.runtime.engine import Engine
from edgekd.types import Array, Labels

FP32_TOLERANCE = 1e-3
"""Largest difference of logits that an fp32 engine may have from ONNX Runtime FP32."""
ALPHA = 0.05
"""Probability of refusing an engine that loses exactly the allowed accuracy, over all of its predictions together."""
BATCH_SIZE_IMAGES = 64
"""Images, or as few more as fill the last batch, on which each batch size of an engine is checked."""
LEAST_INT8 = 0.2
"""Fraction of an int8 engine's layers that run in int8, at least: linear layers, heads and blocks may be float."""
WARM_UP = 3
"""Rounds that are discarded; the first compiles what is compiled on first use."""
TIMING_S = 0.4
"""Seconds for which one batch size is timed, all stages and the monolithic graph together."""


@dataclass(frozen=True)
class Validation:
    """The validation split.

    Attributes:
        images: Preprocessed images (N, 3, H, W).
        labels: Labels (N,).
        reference: Logits (E, N, C) of student.onnx on the images.
    """

    images: Array
    labels: Labels
    reference: Array


@dataclass(frozen=True)
class GateReport:
    """Parity and accuracy of an engine; None where there are no validation images.

    Attributes:
        refusal: Why the engine must not be used, if so.
    """

    parity: Parity | None = None
    accuracy: Accuracy | None = None
    refusal: GateError | None = None

    @property
    def drop(self) -> float:
        """Percentage points of accuracy that the worse of the predictions lost; 0 if unchecked."""
        return worst_drop(self.accuracy).points if self.accuracy else 0.0


def check(engine: Engine, validation: Validation | None, *, recipe: Recipe) -> GateReport:
    """Compare an engine's stages, and its monolithic and final graphs if any, with student.onnx; judge the worst.

    The engine is refused for logits that are not finite, for an fp32 engine whose logits differ by more than
    `FP32_TOLERANCE`, or if an exact test finds that the predictions of the ensemble or of the last exit lose more
    accuracy than the recipe allows. The other exits, which classify above a threshold only, are reported. Backends with
    fixed batch sizes are checked in every one of them.

    Args:
        engine: The engine.
        validation: Validation split; without it, the report is empty.
        recipe: The recipe, which contains the allowed drop.
    """
    if validation is None:
        return GateReport()
    paths = logits_of_paths(engine, validation.images)
    between = float(np.abs(paths[0] - paths[1]).max()) if engine.has("monolithic") else None
    parity = Parity(_differences(paths, validation.reference), between)
    accuracy = _accuracy(paths, validation.reference, validation.labels)
    refusal = _parity_refusal(engine, parity.max_abs_logit_difference, recipe=recipe) or _accuracy_refusal(
        engine, accuracy, recipe=recipe
    )
    if refusal is None and engine.largest_batch:
        by_size, refusal = _check_batch_sizes(engine, validation, recipe=recipe)
        parity = replace(parity, by_batch_size=by_size)
    return GateReport(parity, accuracy, refusal)


def logits_of_paths(engine: Engine, images: Array, *, batch_size: int = 32) -> list[Array]:
    """Return the logits (E, N, C) of the stages and, if built, of the monolithic graph and with `final`'s last exit."""
    staged = engine.staged_logits(images, batch_size=batch_size)
    paths = [staged]
    if engine.has("monolithic"):
        paths.append(engine.logits(images, batch_size=batch_size))
    if engine.has("final"):
        final = [engine.final(images[i : i + batch_size])[-1] for i in range(0, len(images), batch_size)]
        paths.append(np.concatenate([staged[:-1], np.concatenate(final, dtype=np.float32)[None]]))
    return paths


def _accuracy(paths: list[Array], reference: Array, labels: Labels) -> Accuracy:
    return Accuracy(
        validation_images=len(labels),
        reference=_accuracies(reference, labels),
        engine=tuple(np.min([_accuracies(path, labels) for path in paths], axis=0).tolist()),
        predictions={
            name: _prediction_accuracy(name, paths, reference, labels)
            for name in ("ensemble", "final")[-len(reference) :]
        },
    )


def _check_batch_sizes(
    engine: Engine, validation: Validation, *, recipe: Recipe
) -> tuple[tuple[BatchParity, ...], GateError | None]:
    """Check every batch size of an engine that has kernels of its own for each, from the largest down and up again.

    So the largest runs again after all others.

    Returns:
        The parity of each size, in this order, up to a refusal; and the refusal, if any.
    """
    images, labels, reference = validation.images, validation.labels, validation.reference
    parities: list[BatchParity] = []
    falling = sorted(set(recipe.batch_sizes), reverse=True)
    for size in (*falling, *falling[-2::-1]):
        rows = np.arange(math.ceil(BATCH_SIZE_IMAGES / size) * size) % len(images)
        paths = logits_of_paths(engine, images[rows], batch_size=size)
        differences = _differences(paths, reference[:, rows])
        parities.append(BatchParity(size, differences))
        once = rows[: len(images)]  # repeated images add no evidence
        accuracy = _accuracy([path[:, : len(once)] for path in paths], reference[:, once], labels[once])
        refusal = _parity_refusal(engine, differences, recipe=recipe) or _accuracy_refusal(
            engine, accuracy, recipe=recipe
        )
        if refusal:
            return tuple(parities), GateError(f"in batches of {size}: {refusal.what}", fix=refusal.fix)
    return tuple(parities), None


def _differences(paths: list[Array], reference: Array) -> tuple[float, ...]:
    """Return the largest difference from the reference, for each exit."""
    return tuple(np.max([np.abs(path - reference).max(axis=(1, 2)) for path in paths], axis=0).tolist())


def _accuracies(logits: Array, labels: Labels) -> tuple[float, ...]:
    return tuple(float((exit_logits.argmax(axis=1) == labels).mean()) for exit_logits in logits)


def _prediction_accuracy(name: str, paths: list[Array], reference: Array, labels: Labels) -> PredictionAccuracy:
    """Return the accuracy of one kind of prediction on the path that loses most."""

    def correct(logits: Array) -> npt.NDArray[np.bool_]:
        return np.asarray((ensemble(logits) if name == "ensemble" else logits[-1]).argmax(axis=1) == labels)

    before, after = correct(reference), min((correct(path) for path in paths), key=np.count_nonzero)
    drop = Drop.between(before, after)
    return PredictionAccuracy(float(before.mean()), float(after.mean()), drop.images, drop.lost, drop.gained)


def _parity_refusal(engine: Engine, differences: tuple[float, ...], *, recipe: Recipe) -> GateError | None:
    limit = FP32_TOLERANCE if recipe.precision == "fp32" else np.inf
    for name, difference in zip(engine.metadata.outputs, differences):
        if not (np.isfinite(difference) and difference <= limit):
            what = f"{engine.name}: {name} differs from student.onnx by {difference:.2e} (limit {limit:.0e})"
            return GateError(what, fix="try another backend, and please report this network")
    return None


def _accuracy_refusal(engine: Engine, accuracy: Accuracy, *, recipe: Recipe) -> GateError | None:
    """Refuse an engine if an exact test finds a loss above the limit; losses within random variation pass."""
    limit, found = recipe.max_accuracy_drop, drops(accuracy)
    over = {name for name, drop in found.items() if drop.p_value(limit) <= ALPHA / len(found)}
    if not over:
        return None
    exits = zip(engine.metadata.outputs, accuracy.reference, accuracy.engine)
    rows = [f"  {name:<10} {100 * a:7.2f} {100 * b:7.2f} {100 * (a - b):+7.2f}" for name, a, b in exits]
    for name, of in accuracy.predictions.items():
        low, high = bounds(found[name], accuracy)
        rows.append(
            f"  {name:<10} {100 * of.reference:7.2f} {100 * of.engine:7.2f} {found[name].points:+7.2f} {limit:7.2f}"
            f"  {low:+.2f} to {high:+.2f}; {of.lost} images lost, {of.gained} gained{'  <' if name in over else ''}"
        )
    head = f"  {'prediction':<10} {'float':>7} {'engine':>7} {'drop':>7} {'limit':>7}  true drop"
    what = f"{engine.name} loses too much accuracy on {accuracy.validation_images} validation images (%, points):"
    allowed = math.ceil(10 * worst_drop(accuracy).points) / 10
    return GateError(
        "\n".join([what, head, *rows]),
        fix=f"use another --recipe, {_more_images(engine, recipe)}or allow more (--set max_accuracy_drop={allowed:g})",
    )


def _more_images(engine: Engine, recipe: Recipe) -> str:
    calibration = engine.manifest.calibration if engine.manifest else None
    if calibration is None or calibration.images < recipe.calibration_images:  # all that the training split has
        return ""
    more = f"calibrate on more images if the training split has more than {calibration.images}"
    return f"{more} (--set calibration_images=…), "


def drops(accuracy: Accuracy) -> dict[str, Drop]:
    """Return the drop of each kind of prediction."""
    return {name: Drop(of.images, of.lost, of.gained) for name, of in accuracy.predictions.items()}


def worst_drop(accuracy: Accuracy) -> Drop:
    """Return the largest drop of the kinds of prediction."""
    return max(drops(accuracy).values(), key=lambda drop: drop.points)


def bounds(drop: Drop, accuracy: Accuracy) -> tuple[float, float]:
    """Return the confidence interval, in points, of the true drop; `ALPHA` is shared by the kinds of prediction."""
    return drop.interval(ALPHA / len(accuracy.predictions))


def verdict(accuracy: Accuracy, *, limit: float) -> str:
    """Describe each drop with its interval, and state if the images are too few to decide about `limit`."""
    found = {name: (drop, *bounds(drop, accuracy)) for name, drop in drops(accuracy).items()}
    parts = ", ".join(f"{n} {drop.points:+.2f} [{low:+.2f}, {high:+.2f}]" for n, (drop, low, high) in found.items())
    most = max(high for *_, high in found.values())
    doubt = f"; {accuracy.validation_images} validation images cannot tell whether it is within {limit:g}"
    return f"accuracy drop (points) and its 95 % interval: {parts}{doubt if most > limit else ''}"


def read_back(folder: Path, metadata: ModelMetadata, backend: AnyBackend, *, recipe: Recipe) -> dict[str, float]:
    """Read back the precisions that an engine's stages run in, as the backend reports them.

    Args:
        folder: Folder of the built files.
        metadata: Metadata of the network.
        backend: The backend that built them.
        recipe: The recipe.

    Returns:
        Precision to its fraction of the layers; empty if the backend tells nothing of them.

    Raises:
        BackendError: They differ from the recipe's.
    """
    layers = Counter[str]()
    for name in graph_names(metadata, whole=False):
        layers.update(backend.precisions(folder / f"{name}{backend.suffix}", recipe=recipe))
    if not layers:
        return {}
    precision = {name: count / layers.total() for name, count in layers.most_common()}
    # fp16 leaves layers in float32 that are faster there.
    least = {"fp32": 0.9, "fp16": 0.5, "int8": LEAST_INT8}[recipe.precision]
    names = ("fp16", "bf16") if recipe.precision == "fp16" else (recipe.precision,)
    share = sum(precision.get(name, 0.0) for name in names)
    if share < least or (recipe.uses_fp16 and precision.get("fp32", 0.0) > 0.5):
        ran = ", ".join(f"{part:.0%} {name}" for name, part in precision.items())
        what = f"{backend.name} runs {ran}; the recipe requests {backend.recipe_name(recipe)}"
        raise BackendError(what, fix="use another --recipe or --backend")
    return precision


def stage_times(
    engine: Engine, images: Array | None, *, sizes: tuple[int, ...]
) -> tuple[dict[str, tuple[float, ...]], float | None]:
    """Time the stages and, if it was built, the monolithic graph.

    Args:
        engine: The engine.
        images: Images (N, 3, H, W) to run; zeros if None.
        sizes: Batch sizes, 1 among them.

    Returns:
        Batch size (as text) to the median milliseconds of each stage, and the median milliseconds of the monolithic
        graph at batch size 1; None without one.
    """
    if images is None:
        side = engine.metadata.preprocess.image_size
        images = np.zeros((1, 3, side, side), np.float32)
    times = {size: _round_times(engine, images[np.arange(size) % len(images)]) for size in sizes}
    exits = len(engine.metadata.exits)
    monolithic_ms = times[1][exits] if engine.has("monolithic") else None
    return {str(size): tuple(ms[:exits]) for size, ms in times.items()}, monolithic_ms


def times_in_turns(engines: Sequence[Engine], images: Array | None) -> list[list[float]]:
    """Return the median milliseconds of every stage on one image, for engines that take turns.

    Args:
        engines: The engines, of networks with the same input.
        images: Images (N, 3, H, W), of which the first is run; zeros if None.
    """
    side = engines[0].metadata.preprocess.image_size
    image = np.zeros((1, 3, side, side), np.float32) if images is None else images[:1]
    runners = [engine.staged_runner() for engine in engines]
    rounds: list[list[list[float]]] = [[] for _ in engines]
    end = time.perf_counter() + TIMING_S * len(engines)
    while len(rounds[0]) < WARM_UP + 3 or time.perf_counter() < end:
        for engine, runner, found in zip(engines, runners, rounds):
            found.append(_one_round(engine, runner, image)[: len(engine.metadata.exits)])
    return [[1e3 * statistics.median(column) for column in zip(*found[WARM_UP:])] for found in rounds]


def _round_times(engine: Engine, batch: Array) -> list[float]:
    """Return the median milliseconds of every stage and of the monolithic graph, if built, timed in turns."""
    staged_runner = engine.staged_runner()
    for _ in range(WARM_UP):
        _one_round(engine, staged_runner, batch)
    rounds: list[list[float]] = []
    end = time.perf_counter() + TIMING_S
    while len(rounds) < 3 or time.perf_counter() < end:
        rounds.append(_one_round(engine, staged_runner, batch))
    return [1e3 * statistics.median(column) for column in zip(*rounds)]


def _one_round(engine: Engine, staged_runner: StagedRunner, batch: Array) -> list[float]:
    clock = [time.perf_counter()]
    with staged_runner(batch) as run:
        for _ in engine.metadata.exits:
            run.run_stage()
            clock.append(time.perf_counter())
    if engine.has("monolithic"):
        engine.monolithic(batch)
        clock.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(clock)]
