"""What a freshly built engine has to show: logits near student.onnx's, accuracy, the precision asked for, times."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import AnyBackend
from edgekd.backends.runner import StagedRunner
from edgekd.compiler.mcnemar import Drop
from edgekd.errors import BackendError, GateError
from edgekd.policy import ensemble
from edgekd.runtime.engine import Engine
from edgekd.types import Array

Labels: TypeAlias = npt.NDArray[np.int64]
FP32_TOLERANCE = 1e-3
"""Largest difference of logits that an fp32 engine may have from ONNX Runtime FP32."""
ALPHA = 0.05
"""Chance of refusing an engine that loses just what is allowed, for all of its answers together."""
BATCH_SIZE_IMAGES = 64
"""Images, or as few more as fill the last batch, on which each batch size of an engine is checked."""
WARM_UP = 3
"""Rounds that are thrown away; the first compiles what is compiled on first use."""
TIMING_S = 0.4
"""How long one batch size is timed, all stages and the monolithic graph together."""


def check(
    engine: Engine, validation: tuple[Array, Labels] | None, float_logits: Array | None, *, recipe: Recipe
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parity and accuracy of an engine: the worse of its stages, its monolithic and its final graph.

    What is answered is judged, the ensemble's and the last exit's answers; exits, which leave on thresholds, are
    reported. validation: images (N, 3, H, W) and labels (N,). float_logits: (E, N, C), student.onnx's. Both or none.

    Raises:
        GateError: logits that are not finite, an fp32 engine that differs, or answers that surely lose too much.
    """
    if validation is None or float_logits is None:
        return {}, {}
    images, labels = validation
    ways = _ways(engine, images)
    parity = {
        "max_abs_logit_difference": np.max([_difference(way, float_logits) for way in ways], axis=0).tolist(),
        "staged_to_monolithic": float(np.abs(ways[0] - ways[1]).max()),
    }
    _check_parity(engine, parity["max_abs_logit_difference"], exact=recipe.precision == "fp32")
    accuracy = _accuracy(ways, float_logits, labels)
    _check_accuracy(engine, accuracy, recipe=recipe)
    if engine.largest_batch:
        parity["by_batch_size"] = _by_batch_size(engine, (images, labels), float_logits, recipe=recipe)
    return parity, accuracy


def _ways(engine: Engine, images: Array, *, batch_size: int = 32) -> list[Array]:
    """All exits' logits (E, N, C) by the stages, by the monolithic graph, and by the final graph for the last one."""
    staged, monolithic = (f(images, batch_size=batch_size) for f in (engine.staged_logits, engine.logits))
    final = [engine.final(images[i : i + batch_size])[-1] for i in range(0, len(images), batch_size)]
    return [staged, monolithic, np.concatenate([staged[:-1], np.concatenate(final, dtype=np.float32)[None]])]


def _accuracy(ways: list[Array], float_logits: Array, labels: Labels) -> dict[str, Any]:
    return {
        "validation_images": len(labels),
        "float": _accuracies(float_logits, labels),
        "engine": np.min([_accuracies(way, labels) for way in ways], axis=0).tolist(),
        "answers": {n: _judged(n, ways, float_logits, labels) for n in ("ensemble", "final")[-len(float_logits) :]},
    }


def _by_batch_size(
    engine: Engine, validation: tuple[Array, Labels], float_logits: Array, *, recipe: Recipe
) -> list[dict[str, Any]]:
    """Check every batch size of an engine that has kernels of its own for each, in turns from the largest down and up.

    So the largest runs again after all others. The answer: size and largest differences by exit, as they came.

    Raises:
        GateError: as `check` does, with the batch size.
    """
    (images, labels), found = validation, []
    falling = sorted(set(recipe.batch_sizes), reverse=True)
    for size in (*falling, *falling[-2::-1]):
        rows = np.arange(math.ceil(BATCH_SIZE_IMAGES / size) * size) % len(images)
        ways = _ways(engine, images[rows], batch_size=size)
        differences = np.max([_difference(way, float_logits[:, rows]) for way in ways], axis=0).tolist()
        found.append({"size": size, "max_abs_logit_difference": differences})
        once = rows[: len(images)]  # an image that comes twice is no second witness
        accuracy = _accuracy([way[:, : len(once)] for way in ways], float_logits[:, once], labels[once])
        try:
            _check_parity(engine, differences, exact=recipe.precision == "fp32")
            _check_accuracy(engine, accuracy, recipe=recipe)
        except GateError as error:
            raise GateError(f"in batches of {size}: {error.what}", fix=error.fix) from error
    return found


def _judged(name: str, ways: list[Array], float_logits: Array, labels: Labels) -> dict[str, Any]:
    """Accuracies of one answer, and on how many images it was lost and gained, on the way that loses most."""

    def right(logits: Array) -> npt.NDArray[np.bool_]:
        return np.asarray((ensemble(logits) if name == "ensemble" else logits[-1]).argmax(axis=1) == labels)

    before, after = right(float_logits), min((right(way) for way in ways), key=np.count_nonzero)
    counts = dataclasses.asdict(Drop.between(before, after))
    return {"float": float(before.mean()), "engine": float(after.mean()), **counts}


def _difference(logits: Array, reference: Array) -> Array:
    return np.asarray(np.abs(logits - reference).max(axis=(1, 2)))


def _check_parity(engine: Engine, differences: list[float], *, exact: bool) -> None:
    limit = FP32_TOLERANCE if exact else np.inf
    for name, difference in zip(engine.metadata.outputs, differences):
        if not (np.isfinite(difference) and difference <= limit):
            what = f"{engine.name}: {name} differs from student.onnx by {difference:.2e} (limit {limit:.0e})"
            raise GateError(what, fix="try another backend, and please report this network")


def _accuracies(logits: Array, labels: Labels) -> list[float]:
    return [float((exit_logits.argmax(axis=1) == labels).mean()) for exit_logits in logits]


def drops(accuracy: dict[str, Any]) -> dict[str, Drop]:
    """What the ensemble's and the last exit's answers lost."""
    return {name: Drop(*(a[k] for k in ("images", "lost", "gained"))) for name, a in accuracy["answers"].items()}


def worst_drop(accuracy: dict[str, Any]) -> Drop:
    """What the answers lost that lost more."""
    return max(drops(accuracy).values(), key=lambda drop: drop.points)


def verdict(accuracy: dict[str, Any], *, limit: float) -> str:
    """What the validation images tell of the drop, and what they cannot."""
    found = {name: (drop, *bounds(drop, accuracy)) for name, drop in drops(accuracy).items()}
    said = ", ".join(f"{n} {drop.points:+.2f} [{low:+.2f}, {high:+.2f}]" for n, (drop, low, high) in found.items())
    most = max(high for *_, high in found.values())
    doubt = f"; {accuracy['validation_images']} validation images cannot tell whether it is within {limit:g}"
    return f"accuracy drop (points) and its 95 % interval: {said}{doubt if most > limit else ''}"


def bounds(drop: Drop, accuracy: dict[str, Any]) -> tuple[float, float]:
    """Points between which the true drop of an answer lies; `ALPHA` is shared by the answers."""
    return drop.interval(ALPHA / len(accuracy["answers"]))


def _check_accuracy(engine: Engine, accuracy: dict[str, Any], *, recipe: Recipe) -> None:
    """Refuse what loses more than is allowed by an exact test; what chance may have done passes."""
    limit, found = recipe.max_accuracy_drop, drops(accuracy)
    over = {name for name, drop in found.items() if drop.p_value(limit) <= ALPHA / len(found)}
    if not over:
        return
    exits = zip(engine.metadata.outputs, accuracy["float"], accuracy["engine"])
    rows = [f"  {name:<8} {100 * a:7.2f} {100 * b:7.2f} {100 * (a - b):+7.2f}" for name, a, b in exits]
    for name, a in accuracy["answers"].items():
        low, high = bounds(found[name], accuracy)
        rows.append(
            f"  {name:<8} {100 * a['float']:7.2f} {100 * a['engine']:7.2f} {found[name].points:+7.2f} {limit:7.2f}"
            f"  {low:+.2f} to {high:+.2f}; {a['lost']} images lost, {a['gained']} gained{'  <' if name in over else ''}"
        )
    head = f"  {'answer':<8} {'float':>7} {'engine':>7} {'drop':>7} {'limit':>7}  true drop"
    what = f"{engine.name} loses too much accuracy on {accuracy['validation_images']} validation images (%, points):"
    allowed = math.ceil(10 * worst_drop(accuracy).points) / 10
    raise GateError(
        "\n".join([what, head, *rows]),
        fix=f"use another --recipe, {_more_images(engine, recipe)}or allow more (--set max_accuracy_drop={allowed:g})",
    )


def _more_images(engine: Engine, recipe: Recipe) -> str:
    used = engine.manifest.calibration.get("images", 0) if engine.manifest else 0
    if used < recipe.calibration_images:  # all that the training split has
        return ""
    return f"calibrate on more images if the training split has more than {used} (--set calibration_images=…), "


def read_back(folder: Path, backend: AnyBackend, *, recipe: Recipe) -> dict[str, float]:
    """What runs, by the backend's own account: precision to share of layers.

    Raises:
        BackendError: not what the recipe asked for.
    """
    precision = backend.precisions(folder / f"monolithic{backend.suffix}", recipe=recipe)
    # int8 leaves linear layers and perhaps the heads in float; fp16 leaves to float32 what is faster so.
    least = {"fp32": 0.9, "fp16": 0.5, "int8": 0.2}[recipe.precision]
    names = ("fp16", "bf16") if recipe.precision == "fp16" else (recipe.precision,)
    share = sum(precision.get(name, 0.0) for name in names)
    if share < least or (recipe.uses_fp16 and precision.get("fp32", 0.0) > 0.5):
        ran = ", ".join(f"{part:.0%} {name}" for name, part in precision.items())
        what = f"{backend.name} was asked for {backend.recipe_name(recipe)} and runs {ran}"
        raise BackendError(what, fix="use another --recipe or --backend")
    return precision


def stage_times(
    engine: Engine, images: Array | None, *, sizes: tuple[int, ...]
) -> tuple[dict[str, tuple[float, ...]], float]:
    """Median milliseconds of each stage by batch size (as text), and of the monolithic graph for one image."""
    if images is None:
        side = engine.metadata.preprocess.image_size
        images = np.zeros((1, 3, side, side), np.float32)
    times = {size: _round_times(engine, images[np.arange(size) % len(images)]) for size in sizes}
    return {str(size): tuple(ms[:-1]) for size, ms in times.items()}, times[1][-1]


def _round_times(engine: Engine, batch: Array) -> list[float]:
    """Median milliseconds of every stage and of the monolithic graph, taken in turns."""
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
    engine.monolithic(batch)
    clock.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(clock)]
