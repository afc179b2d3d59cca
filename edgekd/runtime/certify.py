"""Certificates of an exit policy: the search along a path of settings, and the test of a fixed one."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from edgekd.artifacts.certificate import (
    ABSOLUTE,
    Attempt,
    Certificate,
    Evidence,
    Loss,
    Promise,
    short_text,
)
from edgekd.artifacts.manifest import (
    Manifest,
    engine_digest,
    policy_digest,
    preprocess_digest,
    read_manifest,
    write_manifest,
)
from edgekd.certification import drift
from edgekd.certification.fixed_sequence import CertificationResult, Design, certify_path, evidence_of
from edgekd.certification.losses import Floats, Outcome, Sample, can_exit_early, eligible, losses
from edgekd.data.images import load_batches
from edgekd.data.preprocess import Preprocess
from edgekd.errors import ArtifactError, ConfigError
from edgekd.policy import Decision, Policy, decide, simulate
from edgekd.runtime.certificate_images import PATH_SHARE, CertificateImages, Image, digest_of, groups_of, labels_of
from edgekd.runtime.classifier import Classifier
from edgekd.runtime.engine import Engine
from edgekd.runtime.tuning import AUTO, PathPoint, stage_ms, threshold_path
from edgekd.runtime.tuning import Loss as PathLoss
from edgekd.types import Array, Labels, Progress

log = logging.getLogger(__name__)
BATCH = 32
SELECTION_IMAGES = 512
"""Images whose pixels are kept in memory for the selection of exits."""
DEFERRALS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
"""Shares of the path images to defer that are tried with each of `DEFERRED_POINTS` settings."""
DEFERRED_POINTS = 12
COVERAGE_STEP = 0.02
"""Settings whose shares of answered images differ by less are equal in this respect: the faster one is chosen."""


@dataclass(frozen=True)
class Request:
    """Promises to certify, and their reference.

    Attributes:
        promises: The promises, of which all are kept together.
        certainty: Probability, over the draw of the test images, that all hold.
        costs: Costs (C, C) of the promise `cost`.
        reference: Opened student.onnx whose answers are the reference; None for the engine without early exit.
        reference_name: Its name, for the certificate.
        seed: Seed of every random choice.
    """

    promises: tuple[Promise, ...]
    certainty: float = 0.9
    costs: Floats | None = None
    reference: Engine | None = None
    reference_name: str = "without early exit"
    seed: int = 0

    @property
    def is_absolute(self) -> bool:
        """True if the engine without early exit may break a promise, too."""
        return self.reference is not None or any(p.loss in ABSOLUTE for p in self.promises)


@dataclass(frozen=True)
class Certified:
    """The outcome of a search for a certificate.

    Attributes:
        policy: The policy to use: the fastest certified one, or else that without early exit.
        latency_ms: Its mean latency of an image at batch size 1, from the stages' times.
        certificate: None if nothing is certified.
        points: Certified settings, each with its tests, slow to fast.
        failed: The setting that failed and ended the tests, with its tests.
        limits: For each promise, which bound these images can certify at best, and how many the requested one needs.
        attempt: Entry of the manifest's list of attempts.
    """

    policy: Policy
    latency_ms: float
    certificate: Certificate | None
    points: tuple[tuple[PathPoint, tuple[Evidence, ...]], ...]
    failed: tuple[PathPoint, tuple[Evidence, ...]] | None
    limits: tuple[str, ...]
    attempt: Attempt


def search_certificate(
    engine: Engine,
    images: CertificateImages,
    request: Request,
    *,
    confidence: str = AUTO,
    average: str = AUTO,
    progress: Progress | None = None,
) -> Certified:
    """Choose settings on the path images, test them on the test images, and take the fastest that is certified.

    The answers to the test images that decide are those of the classifier itself, not of recorded logits.

    Args:
        engine: The engine; nothing is written.
        images: The images.
        request: What to certify.
        confidence: See `threshold_path`.
        average: See `threshold_path`.
        progress: Called with the images done and their number.
    """
    both = (*images.path, *images.test)
    logits, reference = _record(engine, images.folder, both, request.reference, progress)
    cut = len(images.path)
    path = _sample(logits[:, :cut], images.path, None if reference is None else reference[:, :cut])
    test = _sample(logits[:, cut:], images.test, None if reference is None else reference[:, cut:])
    classes = engine.metadata.classes
    stages = stage_ms(engine, next(load_batches([images.folder / both[0].path], engine.metadata.preprocess)))
    points = threshold_path(
        path.logits,
        path.labels,
        stages,
        loss=_path_loss(request, path, classes)[0],
        confidence=confidence,
        average=average,
    )
    if any(promise.loss == "defer" for promise in request.promises):
        points = _with_deferral(points, path.logits)
    result = certify_path(
        tuple(point.policy for point in points),
        path,
        test,
        request.promises,
        certainty=request.certainty,
        classes=classes,
        costs=request.costs,
        seed=request.seed,
    )
    deferred = [_deferred(point.policy, path.logits) for point in points]
    best_first = sorted(result.certified, key=lambda j: (deferred[j], points[j].latency_ms))
    chosen: int | None = None
    evidence: tuple[Evidence, ...] = ()
    outcome: Outcome | None = None
    for j in best_first:
        outcome = _run(engine, images.folder, images.test, points[j].policy, test)
        evidence = _test(points[j].policy, test, request, classes, outcome=outcome, designs=result.designs)
        if max(one.p_value for one in evidence) <= 1 - request.certainty:
            chosen = j
            break
        log.info("a setting that passed on recorded logits is not kept: the classifier itself answers otherwise")
    best = points[chosen if chosen is not None else 0]
    policy = best.policy if chosen is not None else best.policy.without_early_exit()
    limits = _limits(result, request, images)
    certificate, attempt = None, _attempt(images, request, policy)
    if chosen is None or outcome is None or not (request.is_absolute or can_exit_early(policy)):
        attempt = dataclasses.replace(attempt, result=f"no early exit is certified: {'; '.join(limits)}")
    else:
        certificate = dataclasses.replace(
            _certificate(engine, images, request, policy, evidence, outcome.exits, test, attempt),
            settings=len(points),
            certified=len(result.certified),
        )
        attempt = dataclasses.replace(attempt, result=short_text(certificate))
    kept = tuple((points[j], result.evidence[j]) for j in sorted(result.certified, key=lambda j: -points[j].latency_ms))
    failed = None if result.failed is None else (points[result.failed], result.evidence[result.failed])
    return Certified(policy, best.latency_ms, certificate, kept, failed, limits, attempt)


def certify_policy(
    engine: Engine, images: CertificateImages, request: Request, *, progress: Progress | None = None
) -> tuple[tuple[Evidence, ...], Certificate | None, Attempt]:
    """Test the engine's own policy on images that chose nothing.

    Returns:
        The tests, the certificate if all promises are kept, and the entry of the manifest's list of attempts.
    """
    policy, classes = engine.metadata.policy, engine.metadata.classes
    if not policy.is_tuned:
        raise ConfigError("the engine has no exit policy yet", fix="choose one: edgekd tune --max-change 1 --data …")
    logits, reference = _record(engine, images.folder, images.test, request.reference, progress)
    test = _sample(logits, images.test, reference)
    outcome = _run(engine, images.folder, images.test, policy, test)
    evidence = _test(policy, test, request, classes, outcome=outcome, designs=None)
    attempt = _attempt(images, request, policy)
    if max(one.p_value for one in evidence) > 1 - request.certainty:
        return evidence, None, dataclasses.replace(attempt, result="not certified")
    certificate = _certificate(engine, images, request, policy, evidence, outcome.exits, test, attempt)
    return evidence, certificate, dataclasses.replace(attempt, result=short_text(certificate))


def check_drift(engine: Engine, images: CertificateImages, *, progress: Progress | None = None) -> drift.Drift:
    """Compare images of the field with those of the engine's certificate.

    Raises:
        ArtifactError: The engine has no certificate.
    """
    certificate = _manifest(engine).certificate
    if certificate is None:
        what = "the engine has no certificate to compare with"
        raise ArtifactError(what, fix="make one: edgekd tune --max-change 1 --certainty 0.9")
    logits, _ = _record(engine, images.folder, images.test, None, progress)
    rows = _one_of_each_group(_sample(logits, images.test, None))
    exits = simulate(logits, engine.metadata.policy).exits[rows]
    confidence = _first_confidence(engine.metadata.policy, logits[:, rows])
    return drift.compare(certificate.exit_counts, certificate.confidences, exits, confidence)


def save_certified(
    folder: Path, policy: Policy, certificate: Certificate | None, attempt: Attempt, *, digest: str
) -> None:
    """Write a policy, its certificate and the attempt into an engine's manifest.

    Args:
        folder: The engine folder.
        policy: The policy; a new one replaces the trade-off curve and the choice of `edgekd tune`.
        certificate: The certificate, or None.
        attempt: The attempt.
        digest: Digest of the manifest when the engine was opened.

    Raises:
        ArtifactError: The manifest has changed since.
    """
    manifest = read_manifest(folder)
    if manifest.digest != digest:
        raise ArtifactError(f"{folder} was rewritten while it was being certified", fix="run the command again")
    attempts = tuple(dict.fromkeys((*manifest.attempts, attempt)))
    manifest = dataclasses.replace(manifest, certificate=certificate, attempts=attempts)
    if policy != manifest.metadata.policy:
        metadata = dataclasses.replace(manifest.metadata, policy=policy)
        manifest = dataclasses.replace(manifest, metadata=metadata, curve=(), tuning=None)
    write_manifest(folder, manifest)


def _manifest(engine: Engine) -> Manifest:
    if engine.manifest is None:
        raise ConfigError("student.onnx has no certificate", fix="it belongs to an engine: compile it first")
    return engine.manifest


def _record(
    engine: Engine, folder: Path, images: Sequence[Image], reference: Engine | None, progress: Progress | None
) -> tuple[Array, Array | None]:
    """Return the logits (E, N, C) of images by the engine's stages and, if there is one, by the reference."""
    found, others = [], []
    preprocess = engine.metadata.preprocess
    for batch in load_batches([folder / i.path for i in images], preprocess, batch=BATCH, progress=progress):
        found.append(engine.staged_logits(batch))
        if reference is not None:
            others.append(reference.logits(batch)[-len(engine.metadata.exits) :])  # the last one decides
    return np.concatenate(found, axis=1), np.concatenate(others, axis=1) if others else None


def _sample(logits: Array, images: Sequence[Image], reference: Array | None) -> Sample:
    return Sample(logits, labels_of(images), groups_of(images), reference)


def path_images(images: CertificateImages, preprocess: Preprocess, *, seed: int) -> tuple[tuple[Image, ...], Array]:
    """Draw path images for the selection of exits, at most `SELECTION_IMAGES`; return them and their pixels."""
    drawn = np.random.default_rng(seed).permutation(len(images.path))[:SELECTION_IMAGES]
    chosen = tuple(images.path[i] for i in sorted(drawn.tolist()))
    return chosen, np.concatenate(list(load_batches([images.folder / i.path for i in chosen], preprocess)))


def without_early_exit(found: Certified) -> Certified:
    """Return the outcome if the certified setting is not used, as it is no faster than the plain network."""
    attempt = dataclasses.replace(found.attempt, result=f"{found.attempt.result}; no faster than the plain network")
    return dataclasses.replace(found, policy=found.policy.without_early_exit(), certificate=None, attempt=attempt)


def path_search(
    images: Sequence[Image], tests: int, request: Request, classes: tuple[str, ...], *, confidence: str, average: str
) -> Callable[[Array, tuple[float, ...]], PathPoint]:
    """Return a search for the fastest setting that is likely to be certified, for `exit_selection.tune_exits`.

    Args:
        images: Path images whose logits are searched.
        tests: Number of test images, by which a loss must be below its limit with some margin.
        request: What to certify.
        classes: Names of the classes.
        confidence: See `threshold_path`.
        average: See `threshold_path`.
    """
    labels, groups = labels_of(images), groups_of(images)

    def search(logits: Array, stages: tuple[float, ...]) -> PathPoint:
        loss, limit = _path_loss(request, Sample(logits, labels, groups, None), classes)
        points = threshold_path(logits, labels, stages, loss=loss, confidence=confidence, average=average)
        margin = NormalDist().inv_cdf(request.certainty)
        return [p for p in points if p.loss + margin * math.sqrt(p.loss / max(tests, 1)) <= limit][-1]

    return search


def _path_loss(request: Request, path: Sample, classes: tuple[str, ...]) -> tuple[PathLoss, float]:
    """Return the sum of the promised losses of answers against reference answers, and the limit of the strictest one.

    The strictest promise weighs 1, the others as much as makes their limits the same.
    """
    relative: dict[Loss, Loss] = {"sensitivity": "miss", "defer": "lost"}
    promises = {dataclasses.replace(p, loss=relative.get(p.loss, p.loss), exit=None) for p in request.promises}
    concerned = {promise: eligible(promise, path, classes) for promise in promises}
    limits = {promise: promise.limit * max(float(concerned[promise].mean()), 1 / len(path)) for promise in promises}
    strictest = min(limits.values())

    def loss(answers: Labels, reference: Labels) -> Floats:
        count = len(answers)
        found = Outcome(answers, reference, np.zeros(count, np.int64), np.ones(count, np.float32), np.ones(count, bool))
        total = np.zeros(count)
        for promise, limit in limits.items():
            values = losses(promise, found, path, request.costs).values * concerned[promise]
            total += values * strictest / limit
        return total

    return loss, strictest


def _with_deferral(points: tuple[PathPoint, ...], logits: Array) -> tuple[PathPoint, ...]:
    """Combine settings with thresholds below which a share of the path images is deferred."""
    spread = np.linspace(0, len(points) - 1, min(len(points), DEFERRED_POINTS)).round().astype(int)
    found = []
    for point in (points[i] for i in spread):
        confidence = simulate(logits, point.policy).confidence
        for share in DEFERRALS:
            below = float(np.quantile(confidence, share, method="higher")) if share else 0.0
            found.append(dataclasses.replace(point, policy=dataclasses.replace(point.policy, defer_below=below)))
    return tuple(dict.fromkeys(found))


def _deferred(policy: Policy, logits: Array) -> int:
    """Return the share of the images that a policy defers, in units of `COVERAGE_STEP`."""
    return round(float(simulate(logits, policy).deferred.mean()) / COVERAGE_STEP) if policy.defer_below else 0


def _run(engine: Engine, folder: Path, images: Sequence[Image], policy: Policy, test: Sample) -> Outcome:
    """Return the classifier's own answers under a policy, beside those of the reference."""
    classifier = Classifier(engine, strategy="cascade", policy=policy)
    decisions = [
        classifier.run(batch)
        for batch in load_batches([folder / i.path for i in images], engine.metadata.preprocess, batch=BATCH)
    ]
    logits = test.logits if test.reference is None else test.reference
    slowest = dataclasses.replace(policy.without_early_exit(), defer_below=0.0)
    reference = simulate(logits, slowest).probabilities.argmax(axis=1)
    answers, exits, confidence, deferred = (np.concatenate(column) for column in zip(*map(_columns, decisions)))
    return Outcome(answers, reference, exits, confidence, ~deferred)


def _columns(decision: Decision) -> tuple[npt.NDArray[np.generic], ...]:
    return decision.probabilities.argmax(axis=1), decision.exits, decision.confidence, decision.deferred


def _test(
    policy: Policy,
    test: Sample,
    request: Request,
    classes: tuple[str, ...],
    *,
    outcome: Outcome,
    designs: tuple[Design, ...] | None,
) -> tuple[Evidence, ...]:
    return evidence_of(
        policy,
        test,
        request.promises,
        certainty=request.certainty,
        classes=classes,
        outcome=outcome,
        costs=request.costs,
        designs=designs,
        seed=request.seed,
    )


def _attempt(images: CertificateImages, request: Request, policy: Policy) -> Attempt:
    return Attempt(images.digest, request.promises, request.certainty, request.seed, policy_digest(policy))


def _limits(result: CertificationResult, request: Request, images: CertificateImages) -> tuple[str, ...]:
    """Return for each promise the smallest bound that the images can certify, and the number that it needs."""
    share = 1 if images.are_apart else 1 - PATH_SHARE
    lines = []
    for i, promise in enumerate(request.promises):
        units, needed = max(one[i].units for one in result.evidence.values()), result.needed[i]
        of = "images" if result.designs[i].unit == "image" else "groups"
        name = " ".join(filter(None, (promise.loss, promise.class_name)))
        text = f"{name}: {units} {of} certify {100 * result.smallest[i]:.2f} % at best"
        if needed is None:
            text += f", but the next setting loses more than {100 * promise.limit:g} %, however many {of} there are"
        elif needed > units:
            more = math.ceil((needed - units) / share)
            text += f"; the next setting needs about {more} more {of} for {100 * promise.limit:g} %"
        if result.failed is not None and (bound := result.evidence[result.failed][i].upper_bound) > promise.limit:
            text += f"; its upper bound is {100 * bound:.2f} %"
        lines.append(text)
    return tuple(lines)


def _certificate(
    engine: Engine,
    images: CertificateImages,
    request: Request,
    policy: Policy,
    evidence: tuple[Evidence, ...],
    exits: npt.NDArray[np.int64],
    test: Sample,
    attempt: Attempt,
) -> Certificate:
    manifest = _manifest(engine)
    earlier = (dataclasses.replace(one, result="") for one in manifest.attempts if one.images == attempt.images)
    attempts = len({attempt, *earlier})
    warnings = images.warnings
    if attempts > 1:
        together = 100 * max(0.0, 1 - attempts * (1 - request.certainty))
        warning = f"search {attempts} on the same images: all of them are right with {together:g} % certainty only"
        warnings += (f"{warning}; use new images",)
    rows = _one_of_each_group(test)
    return Certificate(
        evidence,
        request.certainty,
        request.reference_name,
        images=len(images.test),
        images_sha256=digest_of(images.test),
        engine_sha256=engine_digest(manifest),
        policy_sha256=policy_digest(policy),
        preprocess_sha256=preprocess_digest(manifest),
        reference_sha256=request.reference.digest if request.reference else "",
        path_images=len(images.path),
        group=images.group,
        groups=0 if test.groups is None else len(np.unique(test.groups)),
        attempts=attempts,
        exit_counts=tuple(np.bincount(exits[rows], minlength=len(engine.metadata.exits)).tolist()),
        confidences=drift.kept(_first_confidence(policy, test.logits[:, rows])),
        warnings=warnings,
    )


def _one_of_each_group(sample: Sample) -> npt.NDArray[np.int64]:
    """Return the indices of one image of each group, so that they are independent; of all without groups."""
    if sample.groups is None:
        return np.arange(len(sample))
    order = np.random.default_rng(0).permutation(len(sample))
    return np.asarray(order[np.unique(sample.groups[order], return_index=True)[1]])


def _first_confidence(policy: Policy, logits: Array) -> Array:
    """Return the confidence (N,) at the first exit."""
    return decide(policy, 0, logits[0], np.zeros_like(logits[0])).confidence
