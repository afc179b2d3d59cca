"""The certificate of an engine: promises that its exit policy keeps, tested on images that chose nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Loss: TypeAlias = Literal["change", "lost", "drop", "miss", "sensitivity", "cost", "defer"]
Test: TypeAlias = Literal["binomial", "betting"]
Unit: TypeAlias = Literal["image", "one image a group", "group mean"]

ABSOLUTE: tuple[Loss, ...] = ("sensitivity", "defer")
"""Losses that do not compare with the reference: even an engine without early exit may exceed their bound."""
OF_A_CLASS: tuple[Loss, ...] = ("miss", "sensitivity")
WITHOUT_LABELS: tuple[Loss, ...] = ("change",)


@dataclass(frozen=True)
class Promise:
    """An upper bound of an expected loss; see `edgekd.certification.losses` for the losses.

    Attributes:
        loss: `change`: answers that differ from the reference; `lost`: answers that are wrong where the reference is
            right; `drop`: accuracy lost, net of what is gained; `miss`: `lost` among the images of a class;
            `sensitivity`: wrong answers among the answered images of a class; `cost`: rise of the mean cost, as a share
            of the largest possible rise; `defer`: wrong answers among the answered images.
        limit: The bound, as a share between 0 and 1.
        class_name: The class of `miss` and `sensitivity`; else empty.
        exit: Restricts the promise to the images that take this exit or an earlier one; None for all images.
    """

    loss: Loss
    limit: float
    class_name: str = ""
    exit: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.limit < 1:
            raise ValueError("limit: between 0 and 1, both excluded")
        if bool(self.class_name) != (self.loss in OF_A_CLASS):
            raise ValueError(f"class_name: for {' and '.join(OF_A_CLASS)}, and for them only")
        if self.exit is not None and (self.loss not in ("change", "lost", "miss") or self.exit < 0):
            raise ValueError("exit: from 0 on, for change, lost and miss")


@dataclass(frozen=True)
class Evidence:
    """The result of one test.

    Attributes:
        promise: The tested promise.
        counted: The loss that was counted: that of the promise, or `lost` for `drop`, which it bounds.
        test: `binomial` is the exact test of a count, `betting` that of Waudby-Smith and Ramdas.
        unit: What counts as one observation.
        units: Number of observations.
        losses: Sum of their losses; a count for `binomial`.
        upper_bound: Upper confidence bound of the expected loss at the certificate's certainty.
        p_value: p-value of the hypothesis that the expected loss exceeds the bound.
    """

    promise: Promise
    counted: Loss
    test: Test
    unit: Unit
    units: int
    losses: float
    upper_bound: float
    p_value: float


@dataclass(frozen=True)
class Attempt:
    """One search for a certificate; several on the same images weaken each other.

    Attributes:
        images: Digest of all images of the search.
        promises: The promises.
        certainty: Requested certainty.
        seed: Seed of the division into path and test images.
        policy: Digest of the policy that was chosen.
        result: What was certified, or why nothing was, in words.
    """

    images: str
    promises: tuple[Promise, ...]
    certainty: float
    seed: int
    policy: str
    result: str = ""


@dataclass(frozen=True)
class Certificate:
    """The certificate; valid for the engine, policy and preprocessing whose digests it names.

    Attributes:
        evidence: One test for each promise.
        certainty: Probability, over the draw of the test images, that every promise holds.
        reference: `without early exit`, or the name of the student.onnx that the answers are compared with.
        reference_sha256: SHA-256 of that student.onnx, else empty.
        images: Number of test images.
        path_images: Number of images that chose the settings to test, and temperatures; 0 for a fixed setting.
        group: Rule that names the group of an image, or `none`.
        groups: Number of groups of the test images; 0 without groups.
        images_sha256: Digest of the test images.
        engine_sha256: Digest of the engine's files.
        policy_sha256: Digest of the exit policy.
        preprocess_sha256: Digest of the preprocessing.
        settings: Number of settings that could be tested.
        certified: Number of those that were certified.
        attempts: Number of different searches on these images, this one included.
        exit_counts: Number of test images that take each exit, one image of each group.
        confidences: Sorted confidence of these images at the first exit; at most `edgekd.certification.drift.KEPT`.
        warnings: What weakens the certificate.
    """

    evidence: tuple[Evidence, ...]
    certainty: float
    reference: str
    images: int
    images_sha256: str
    engine_sha256: str
    policy_sha256: str
    preprocess_sha256: str
    reference_sha256: str = ""
    path_images: int = 0
    group: str = "none"
    groups: int = 0
    settings: int = 1
    certified: int = 1
    attempts: int = 1
    exit_counts: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0.5 <= self.certainty < 1:
            raise ValueError("certainty: from 0.5 to 1, 1 excluded")
        if not self.evidence:
            raise ValueError("evidence: one or more tests")


def promise_text(promise: Promise, reference: str = "without early exit") -> str:
    """Return what a promise says, in words.

    Args:
        promise: The promise.
        reference: See `Certificate.reference`.
    """
    than = "the same engine without early exit" if reference == "without early exit" else reference
    limit, name = f"{100 * promise.limit:g} %", promise.class_name
    text = {
        "change": f"at most {limit} of the answers differ from those of {than}",
        "lost": f"at most {limit} of the images are answered wrongly that {than} answers correctly",
        "drop": f"the accuracy is at most {100 * promise.limit:g} points below that of {than}",
        "miss": f"at most {limit} of the images of {name} are missed that {than} recognises",
        "sensitivity": f"of the answered images of {name}, at least {100 * (1 - promise.limit):g} % are recognised",
        "cost": f"the mean cost exceeds that of {than} by at most {limit} of the largest possible rise",
        "defer": f"of the answered images, at most {limit} are answered wrongly",
    }[promise.loss]
    return text if promise.exit is None else f"{text}, among the images that take exit {promise.exit} or an earlier one"


def certificate_sentence(certificate: Certificate) -> str:
    """Return the promise of a certificate in one sentence."""
    promises = ", and ".join(promise_text(one.promise, certificate.reference) for one in certificate.evidence)
    counts = "; ".join(dict.fromkeys(evidence_text(one) for one in certificate.evidence))
    return f"With {100 * certificate.certainty:g} % certainty, for images like those tested ({counts}): {promises}."


def is_untested(evidence: Evidence) -> bool:
    """Return True if there was nothing to test: the policy is its own reference, or no image takes the exit."""
    return evidence.p_value == 0 and evidence.upper_bound == 0


def evidence_text(evidence: Evidence) -> str:
    """Return counts and upper bound of a test, for example `3 of 810 images, upper bound 0.82 %`."""
    of = {"image": "images", "one image a group": "groups, one image each", "group mean": "groups, their mean loss"}
    losses = f"{evidence.losses:.0f}" if evidence.test == "binomial" else f"{evidence.losses:.4g}"
    return f"{losses} of {evidence.units} {of[evidence.unit]}, upper bound {100 * evidence.upper_bound:.2f} %"


def short_text(certificate: Certificate) -> str:
    """Return a certificate for a cell of a table, for example `change ≤ 1 % (90 %)`."""
    rows = []
    for one in certificate.evidence:
        promise = one.promise
        name = f"{promise.loss} {promise.class_name}".strip()
        where = "" if promise.exit is None else f" up to exit {promise.exit}"
        bound = f"≥ {100 * (1 - promise.limit):g}" if promise.loss == "sensitivity" else f"≤ {100 * promise.limit:g}"
        rows.append(f"{name}{where} {bound} %")
    return f"{', '.join(rows)} ({100 * certificate.certainty:g} %)"
