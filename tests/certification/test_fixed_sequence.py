"""Certification along a path: how often promises are broken on synthetic images, and the rules of the sequence."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from certification import population
from certification.population import CLASSES, draw, path

from edgekd.artifacts.certificate import Promise
from edgekd.certification.fixed_sequence import CertificationResult, certify_path, evidence_of
from edgekd.certification.losses import Sample, eligible, losses, outcomes
from edgekd.errors import ConfigError
from edgekd.policy import Policy

DRAWS, DELTA = 300, 0.1
POLICIES = path((0.97, 0.94, 0.92, 0.91, 0.90, 0.89, 0.88, 0.86, 0.84, 0.8, 0.7))
MOST = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / DRAWS)
"""Broken promises among DRAWS that three standard errors allow."""


def certify(promises: tuple[Promise, ...], sample: Sample, test: Sample) -> CertificationResult:
    return certify_path(POLICIES, sample, test, promises, certainty=1 - DELTA, classes=CLASSES)


def truth(promise: Promise, *, groups: bool = False) -> list[float]:
    """The expected loss of each policy: over images, or over groups of the mean of each."""
    everything = population.population()
    means = []
    for found in outcomes(POLICIES, everything):
        of = losses(promise, found, everything)
        rows = of.is_counted & eligible(promise, everything, CLASSES)
        if groups:
            number = np.unique(everything.groups[rows], return_inverse=True)[1]
            means.append(float((np.bincount(number, of.values[rows]) / np.bincount(number)).mean()))
        else:
            means.append(float(of.values[rows].mean()) if rows.any() else 0.0)
    return means


@pytest.mark.parametrize(
    ("promises", "groups"),
    [
        ((Promise("change", 0.015),), False),
        ((Promise("drop", 0.01),), False),
        ((Promise("change", 0.03),), True),
        ((Promise("drop", 0.015), Promise("miss", 0.05, "b")), False),
        ((Promise("change", 0.05, exit=0), Promise("change", 0.05, exit=1)), False),
    ],
    ids=["change", "drop", "change of groups", "drop and a class", "each exit"],
)
def test_promises_are_seldom_broken(promises: tuple[Promise, ...], groups: bool) -> None:
    rng = np.random.default_rng(0)
    everything, answers = population.population(), outcomes(POLICIES, population.population())
    of = [truth(promise, groups=groups) for promise in promises]
    broken = useful = 0
    for _ in range(DRAWS):
        drawn = [population.rows(rng, count, groups=groups) for count in (200, 500)]
        images, others = (dataclasses.replace(everything.take(rows), groups=named) for rows, named in drawn)
        found = certify_path(
            POLICIES,
            images,
            others,
            promises,
            certainty=1 - DELTA,
            classes=CLASSES,
            answers=tuple([one.take(rows) for one in answers] for rows, _ in drawn),  # type: ignore[arg-type]
        )
        useful += max(found.certified) > 0
        broken += any(means[j] > promise.limit for means, promise in zip(of, promises) for j in found.certified)
    assert broken / DRAWS <= MOST
    assert useful / DRAWS > 0.5  # a procedure that certifies nothing keeps every promise


def of_two_exits(losses_at_exit_0: np.ndarray) -> Sample:
    """Images that a last exit answers 0, and the first exit 1 where there is a loss."""
    first = np.where(losses_at_exit_0[:, None], [0.0, 5.0], [5.0, 0.0])
    last = np.tile([5.0, 0.0], (len(first), 1))
    return Sample(np.float32([first, last]))


def test_a_policy_at_the_bound_is_seldom_certified() -> None:
    """Its true loss is exactly the limit, so it breaks no promise, but any larger loss would."""
    rng = np.random.default_rng(1)
    policies = (Policy((1.0, 1.0)).without_early_exit(), Policy((1.0, 1.0), (0.5,)))
    rejected = 0
    for _ in range(DRAWS):
        images, others = (of_two_exits(rng.random(n) < 0.01) for n in (50, 600))
        found = certify_path(
            policies, images, others, (Promise("change", 0.01),), certainty=1 - DELTA, classes=("x", "y")
        )
        rejected += found.certified == (0, 1)
    assert 0 < rejected / DRAWS <= MOST


def test_the_sequence_is_mapies() -> None:
    control = pytest.importorskip("mapie.risk_control.fwer_control")
    rng = np.random.default_rng(2)
    for _ in range(20):
        found = certify((Promise("change", 0.02),), draw(rng, 200), test := draw(rng, 400))
        every = [evidence_of(p, test, (Promise("change", 0.02),), certainty=0.9, classes=CLASSES)[0] for p in POLICIES]
        expected = control.control_fwer(np.array([one.p_value for one in every]), DELTA, "fixed_sequence")
        assert list(found.certified) == expected.tolist()
        assert [found.evidence[j][0].losses for j in found.certified] == [every[j].losses for j in found.certified]


def test_the_fastest_certified_policy_is_before_the_first_failure() -> None:
    """500 images; early exit at 0.9 changes 1, at 0.6 20 and at 0.3 none of them: the last is never tested."""
    confidence = np.concatenate([[0.95], np.full(20, 0.7), np.full(479, 0.4)])
    odds = np.log(confidence / (1 - confidence) * 2)[:, None]  # three classes: p, (1-p)/2, (1-p)/2
    first, last = odds * [[0, 1, 0]], np.tile([[0.0, 5.0, 0.0]], (500, 1))
    last[:21] = [5.0, 0.0, 0.0]
    sample = Sample(np.float32([first, last]))
    policies = tuple(Policy((1.0, 1.0), (t,)) for t in (2.0, 0.9, 0.6, 1.5))
    found = certify_path(policies, sample, sample, (Promise("change", 0.01),), certainty=0.9, classes=("x", "y", "z"))
    assert found.certified == (0, 1)
    assert found.failed == 2
    assert (found.evidence[1][0].losses, found.evidence[1][0].units) == (1, 500)
    assert found.evidence[1][0].upper_bound == pytest.approx(0.00776, abs=1e-4)  # 1 of 500, Clopper-Pearson, 90 %
    assert 3 not in found.evidence
    assert found.needed == (None,)  # 21 of 500 lose more than 1 %, however many images follow
    assert found.smallest[0] == pytest.approx(1 - 0.1 ** (1 / 500))


def test_without_early_exit_needs_no_test_against_itself_but_against_another_network() -> None:
    rng = np.random.default_rng(3)
    few = draw(rng, 20)  # 20 images certify 11 % at best
    alone = certify_path(POLICIES, few, few, (Promise("drop", 0.01),), certainty=0.9, classes=CLASSES)
    assert alone.certified == (0,)
    assert alone.evidence[0][0].p_value == 0
    assert alone.needed == (230,)
    other = dataclasses.replace(few, reference=few.logits)
    assert certify_path(POLICIES, few, other, (Promise("drop", 0.01),), certainty=0.9, classes=CLASSES).certified == ()
    same = draw(rng, 400)
    same = dataclasses.replace(same, reference=same.logits)
    assert 0 in certify_path(POLICIES, few, same, (Promise("drop", 0.01),), certainty=0.9, classes=CLASSES).certified
    absolute = (Promise("sensitivity", 0.05, "a"),)
    assert certify_path(POLICIES, few, few, absolute, certainty=0.9, classes=CLASSES).certified == ()


def test_the_largest_p_value_of_several_promises_counts() -> None:
    rng = np.random.default_rng(4)
    images, others = draw(rng, 300), draw(rng, 600)
    change, miss = Promise("change", 0.03), Promise("miss", 0.05, "a")
    both = certify((change, miss), images, others).certified
    assert set(both) == set(certify((change,), images, others).certified) & set(
        certify((miss,), images, others).certified
    )


def test_one_image_of_each_group() -> None:
    """Eight groups of 50 images each: 400 images are eight observations, or eight means."""
    rng = np.random.default_rng(5)
    grouped = dataclasses.replace(draw(rng, 400), groups=np.repeat(np.arange(8), 50))
    found = certify((Promise("change", 0.3),), grouped, grouped)
    assert found.evidence[0][0].units == 8
    assert found.smallest[0] == pytest.approx(1 - 0.1 ** (1 / 8))


def test_group_means_by_hand() -> None:
    """400 groups of 10 images; one of the ten changes in half of them. Their means spread far less than images do."""
    changes = np.tile([1] + [0] * 19, 200).astype(bool)
    sample = dataclasses.replace(of_two_exits(changes), groups=np.arange(4000) // 10)
    policies = (Policy((1.0, 1.0), (2.0,)), Policy((1.0, 1.0), (0.5,)))
    promises = (Promise("change", 0.065),)
    found = certify_path(policies, sample, sample, promises, certainty=0.9, classes=("x", "y"))
    assert found.designs[0].unit == "group mean"
    assert found.certified == (0, 1)
    assert (found.evidence[1][0].losses, found.evidence[1][0].units) == (pytest.approx(20), 400)
    assert 0.05 < found.evidence[1][0].upper_bound < 0.06


def test_the_test_of_a_drop_is_chosen_on_the_path() -> None:
    """Where gains are as frequent as losses betting on the net drop certifies more, where nothing changes the count."""
    rng = np.random.default_rng(6)
    labels = np.zeros(1500, np.int64)
    policies = (Policy((1.0, 1.0), (2.0,)), Policy((1.0, 1.0), (0.5,)))

    def chosen(lost: float, gained: float) -> str:
        kind = rng.choice([1, 0, -1], 1500, p=[lost, 1 - lost - gained, gained])
        first = np.where((kind == 1)[:, None], [0.0, 5.0], [5.0, 0.0])
        last = np.where((kind == -1)[:, None], [0.0, 5.0], [5.0, 0.0])
        sample = Sample(np.float32([first, last]), labels)
        promises = (Promise("drop", 0.015),)
        return certify_path(policies, sample, sample, promises, certainty=0.9, classes=("x", "y")).designs[0].counted

    assert chosen(0.02, 0.02) == "drop"
    assert chosen(0.0, 0.0) == "lost"


def test_costs() -> None:
    """Answering y to an x costs 10, x to a y 1: two of 100 images rise by 10 of the largest rise 10, one by 0.1."""
    labels = np.array([0] * 50 + [1] * 50)
    last = np.eye(2)[labels] * 5
    first = last.copy()
    first[[0, 1, 60]] = first[[0, 1, 60], ::-1]
    sample = Sample(np.float32([first, last]), labels)
    costs = np.array([[0.0, 10.0], [1.0, 0.0]])
    policies = (Policy((1.0, 1.0), (0.5,)),)
    of = losses(Promise("cost", 0.05), outcomes(policies, sample)[0], sample, costs)
    assert of.values.sum() == pytest.approx(2.1)


def test_deferral_counts_the_answered_images() -> None:
    """Ten images, of which those with confidence below 0.8 are deferred, wrong ones included."""
    confidence = np.array([0.9] * 6 + [0.7] * 4)
    right = np.array([1, 1, 1, 1, 1, 0, 1, 0, 0, 0], bool)
    odds = np.log(confidence / (1 - confidence))[:, None]
    logits = np.where(right[:, None], odds * [1.0, 0.0], odds * [0.0, 1.0])
    sample = Sample(np.float32([logits]), np.zeros(10, np.int64))
    promises = (Promise("defer", 0.4), Promise("sensitivity", 0.4, "x"))
    found = evidence_of(Policy((1.0,), (), defer_below=0.8), sample, promises, certainty=0.9, classes=("x", "y"))
    assert [(one.losses, one.units) for one in found] == [(1, 6), (1, 6)]


def test_what_cannot_be_promised() -> None:
    rng = np.random.default_rng(7)
    sample = draw(rng, 50)
    with pytest.raises(ConfigError, match="needs labels"):
        certify((Promise("drop", 0.1),), dataclasses.replace(sample, labels=None), sample)
    with pytest.raises(ConfigError, match=r"no class 'z'[\s\S]*a, b, c, d, e"):
        certify((Promise("miss", 0.1, "z"),), sample, sample)
    with pytest.raises(ConfigError, match=r"--certainty 90"):
        certify_path(POLICIES, sample, sample, (Promise("change", 0.1),), certainty=90, classes=CLASSES)
    with pytest.raises(ValueError, match="limit"):
        Promise("change", 1.0)
    with pytest.raises(ValueError, match="class_name"):
        Promise("miss", 0.1)
