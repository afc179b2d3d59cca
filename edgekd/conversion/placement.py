"""Placement of early exits: times of the stages on this machine, and the exits and thresholds that save most."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgekd.artifacts.partition import extract, with_shapes
from edgekd.conversion.attach import head_graph
from edgekd.conversion.cut_points import CutPoint
from edgekd.conversion.features import opened_graph
from edgekd.conversion.heads import Head
from edgekd.policy import softmax
from edgekd.types import Array, Labels

MAX_EXITS = 4
"""Most early exits that are chosen by themselves."""
LIMIT = 0.005
"""Share of the held-out pictures whose answer may change, when candidates are compared."""
TIMING_S = 3.0
"""Seconds for which all pieces are timed in turns."""
WARM_UP = 2
_PRICES = np.geomspace(1, 3e3, 40)
"""Prices of a changed answer that are tried, in times of the whole network."""


@dataclass(frozen=True)
class Times:
    """Least milliseconds for one image on this machine.

    Attributes:
        before: Time up to each candidate, (M,).
        exits: Time that an exit at each candidate adds: the cut and the head, (M,).
        network: Time of the whole network.
    """

    before: Array
    exits: Array
    network: float


@dataclass(frozen=True)
class Placement:
    """Chosen exits.

    Attributes:
        chosen: Indices of the candidates, in order.
        shares: Share of the held-out pictures that each chosen exit answers, and that the network's end does.
        changed: Share of the held-out pictures whose answer changes.
        time_ms: Mean time for one held-out picture.
        thresholds: Least confidence at which each chosen exit answers; infinite if it answers none.
    """

    chosen: tuple[int, ...]
    shares: tuple[float, ...]
    changed: float
    time_ms: float
    thresholds: tuple[float, ...] = ()


def measure_times(model: onnx.ModelProto, cuts: Sequence[CutPoint], heads: Sequence[Head]) -> Times:
    """Measure the time of the network, of its pieces between the candidates, and of the heads, in turns.

    What the pieces together take longer than the network in one piece is what the cuts cost: it is shared between them.
    """
    shaped, output = with_shapes(model), model.graph.output[0].name
    ends = [["images"], *(list(cut.tensors) for cut in cuts), [output]]
    pieces = [extract(shaped, a, b) for a, b in itertools.pairwise(ends)]
    side = model.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    image: list[Any] = [np.random.default_rng(0).normal(size=(1, 3, side, side)).astype(np.float32)]
    whole, stages = opened_graph(model), [opened_graph(piece) for piece in pieces]
    exits = [opened_graph(head_graph(cut, head)) for cut, head in zip(cuts, heads)]
    rounds: list[list[float]] = []
    end = None
    while end is None or len(rounds) < WARM_UP + 3 or time.perf_counter() < end:
        clock, tensors, between = [time.perf_counter()], image, list[list[Any]]()
        whole(*image)
        clock.append(time.perf_counter())
        for stage in stages:
            tensors = stage(*tensors)
            clock.append(time.perf_counter())
            between.append(tensors)
        for head, read in zip(exits, between):
            head(*read)
            clock.append(time.perf_counter())
        rounds.append([1e3 * (b - a) for a, b in itertools.pairwise(clock)])
        if len(rounds) == WARM_UP:
            end = time.perf_counter() + TIMING_S
    network, *ms = map(min, zip(*rounds[WARM_UP:]))  # whatever else runs on the machine only adds to it
    piece_ms, head_ms = np.array(ms[: len(stages)]), np.array(ms[len(stages) :])
    cut_ms = max(float(piece_ms.sum()) - network, 0.0) / len(cuts)
    before = np.cumsum(piece_ms * network / piece_ms.sum())[:-1]
    return Times(before.astype(np.float32), (head_ms + cut_ms).astype(np.float32), network)


def answered(logits: Array, answers: Labels, *, limit: float = LIMIT) -> float:
    """Return the share of pictures that a head alone can answer: the most confident, with few changed answers.

    Args:
        logits: The head's logits (H, C).
        answers: The network's answers (H,).
        limit: Largest share of all pictures whose answer may change.
    """
    order = np.argsort(-softmax(logits).max(axis=1), kind="stable")
    wrong = np.cumsum((logits.argmax(axis=1) != answers)[order])
    return float((wrong <= limit * len(answers)).sum()) / len(answers)


def place_exits(
    times: Times, logits: Sequence[Array], answers: Labels, *, count: int | None = None, limit: float = LIMIT
) -> Placement:
    """Choose the candidates, and a threshold for each, of the least mean time with few changed answers.

    For a price of a changed answer, dynamic programming finds the cheapest cascade: behind exit j with e exits left,
    the cost of a picture is J_e(j) = min over j' > j of t(j→j') + h(j') + [price · changed if it leaves at j', else
    J_{e−1}(j')], or the time to the end. The threshold at j' is that of the least total. Each price gives a cascade;
    of those within the limit, the fastest is taken.

    Args:
        times: Times of the candidates.
        logits: Logits (H, C) of each candidate's head for held-out pictures.
        answers: The network's answers (H,) to them.
        count: Number of early exits; up to `MAX_EXITS`, as many as pay, if None.
        limit: Largest share of pictures whose answer may change.

    Returns:
        The placement; no candidate is chosen if none pays.
    """
    confidences = np.stack([softmax(one).max(axis=1) for one in logits])
    wrong = np.stack([one.argmax(axis=1) != answers for one in logits])
    found = [_cascade(times, confidences, wrong, float(price * times.network), count) for price in _PRICES]
    allowed = [one for one in found if one.changed <= limit]
    return min(allowed or found[-1:], key=lambda one: one.time_ms)


def cross_validate(
    times: Times, logits: Sequence[Array], answers: Labels, first: npt.NDArray[np.bool_], *, limit: float = LIMIT
) -> Placement:
    """Return what the exits of a student do to pictures that did not choose its thresholds.

    Thresholds are chosen on one half of the held-out pictures and applied to the other, both ways.

    Args:
        times: Times of the student's exits.
        logits: Logits (H, C) of each exit's head for held-out pictures.
        answers: The network's answers (H,) to them.
        first: Mask (H,) of one half.
        limit: Largest share of pictures whose answer may change, where thresholds are chosen.

    Returns:
        Means over all held-out pictures; no thresholds, since each half has its own.
    """
    confidences = np.stack([softmax(one).max(axis=1) for one in logits])
    wrong = np.stack([one.argmax(axis=1) != answers for one in logits])
    exits = tuple(range(len(logits)))
    leaves = np.zeros_like(wrong)
    for half in (half for half in (first, ~first) if half.any()):
        found = place_exits(times, [one[half] for one in logits], answers[half], count=len(exits), limit=limit)
        leaves[:, ~half] = confidences[:, ~half] >= np.array(found.thresholds)[:, None]
    return _simulated(times, exits, list(leaves), wrong)


def _cascade(
    times: Times, confidences: Array, wrong: npt.NDArray[np.bool_], price: float, count: int | None
) -> Placement:
    """Return the cheapest cascade for one price of a changed answer."""
    candidates, pictures = wrong.shape
    orders = np.argsort(-confidences, axis=1, kind="stable")
    before = [*times.before.tolist(), 0.0]  # the last is the start: index -1
    to_end = [np.full(pictures, times.network - t) for t in before]
    costs: list[npt.NDArray[np.float64] | None] = list(to_end)  # None: too few candidates are left
    plans: list[dict[int, tuple[int, npt.NDArray[np.bool_]]]] = []
    for _ in range(count or MAX_EXITS):
        arrived, exited, plan = dict[int, npt.NDArray[np.float64]](), dict[int, npt.NDArray[np.bool_]](), {}
        for j, cost in enumerate(costs[:-1]):
            if cost is not None:
                exited[j] = _leaves(cost - price * wrong[j], orders[j])
                arrived[j] = times.exits[j] + np.where(exited[j], price * wrong[j], cost)
        costs = []
        for j in (*range(candidates), -1):
            options = {k: before[k] - before[j] + arrived[k] for k in arrived if k > j}
            best = min(options, key=lambda k: float(options[k].sum()), default=None)
            if best is None or (count is None and to_end[j].sum() <= options[best].sum()):
                costs.append(to_end[j] if count is None else None)
            else:
                plan[j] = best, exited[best]
                costs.append(options[best])
        plans.append(plan)
    chosen, leaves, at = list[int](), list[npt.NDArray[np.bool_]](), -1
    for plan in reversed(plans):
        if at not in plan:
            break
        at, mask = plan[at]
        chosen.append(at)
        leaves.append(mask)
    thresholds = (float(confidences[at][mask].min(initial=np.inf)) for at, mask in zip(chosen, leaves))
    return replace(_simulated(times, chosen, leaves, wrong), thresholds=tuple(thresholds))


def _leaves(gain: npt.NDArray[np.float64], order: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
    """Return the mask (H,) of the most confident pictures whose gains (H,) of an exit here sum up to most."""
    totals = np.concatenate([[0.0], np.cumsum(gain[order])])
    leaves = np.zeros(len(gain), bool)
    leaves[order[: int(totals.argmax())]] = True
    return leaves


def _simulated(
    times: Times, chosen: Sequence[int], leaves: Sequence[npt.NDArray[np.bool_]], wrong: npt.NDArray[np.bool_]
) -> Placement:
    """Return what chosen exits, at which masks (H,) of the pictures leave, do to the pictures."""
    pictures = wrong.shape[1]
    shares, changed = list[float](), 0
    inside, spent = np.ones(pictures, bool), 0.0
    for at, mask in zip(chosen, leaves):
        out = inside & mask
        spent += float(times.exits[at]) * inside.sum() + float(times.before[at]) * out.sum()
        shares.append(float(out.mean()))
        changed += int((out & wrong[at]).sum())
        inside &= ~mask
    spent += times.network * inside.sum()
    return Placement(tuple(chosen), (*shares, float(inside.mean())), changed / pictures, spent / pictures)
