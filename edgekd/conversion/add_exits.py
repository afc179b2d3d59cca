"""Early exits for a trained classifier: cut points, features, heads, placement, and the student.onnx with them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx

from edgekd.artifacts import onnx_checks
from edgekd.artifacts.metadata import ModelMetadata, put_metadata
from edgekd.artifacts.training_images import Seen, TrainingImages
from edgekd.conversion.attach import attach
from edgekd.conversion.cut_points import CutPoint, candidates, find_cut_points
from edgekd.conversion.features import features, opened_graph
from edgekd.conversion.heads import Head, Lesson, train_heads
from edgekd.conversion.placement import (
    LIMIT,
    MAX_EXITS,
    Placement,
    Times,
    answered,
    cross_validate,
    measure_times,
    place_exits,
)
from edgekd.conversion.plausibility import check_answers
from edgekd.conversion.source import TrainedClassifier
from edgekd.data.images import load_batch
from edgekd.data.splitting import divide
from edgekd.errors import ConfigError, DataError, GateError, nearest
from edgekd.files import NETWORK, atomic_write, refuse_other
from edgekd.host import default_threads
from edgekd.policy import Policy
from edgekd.progress import Span
from edgekd.runtime.engine import Engine, reference_engine
from edgekd.types import Array, Labels, Progress

log = logging.getLogger(__name__)

HELD_OUT = 0.25
"""Share of the pictures that heads do not learn from: they choose kinds, weight decays and places."""
LEAST_PICTURES = 200
"""Fewest pictures for heads. With fewer, the held-out ones cannot tell a few changed answers from none."""
VIEWS = 3
"""Views of each picture by default."""
COMPARED = 32
"""Pictures on which the student's final answers are compared with the network's."""


class Learned(Seen, Protocol):
    """A picture: an `Item` of a split or a `Picture`."""

    @property
    def path(self) -> str: ...


@dataclass(frozen=True)
class Candidate:
    """One row of the table of candidates.

    Attributes:
        cut: The cut point.
        head: Its head.
        before_ms: Milliseconds up to it, for one image on this machine.
        exit_ms: Milliseconds that an exit there adds.
        answered: Share of the held-out pictures that the head alone can answer with at most `placement.LIMIT` changed.
        agreement: Share of the held-out pictures that it answers as the network does.
        chosen: True if it became an exit.
    """

    cut: CutPoint
    head: Head
    before_ms: float
    exit_ms: float
    answered: float
    agreement: float
    chosen: bool


@dataclass(frozen=True)
class ExitsReport:
    """The candidates and the chosen exits.

    Attributes:
        candidates: All candidates, in order.
        placement: The chosen exits.
        checked: What they do to held-out pictures that did not choose their thresholds.
        network_ms: Milliseconds of the whole network, for one image.
        difference: Largest difference of the student's final logits from the network's; 0 if they agree to the bit.
        staged_difference: The same where the student runs in stages: ONNX Runtime fuses less across their ends.
        learned: Pictures that heads learned from.
        held_out: Pictures that heads and places were chosen by.
    """

    candidates: tuple[Candidate, ...]
    placement: Placement
    checked: Placement
    network_ms: float
    difference: float
    staged_difference: float
    learned: int
    held_out: int


def add_exits(
    classifier: TrainedClassifier,
    pictures: Sequence[Learned],
    *,
    data: Path,
    out: Path,
    group: str = "none",
    labels: Labels | None = None,
    training_images: TrainingImages | None = None,
    exits: str = "auto",
    views: int = VIEWS,
    cache: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ExitsReport:
    """Write a student.onnx with early exits on a frozen classifier, whose final answers stay what they were.

    Heads learn the network's own answers from most of the pictures; the rest chooses between heads and places. Features
    are computed once; they lie beside `out` meanwhile, or in `cache`.

    Args:
        classifier: The classifier.
        pictures: Pictures to learn from, with groups and hashes. None of them may certify anything later.
        data: Their folder.
        out: The file to write.
        group: The rule that named the groups.
        labels: Labels of the pictures, if known; heads then learn from them, too.
        training_images: What the metadata name as seen, if more than these pictures.
        exits: `auto`, a number of early exits, or names of tensors to exit at, separated by commas.
        views: Views of each picture: itself, and random crops and flips.
        cache: Folder that keeps the features.
        seed: Seed of the division, the views and the heads.
        progress: Called with the percentage done and 100.

    Raises:
        ArtifactError: `out` exists and is another kind of file.
        ConfigError: No cut point; `exits` names no candidate; no exit saves time.
        DataError: Too few pictures; the network has the same answer to all of them.
        GateError: The student's final answers differ from the network's. Nothing is written.
    """
    refuse_other(out, NETWORK)
    found = find_cut_points(classifier.model)
    cuts = _named(found, exits) or candidates(found)
    require_enough(len(pictures))
    span = Span(progress)
    lesson_rows = _divided(pictures, seed)
    with features(
        classifier.model,
        cuts,
        [(data / picture.path, picture.digest) for picture in pictures],
        classifier.preprocess,
        folder=out.parent,
        cache=cache,
        views=views,
        seed=seed,
        progress=span.part(0.7),
    ) as computed:
        lesson = Lesson(*lesson_rows, computed.logits, labels)
        answers = computed.logits[:, 0].argmax(axis=1)
        if len(np.unique(answers)) == 1:
            raise DataError(
                f"the network has the same answer to all {len(pictures)} pictures: "
                f"{classifier.classes[int(answers[0])]}",
                fix="check the preprocessing, and that these are pictures of the kind that it was trained on",
            )
        if warning := check_answers(np.asarray(computed.logits[:, 0])):
            log.warning("%s", warning)
        heads = train_heads(computed.pooled, lesson, seed=seed, progress=span.part(0.25))
    held_out = answers[lesson.held_out]
    times = measure_times(classifier.model, cuts, heads)
    placement = _placed(exits, times, heads, held_out)
    half = _half([pictures[row] for row in lesson.held_out], seed)
    checked = _checked(placement, times, heads, held_out, half)
    model, metadata, differences = _student(classifier, found, cuts, heads, placement, pictures, data)
    report = ExitsReport(
        _table(cuts, heads, times, placement, held_out),
        placement,
        checked,
        times.network,
        *differences,
        len(lesson.learned),
        len(lesson.held_out),
    )
    seen = training_images or TrainingImages.of(pictures, group)
    provenance = _provenance(classifier, report, views, seed)
    put_metadata(model, replace(metadata, training_images=seen, provenance=provenance))
    written = model.SerializeToString()
    onnx_checks.parse(written)
    atomic_write(out, written)
    span.fraction(1)
    return report


def require_enough(count: int, *, given: int | None = None) -> None:
    """Check that there are enough pictures for heads.

    Args:
        count: Pictures for heads.
        given: All pictures, if more.

    Raises:
        DataError: There are too few.
    """
    if count < LEAST_PICTURES:
        share = "" if given in (None, count) else f" ({count} of them for the exit heads)"
        raise DataError(
            f"{given or count} pictures{share} are too few to train exit heads: at least {LEAST_PICTURES} are needed",
            fix="give more pictures, or a larger --heads-share of them" if share else "give more pictures",
        )


def _half(pictures: Sequence[Learned], seed: int) -> npt.NDArray[np.bool_]:
    """Return the mask of one half of the held-out pictures: of the groups, or of a single group's pictures."""
    if len({picture.group or picture.path for picture in pictures}) == 1:
        return np.random.default_rng(seed).permutation(len(pictures)) < len(pictures) // 2
    paths = {picture.path for picture in divide(pictures, 0.5, seed)[0]}
    return np.array([picture.path in paths for picture in pictures])


def _checked(
    placement: Placement, times: Times, heads: Sequence[Head], answers: Labels, half: npt.NDArray[np.bool_]
) -> Placement:
    rows = list(placement.chosen)
    own = Times(times.before[rows], times.exits[rows], times.network)
    return cross_validate(own, [heads[row].logits for row in rows], answers, half)


def _divided(pictures: Sequence[Learned], seed: int) -> tuple[Labels, Labels]:
    """Return the rows of the pictures to learn from and of those held out, by group."""
    rows = {picture.path: row for row, picture in enumerate(pictures)}
    held_out, learned = divide(pictures, HELD_OUT, seed)
    return tuple(np.array([rows[p.path] for p in part], np.int64) for part in (learned, held_out))  # type: ignore[return-value]


def _named(found: Sequence[CutPoint], exits: str) -> tuple[CutPoint, ...]:
    """Return the cut points that are named, none if `exits` is `auto` or a number.

    Raises:
        ConfigError: There is no such cut point.
    """
    if exits == "auto" or exits.isdecimal():
        places = len(candidates(found))
        if exits.isdecimal() and not 1 <= int(exits) <= places:
            raise ConfigError(
                f"--exits {exits}: the network has {places} places for early exits",
                fix=f"give a number from 1 to {places}, auto, or names of tensors",
            )
        return ()
    known = {cut.name: cut for cut in found}
    names = exits.split(",")
    if unknown := [name for name in names if name not in known]:
        what = "is no tensor" if len(unknown) == 1 else "are no tensors"
        raise ConfigError(
            f"--exits: {', '.join(map(repr, unknown))} {what} to exit at",
            fix=nearest(unknown[0], (cut.name for cut in candidates(found))),
        )
    return tuple(cut for name, cut in known.items() if name in names)


def _placed(exits: str, times: Times, heads: Sequence[Head], answers: Labels) -> Placement:
    logits = [head.logits for head in heads]
    count = None if exits == "auto" else int(exits) if exits.isdecimal() else len(heads)
    placement = place_exits(times, logits, answers, count=count)
    if not placement.chosen:
        best = max(answered(one, answers) for one in logits)
        raise ConfigError(
            f"no early exit saves time: the best of {len(heads)} heads can answer {best:.0%} of the held-out pictures "
            f"with at most {LIMIT:.1%} changed",
            fix=f"give more pictures, or choose the number of exits: --exits 1 to {min(MAX_EXITS, len(heads))}",
        )
    return placement


def _student(
    classifier: TrainedClassifier,
    found: Sequence[CutPoint],
    cuts: Sequence[CutPoint],
    heads: Sequence[Head],
    placement: Placement,
    pictures: Sequence[Learned],
    data: Path,
) -> tuple[onnx.ModelProto, ModelMetadata, tuple[float, float]]:
    """Build the student, and compare its final answers with the network's on pictures; see `_differences`."""
    chosen = placement.chosen
    model, exits = attach(classifier.model, [cuts[k] for k in chosen], [heads[k] for k in chosen], found[-1])
    policy = Policy((1.0,) * len(exits))
    metadata = ModelMetadata(classifier.name, classifier.classes, classifier.preprocess, exits, policy)
    some = pictures[:: max(len(pictures) // COMPARED, 1)][:COMPARED]
    images = load_batch([data / picture.path for picture in some], classifier.preprocess)
    engine = reference_engine(model, metadata, threads=default_threads())
    return model, metadata, _differences(classifier.model, engine, images)


def _differences(network: onnx.ModelProto, student: Engine, images: Array) -> tuple[float, float]:
    """Return the largest difference of a student's final logits from the network's: in one piece, and in stages.

    Raises:
        GateError: An answer differs.
    """
    expected = opened_graph(network)(images)[0]
    alone, whole, staged = student.final(images)[-1], student.logits(images)[-1], student.staged_logits(images)[-1]
    if any((logits.argmax(axis=1) != expected.argmax(axis=1)).any() for logits in (alone, whole, staged)):
        raise GateError("the student's final answers differ from the network's", fix="please report this network")
    apart = [float(np.abs(np.subtract(logits, expected)).max()) for logits in (alone, whole, staged)]
    return max(apart[:2]), apart[2]


def _table(
    cuts: Sequence[CutPoint], heads: Sequence[Head], times: Times, placement: Placement, answers: Labels
) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(
            cut,
            head,
            float(times.before[k]),
            float(times.exits[k]),
            answered(head.logits, answers),
            float((head.logits.argmax(axis=1) == answers).mean()),
            k in placement.chosen,
        )
        for k, (cut, head) in enumerate(zip(cuts, heads))
    )


def _provenance(classifier: TrainedClassifier, report: ExitsReport, views: int, seed: int) -> dict[str, object]:
    exits = [
        {
            "tensors": list(one.cut.tensors),
            "head": one.head.kind,
            "decay": one.head.decay,
            "macs": round(one.cut.share, 4),
            "before_ms": round(one.before_ms, 4),
            "exit_ms": round(one.exit_ms, 4),
            "answered": round(one.answered, 4),
            "agreement": round(one.agreement, 4),
        }
        for one in report.candidates
        if one.chosen
    ]
    pictures = {"learned": report.learned, "held_out": report.held_out, "views": views, "seed": seed}
    own = {"exits": exits, "pictures": pictures, "network_ms": round(report.network_ms, 4)}
    return {**classifier.provenance, "added_exits": own, "final_difference": report.difference}
