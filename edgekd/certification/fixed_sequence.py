"""Learn then test: certify settings of an exit policy along a path that other images chose.

Fixed-sequence testing (Angelopoulos et al., arXiv 2110.01052; Laufer-Goldshtein et al., arXiv 2210.07913): the settings
are tested in an order that was fixed beforehand, each at the full level, until one fails. The first setting that breaks
a promise is certified with probability 1 - certainty at most, and no later one can be certified without it. So all
settings before the first failure are certified at once, and any of them may be used. Of several promises the largest
p-value counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekd.artifacts.certificate import ABSOLUTE, Evidence, Loss, Promise, Test, Unit
from edgekd.certification import p_values
from edgekd.certification.losses import Floats, Mask, Outcome, Sample, can_exit_early, eligible, losses, outcomes
from edgekd.errors import ConfigError
from edgekd.policy import Policy

DRAWS = 20
"""Samples drawn from the path images to choose between two tests."""


@dataclass(frozen=True)
class Design:
    """The test of a promise.

    Attributes:
        promise: The promise.
        counted: The loss that is counted, which bounds that of the promise.
        test: The test.
        unit: What counts as one observation: images that hang together are not independent.
    """

    promise: Promise
    counted: Loss
    test: Test
    unit: Unit


@dataclass(frozen=True)
class CertificationResult:
    """The settings that were certified.

    Attributes:
        certified: Indices of the certified policies, in the order of the tests.
        evidence: Tests of every policy that was tested, by its index.
        failed: Index of the policy that failed and ended the sequence; None if all were certified.
        designs: How each promise was tested.
        smallest: For each promise, the smallest bound that these images can certify: that of no loss at all.
        needed: For each promise, the units (images or groups) that would certify the failed policy if losses go on at
            their rate, or None if it loses too much; without a failure, those for no loss at all.
    """

    certified: tuple[int, ...]
    evidence: dict[int, tuple[Evidence, ...]]
    failed: int | None
    designs: tuple[Design, ...]
    smallest: tuple[float, ...]
    needed: tuple[int | None, ...]


def certify_path(
    policies: tuple[Policy, ...],
    path: Sample,
    test: Sample,
    promises: tuple[Promise, ...],
    *,
    certainty: float,
    classes: tuple[str, ...],
    costs: Floats | None = None,
    seed: int = 0,
    answers: tuple[list[Outcome], list[Outcome]] | None = None,
) -> CertificationResult:
    """Test policies in their order, and return those that keep all promises.

    Args:
        policies: The policies, from the slowest to the fastest, chosen without the test images; the first has no early
            exit.
        path: Images that chose the policies. They also choose how promises are tested, and the order of the tests where
            a promise is about the images that exit early or are answered, which the slowest policies have few of.
        test: Images that chose nothing.
        promises: The promises.
        certainty: Probability, over the draw of the test images, that all promises hold.
        classes: Names of the classes.
        costs: Costs (C, C); see `losses.losses`.
        seed: Seed of the order of the images, which decides the image of each group and the bets.
        answers: Outcomes of the policies on the path and test images, if they were computed before.
    """
    check_certainty(certainty)
    delta = 1 - certainty
    on_path, on_test = answers or (outcomes(policies, path), outcomes(policies, test))
    trial = _Trial(path, on_path, classes, costs, seed)
    designs = tuple(_design(promise, trial, test, delta) for promise in promises)
    order = list(range(len(policies)))
    if any(promise.loss in ABSOLUTE or promise.exit is not None for promise in promises):
        p_on_path = [max(one.p_value for one in trial.evidence(designs, j, policies[j], delta)) for j in order]
        order = sorted(order, key=p_on_path.__getitem__)
    trial = _Trial(test, on_test, classes, costs, seed)
    certified, evidence, failed = [], {}, None
    for j in order:
        evidence[j] = trial.evidence(designs, j, policies[j], delta)
        if max(one.p_value for one in evidence[j]) > delta:
            failed = j
            break
        certified.append(j)
    smallest, needed = [], []
    for i, design in enumerate(designs):
        units = trial.units(design)
        smallest.append(_bound(np.zeros(units), design.test, delta))
        needed.append(_needed(evidence[failed][i] if failed is not None else None, design.promise.limit, delta))
    return CertificationResult(tuple(certified), evidence, failed, designs, tuple(smallest), tuple(needed))


def check_certainty(certainty: float) -> None:
    """Check a certainty.

    Raises:
        ConfigError: It is below 0.5, or 1 or more.
    """
    if not 0.5 <= certainty < 1:
        raise ConfigError(f"--certainty {certainty:g}", fix="give 0.5 to 0.999; 0.9 is usual")


def evidence_of(
    policy: Policy,
    sample: Sample,
    promises: tuple[Promise, ...],
    *,
    certainty: float,
    classes: tuple[str, ...],
    outcome: Outcome | None = None,
    costs: Floats | None = None,
    designs: tuple[Design, ...] | None = None,
    seed: int = 0,
) -> tuple[Evidence, ...]:
    """Test one fixed policy; without `designs`, by the exact test, or by betting where losses are not counts.

    Args:
        policy: The policy.
        sample: Images that chose nothing.
        promises: The promises.
        certainty: See `certify_path`.
        classes: Names of the classes.
        outcome: The classifier's answers, if they were computed on the engine; else they follow from the logits.
        costs: Costs (C, C).
        designs: How each promise is tested.
        seed: See `certify_path`.
    """
    check_certainty(certainty)
    trial = _Trial(sample, [outcome or outcomes((policy,), sample)[0]], classes, costs, seed)
    designs = designs or tuple(_candidates(promise, sample)[-1] for promise in promises)
    return trial.evidence(designs, 0, policy, 1 - certainty)


class _Trial:
    """Outcomes of policies on a sample, and tests of them."""

    def __init__(
        self, sample: Sample, found: list[Outcome], classes: tuple[str, ...], costs: Floats | None, seed: int
    ) -> None:
        self._sample, self._outcomes, self._classes, self._costs = sample, found, classes, costs
        self._order = np.random.default_rng(seed).permutation(len(sample))
        self._rows: dict[tuple[Promise, Unit], npt.NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self._outcomes)

    def units(self, design: Design) -> int:
        """Return the number of observations of a promise, before any policy restricts them."""
        rows, groups = self._eligible(design), self._sample.groups
        return len(np.unique(groups[rows])) if design.unit == "group mean" and groups is not None else len(rows)

    def values(self, design: Design, j: int) -> Floats:
        """Return the losses (U,) of policy j in the order of the units."""
        counted = Promise(design.counted, design.promise.limit, design.promise.class_name, design.promise.exit)
        found, rows = losses(counted, self._outcomes[j], self._sample, self._costs), self._eligible(design)
        if design.unit != "group mean":
            return found.values[rows][found.is_counted[rows]]
        assert self._sample.groups is not None
        _, first, inverse = np.unique(self._sample.groups[rows], return_index=True, return_inverse=True)
        means = np.bincount(inverse, found.values[rows]) / np.bincount(inverse)
        return np.asarray(means[np.argsort(first)])  # in the order in which the groups occur

    def evidence(self, designs: tuple[Design, ...], j: int, policy: Policy, delta: float) -> tuple[Evidence, ...]:
        """Return the tests of all promises for policy j."""
        return tuple(self._evidence(design, j, policy, delta) for design in designs)

    def _evidence(self, design: Design, j: int, policy: Policy, delta: float) -> Evidence:
        promise, values = design.promise, self.values(design, j)
        early = None if promise.exit is None else promise.exit + 1
        if promise.loss not in ABSOLUTE and self._sample.reference is None and not can_exit_early(policy, early):
            p_value, bound = 0.0, 0.0  # it is its own reference, or no image is concerned
        else:
            p_value, bound = float(_p_values(values, design, delta)), _bound(values, design.test, delta)
        return Evidence(
            promise, design.counted, design.test, design.unit, len(values), float(values.sum()), bound, p_value
        )

    def _eligible(self, design: Design) -> npt.NDArray[np.int64]:
        """Return the indices of a promise's images in the fixed order; one for each group if that is the unit."""
        key = design.promise, design.unit
        if key not in self._rows:
            mask: Mask = eligible(design.promise, self._sample, self._classes)
            rows = self._order[mask[self._order]]
            if design.unit == "one image a group" and self._sample.groups is not None:
                rows = rows[np.sort(np.unique(self._sample.groups[rows], return_index=True)[1])]
            self._rows[key] = rows
        return self._rows[key]


def _p_values(losses: Floats, design: Design, delta: float) -> Floats:
    """Return the p-values (...) of losses (..., U)."""
    if design.test == "binomial":
        return p_values.binomial_p_value(losses.sum(axis=-1), losses.shape[-1], design.promise.limit)
    return p_values.betting_p_value(losses, design.promise.limit, delta)


def _bound(values: Floats, test: Test, delta: float) -> float:
    if test == "binomial":
        return p_values.binomial_upper_bound(int(values.sum()), len(values), delta)
    return p_values.betting_upper_bound(values, delta)


def _needed(evidence: Evidence | None, limit: float, delta: float) -> int | None:
    if evidence is None or evidence.p_value <= delta:
        return p_values.images_needed(limit, delta)
    return p_values.images_needed_at_rate(limit, delta, max(0, round(evidence.losses)), max(1, evidence.units))


def _candidates(promise: Promise, sample: Sample) -> list[Design]:
    """Return the valid tests of a promise; the last is the one that needs no choice."""
    one: Unit = "image" if sample.groups is None else "one image a group"
    mean: Unit = "image" if sample.groups is None else "group mean"
    if promise.loss == "cost":
        return [Design(promise, "cost", "betting", mean)]
    if promise.loss == "drop":
        return [Design(promise, "lost", "binomial", one), Design(promise, "drop", "betting", mean)]
    exact = Design(promise, promise.loss, "binomial", one)
    if promise.loss in ABSOLUTE or promise.exit is not None or sample.groups is None:
        return [exact]
    return [exact, Design(promise, promise.loss, "betting", mean)]


def _design(promise: Promise, path: _Trial, test: Sample, delta: float) -> Design:
    """Choose the test that certifies most settings on samples drawn from the path images, as large as the test's."""
    candidates = _candidates(promise, test)
    if len(candidates) == 1:
        return candidates[0]
    reached = []
    for design in candidates:
        count = _Trial(test, [], path._classes, None, 0).units(design)
        losses_on_path = np.stack([path.values(design, j) for j in range(len(path))])  # (settings, units)
        if not losses_on_path.shape[1] or not count:
            return candidates[0]
        drawn = np.random.default_rng(0).integers(0, losses_on_path.shape[1], (DRAWS, count))
        passes = np.array([_p_values(row[drawn], design, delta) <= delta for row in losses_on_path])  # (settings, D)
        reached.append(passes.cumprod(axis=0).sum())
    return candidates[int(np.argmax(reached))]
