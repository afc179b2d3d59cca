"""Tuning of an engine together with its exits: those that do not pay on this machine are cut out, down to none.

What an exit brings is first estimated from recorded logits and measured times of the stages; an engine is then built,
its stages are timed, and it is measured against the plain network, until the exits that are left pay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from edgekd.compiler.gain import TOLERANCE, Gain, measure_gain
from edgekd.compiler.pruning import replace_engine, write_pruned
from edgekd.compiler.whole_graphs import add_final
from edgekd.errors import ArtifactError, BackendError, ConfigError, EdgekdError, GateError
from edgekd.files import temporary_folder
from edgekd.policy import Policy, simulate
from edgekd.progress import Span
from edgekd.runtime import tuning
from edgekd.runtime.engine import Engine, built_engine, open_engine
from edgekd.runtime.tuning import AUTO, stage_ms
from edgekd.types import Array, Labels, Progress

LEAST_GAIN = 0.01
"""Fraction of the plain network's time that an exit must save to be kept."""


class Tuned(Protocol):
    """The result of a search for exit thresholds."""

    @property
    def policy(self) -> Policy: ...


T = TypeVar("T", bound=Tuned)
Search: TypeAlias = Callable[[Array, tuple[float, ...]], T]
"""Finds a policy for logits (E, N, C) of the images to tune on and the milliseconds of the stages at batch size 1. It
is called again for some of the exits, whose answers count as changed against the same reference as at first, and raises
a ConfigError if they cannot meet the goal."""


@dataclass(frozen=True)
class Selection(Generic[T]):
    """The tuned engine.

    Attributes:
        engine: The engine, opened, as its folder holds it now.
        logits: Its logits (E, N, C) for the images.
        tuned: Result of the search on it.
        gain: What its exits bring; None if it has none or that was not measured.
        messages: What was cut out and why, a line for each exit, and what the exits that are left bring.
    """

    engine: Engine
    logits: Array
    tuned: T
    gain: Gain | None
    messages: tuple[str, ...]


def tune_exits(
    folder: Path,
    search: Search[T],
    images: Array,
    *,
    threads: int | None = None,
    keep_exits: bool = False,
    progress: Progress | None = None,
) -> Selection[T]:
    """Tune an engine, and cut out the exits that do not pay.

    The folder is replaced once, at the end and only if exits were cut out, or if the policy never exits early and the
    graph that it then runs was not built yet. The policy found is not written into it.

    Args:
        folder: The engine folder.
        search: See `Search`.
        images: Preprocessed images (N, 3, H, W) to tune on.
        threads: CPU threads of the engine.
        keep_exits: Cut out none, and measure nothing.
        progress: Called with the percentage done and 100.

    Raises:
        ConfigError: The whole engine cannot meet the goal.
        ArtifactError: See `open_engine`; or the engine was rewritten in the meantime.
    """
    span, messages = Span(progress), list[str]()
    first = engine = open_engine(folder, threads=threads)
    logits, path = engine.logits(images, progress=span.part(0.3)), folder
    tuned = search(logits, stage_ms(engine, images[:1]))
    names, gain = list(engine.metadata.outputs), None
    with temporary_folder("pruned") as temporary:
        while len(names) > 1 and not (keep_exits or tuned.policy.is_last_exit):
            try:
                gain = measure_gain(engine, path, tuned.policy, images)
            except (ArtifactError, BackendError) as error:
                messages.append(f"it is unknown whether the exits pay: {error.what} ({error.fix})")
                break
            times = _times(engine, images)
            choose = worthwhile_exits if gain.is_clear else used_exits
            keep = choose(times, logits, tuned.policy, gain)
            if len(keep) == len(names):
                if not gain.is_clear:
                    messages.append("the machine is too busy to tell whether the exits pay: tune again when it is idle")
                break
            out = temporary / str(len(keep))
            try:
                search(logits[list(keep)], Times(times, gain).merged(keep)[1])
                manifest = write_pruned(engine, path, keep, out, images=images, span=span.part(0.2))
                pruned = built_engine(out, manifest, threads=engine.threads)
                found = pruned.logits(images, progress=span.part(0.1))
                retuned = search(found, stage_ms(pruned, images[:1]))
            except (ConfigError, GateError, BackendError, ArtifactError) as error:
                messages.append(_kept_message(names, keep, gain, error))
                break
            messages += _reasons(names, keep, times, logits, tuned.policy, gain)
            if engine is not first:
                engine.close()
            engine, path, logits, tuned = pruned, out, found, retuned
            names, gain = [names[k] for k in keep], None
        if path != folder:
            messages.append("compile again to have the exits back that were cut out, for example for another goal")
            replace_engine(folder, path, digest=first.digest)
            engine.close()
            first.close()
            engine = open_engine(folder, threads=threads)
    if tuned.policy.is_last_exit:
        engine = add_final(engine, folder)
    span.fraction(1)
    if gain:
        messages.append(f"the cascade beside the plain network: {gain}")
    elif len(names) > 1 and tuned.policy.is_last_exit:
        messages.append("no early exit keeps the goal: the engine answers as the plain network, which it then runs")
    elif len(names) == 1:
        messages.append("the engine is the plain network, without early exit")
    return Selection(engine, logits, tuned, gain, tuple(messages))


def tune_engine(
    folder: Path,
    images: Array,
    labels: Labels,
    *,
    max_accuracy_drop: float | None = None,
    latency_ms: float | None = None,
    confidence: str = AUTO,
    average: str = AUTO,
    threads: int | None = None,
    keep_exits: bool = False,
    progress: Progress | None = None,
) -> Selection[tuning.Tuned]:
    """Tune an engine for one of the goals of `edgekd.runtime.tuning.tune`, and cut out the exits that do not pay.

    An accuracy is compared with that of all exits, and within a latency it must not fall.

    Args:
        folder: The engine folder.
        images: Validation images (N, 3, H, W), preprocessed.
        labels: Their class indices (N,).
        max_accuracy_drop: See `edgekd.runtime.tuning.tune`.
        latency_ms: See there.
        confidence: See there.
        average: See there.
        threads: See `tune_exits`.
        keep_exits: See `tune_exits`.
        progress: See `tune_exits`.

    Raises:
        ConfigError: Not exactly one goal, no setting meets it, or an unknown measure or average.
    """
    tuning.check_goal(max_accuracy_drop, latency_ms)
    first: list[tuning.Tuned] = []
    reference: list[npt.NDArray[np.bool_]] = []

    def search(logits: Array, stages: tuple[float, ...]) -> tuning.Tuned:
        reference.append(tuning.right_without_early_exit(logits, labels))
        found = tuning.choose(
            logits,
            labels,
            stages,
            confidence=confidence,
            average=average,
            reference=reference[0],
            max_accuracy_drop=max_accuracy_drop,
            latency_ms=latency_ms,
        )
        first.append(found)
        if latency_ms is not None and found.accuracy < first[0].accuracy:
            what = f"{found.accuracy:.2%} of the validation images are right instead of {first[0].accuracy:.2%}"
            raise ConfigError(what, fix="give --max-accuracy-drop instead to trade accuracy for time")
        return found

    return tune_exits(folder, search, images, threads=threads, keep_exits=keep_exits, progress=progress)


class Times:
    """Times of the stages of an engine, and of the stages that result if exits are cut out of it.

    The stages together take longer than the plain network: by the exits' heads, and by what each further graph costs.
    All early exits are taken to have the same part in that.

    Args:
        stages: Batch size to the milliseconds of each stage.
        gain: Measured times of the plain network.
    """

    def __init__(self, stages: dict[int, tuple[float, ...]], gain: Gain) -> None:
        self._stages = stages
        self._plain = {size: ratio.plain_ms for size, ratio in gain.by_size.items()}
        largest = max(stages)
        # of batches that are larger than what was timed, only as much is run at a time
        extra = {s: 1 - ms * min(1, largest / s) / sum(self._at(s, stages)) for s, ms in self._plain.items()}
        sizes = sorted(extra)
        early = max(len(stages[largest]) - 1, 1)
        self._exit_part = {
            size: float(np.interp(np.log(size), np.log(sizes), [extra[s] for s in sizes]).clip(0, 0.9)) / early
            for size in stages
        }

    def merged(self, keep: Sequence[int]) -> dict[int, tuple[float, ...]]:
        """Return the estimated times of the stages with the exits `keep` alone."""
        merged = {}
        for size, times in self._stages.items():
            exit_ms, ends = self._exit_part[size] * sum(times), np.cumsum(times)[list(keep)]
            removed = np.array(keep) - np.arange(len(keep))  # up to each exit that is kept
            merged[size] = tuple(np.maximum(np.diff(ends - exit_ms * removed, prepend=0.0), 0.0).tolist())
        return merged

    def expected_ms(self, logits: Array, policy: Policy, keep: Sequence[int], *, size: int) -> float:
        """Estimate the mean milliseconds of a batch of the exits `keep` alone.

        Args:
            logits: Logits (E, N, C) of all exits.
            policy: Policy of all exits, of which that of the exits `keep` is used.
            keep: The exits.
            size: Batch size.
        """
        stages = self.merged(keep)
        exits = simulate(logits[list(keep)], policy.of_exits(keep)).exits
        reached = [float(np.mean(exits >= k)) for k in range(len(keep))]
        at_once = min(size, max(stages))
        times = [self._at(at_once * share, stages)[k] for k, share in enumerate(reached)]
        return float(sum(times)) * size / at_once

    def _at(self, images: float, stages: dict[int, tuple[float, ...]]) -> npt.NDArray[np.float64]:
        """Return the time of each stage for a number of images, which may be a fraction: the mean over many batches."""
        sizes = sorted(stages)
        times = np.array([stages[size] for size in sizes])  # (sizes, stages)
        inside = np.clip(images, sizes[0], sizes[-1])
        return np.array([np.interp(inside, sizes, of_stage) for of_stage in times.T]) * min(1.0, images / sizes[0])


def worthwhile_exits(
    stages: dict[int, tuple[float, ...]], logits: Array, policy: Policy, gain: Gain
) -> tuple[int, ...]:
    """Choose the exits to keep, the last one among them.

    Exits are removed one by one, always the one without which images are expected to take least time. Of the sets of
    exits that result, the smallest is chosen that is as good as the best within `LEAST_GAIN` for each exit. Estimates
    are corrected by what the engine as it is was measured to take.

    Args:
        stages: Batch size to the milliseconds of each stage.
        logits: Logits (E, N, C) of all exits.
        policy: The policy, with thresholds.
        gain: Measurement of the engine as it is. Unless it pays, fewer exits are chosen.
    """
    times, every = Times(stages, gain), tuple(range(len(logits)))
    expected = {size: times.expected_ms(logits, policy, every, size=size) for size in gain.by_size}

    def ratio(keep: tuple[int, ...]) -> float:
        """Return the time beside the plain network's at batch size 1, or at another size where that is too slow."""
        if len(keep) == 1:
            return 1.0
        ratios = {
            size: of.ratio * times.expected_ms(logits, policy, keep, size=size) / expected[size]
            for size, of in gain.by_size.items()
        }
        return max(r for size, r in ratios.items() if size == 1 or r > 1 + TOLERANCE)

    sets = [every]
    while len(sets[-1]) > 1:
        last = sets[-1]
        sets.append(min((tuple(k for k in last if k != removed) for removed in last[:-1]), key=ratio))
    if not gain.pays:
        sets = sets[1:]
    return min(sets, key=lambda keep: ratio(keep) + LEAST_GAIN * len(keep))


def used_exits(stages: dict[int, tuple[float, ...]], logits: Array, policy: Policy, gain: Gain) -> tuple[int, ...]:
    """Choose the exits that images take, and the last one: for want of a clear measurement; see `worthwhile_exits`."""
    taken = set(simulate(logits, policy).exits.tolist())
    return tuple(k for k in range(len(logits)) if k in taken or k == len(logits) - 1)


def _times(engine: Engine, images: Array) -> dict[int, tuple[float, ...]]:
    """Return the times of the stages by batch size, from the manifest or else measured now."""
    known = engine.manifest.stage_ms if engine.manifest else {}
    return {int(size): times for size, times in known.items()} or {1: stage_ms(engine, images[:1])}


def _reasons(
    names: Sequence[str],
    keep: Sequence[int],
    stages: dict[int, tuple[float, ...]],
    logits: Array,
    policy: Policy,
    gain: Gain,
) -> list[str]:
    """Return a line for each exit that does not pay: how many images leave there, and what it costs."""
    exits, times, every = simulate(logits, policy).exits, Times(stages, gain), range(len(logits))
    before = times.expected_ms(logits, policy, every, size=1)
    lines = []
    for k in every:
        if k in keep:
            continue
        taken = int(np.count_nonzero(exits == k))
        line = f"{names[k]} does not pay and is cut out: {taken or 'none'} of {len(exits)} images leave there"
        after = times.expected_ms(logits, policy, [j for j in every if j != k], size=1)
        if after < before:
            line += f", and without it an image takes {after:.3f} instead of {before:.3f} ms (from the stages' times)"
        lines.append(line)
    return lines if gain.pays else [*lines, f"the cascade with these exits is no faster than the plain network: {gain}"]


def _kept_message(names: Sequence[str], keep: Sequence[int], gain: Gain, error: EdgekdError) -> str:
    lost = ", ".join(name for k, name in enumerate(names) if k not in keep)
    slow = "" if gain.pays else ", although the cascade is no faster than the plain network"
    return f"{lost} stays{slow}: without it, {error.what} ({error.fix})"
