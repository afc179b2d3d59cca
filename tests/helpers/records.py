"""A benchmark record to render, compare and damage."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from edgekd.artifacts.certificate import Certificate, Evidence, Promise
from edgekd.artifacts.manifest import CurvePoint
from edgekd.bench.accuracy import metrics
from edgekd.bench.record import EngineFacts, Record, SplitFacts, Timing, Variant
from edgekd.bench.suite import Limits, Suite
from edgekd.bench.targets import targets, warnings
from edgekd.host import HostInfo
from edgekd.policy import Policy

CLASSES = ("round <b>", "long | thin", "[ 1, 2 ]")


LABELS = np.array([0, 0, 1, 1, 2, 2, 0, 1])


LIMITS = Limits(faster={"plain": 6.0}, accuracy_drop=0.5, staged=1.1, overhead_ms=0.2)
SUITE = Suite((1, 32), min_count=(40, 5), min_seconds=0.1, warmup_seconds=0.0, rounds=2, pool=8, targets=LIMITS)


HOST = HostInfo(
    system="Linux",
    release="6",
    machine="x86_64",
    cpu="CPU 9000",
    cores=2,
    exact_int8=True,
    memory_mib=8000,
    governor="unreadable",
    max_mhz="unreadable",
    python="3.11.7",
    versions={"numpy": "2.0"},
    backends={"openvino": {"version": "2026.4"}},
)


CERTIFICATE = Certificate(
    evidence=(Evidence(Promise("change", 0.01), "change", "binomial", "image", 500, 1.0, 0.0078, 0.04),),
    certainty=0.9,
    reference="without early exit",
    images=500,
    images_sha256="a" * 64,
    engine_sha256="b" * 64,
    policy_sha256="c" * 64,
    preprocess_sha256="d" * 64,
)


def variant(name: str, ms: float, exits: list[int], *, wrong: int = 0, baseline: bool = False) -> Variant:
    """Latencies around `ms` for each exit deeper, in two rounds; the first `wrong` images are answered wrongly."""
    rng = np.random.default_rng(len(name))
    answers = np.where(np.arange(8) < wrong, (LABELS + 1) % 3, LABELS)
    order = [np.resize(exits, 40).tolist(), np.resize(exits[::-1], 40).tolist()]
    samples = [tuple((ms * (1 + e) + rng.normal(0, 0.01, 40) * ms).round(4).tolist()) for e in np.array(order)]
    return Variant(
        name=name,
        network="resnet18" if baseline else "multi-exit-resnet18",
        engine="onnxruntime fp32" if baseline else "openvino int8",
        baseline=baseline,
        timings=(
            Timing(1, tuple(samples), tuple(tuple(o) for o in order)),
            Timing(32, tuple(tuple(round(20 * s, 4) for s in r[:5]) for r in samples)),
        ),
        metrics=metrics(np.eye(3)[answers] * 0.7 + 0.1, LABELS, CLASSES),
        predictions=tuple(answers.tolist()),
        exits=tuple(exits),
        load_ms=(30.0, 32.0),
        first_ms=(5.0, 5.5),
        before_mib=(60.0, 61.0),
        peak_mib=(90.0, 95.5),
        overhead_ms=0.08,
        size_mib=12.25,
        interleaved_ms=(((2.0, 2.2), (1.9, 2.1)), ((3.3, 3.3), (3.0, 3.0))) if name == "no-early-exit" else (),
    )


@functools.cache
def sample() -> Record:
    """A small record with every kind of variant and odd class names."""
    record = Record(
        created="2026-11-21T04:00:00+00:00",
        command="edgekd bench student.engine",
        scenario="Single stream.",
        suite=SUITE,
        threads=2,
        engine=EngineFacts("student.engine", "openvino int8", "openvino", "a" * 64, {"int8": 0.9, "fp32": 0.1}),
        policy=Policy((1.0, 1.0, 1.0), (0.9, 0.8)),
        curve=(CurvePoint(0.7, 0.9), CurvePoint(0.9, 2.0)),
        split=SplitFacts("f" * 64, "ratio:3,1,1", seed=0, group="none", groups=9, leaking=2),
        classes=CLASSES,
        images=tuple(f"{'abc'[c]}/00{i}.png" for i, c in enumerate(LABELS)),
        labels=tuple(LABELS.tolist()),
        host=HOST,
        load_before=(0.1, 0.2, 0.3),
        load_after=(1.0, 0.5, 0.3),
        idle_watts=None,
        preprocess_ms=(1.0, 1.1, 1.2),
        variants=(
            variant("exit_0", 1.0, [0] * 8, wrong=3),
            variant("cascade", 1.0, [0, 0, 0, 0, 1, 1, 2, 2], wrong=1),
            variant("no-early-exit", 1.05, [2] * 8, wrong=1),
            variant("full", 1.0, [2] * 8, wrong=1),
            variant("plain", 12.0, [0] * 8, wrong=2, baseline=True),
        ),
    )
    return dataclasses.replace(record, targets=targets(record), warnings=warnings(record))
