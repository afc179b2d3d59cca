"""The classifier on real engines: the cascade answers what `simulate` says, whatever is batched with what."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edgekd.artifacts.manifest import EngineFile, Manifest
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import find_backend
from edgekd.backends.runner import StagedRunner
from edgekd.backends.staged import host_staged_runner
from edgekd.errors import ConfigError, DataError
from edgekd.host import host_info
from edgekd.policy import NEVER_EXIT, Average, Policy, ensemble, simulate, softmax
from edgekd.runtime.classifier import Classifier, next_batch
from edgekd.runtime.engine import Engine, open_engine
from edgekd.types import Array


@pytest.fixture(scope="module")
def engine(student_onnx: Path) -> Engine:
    return open_engine(student_onnx, threads=1)


@pytest.fixture(scope="module")
def images() -> Array:
    return np.random.default_rng(1).normal(size=(24, 3, 32, 32)).astype(np.float32)


def splitting(engine: Engine, images: Array, average: Average = "mean") -> Policy:
    """A policy that lets about a third of those who come leave at each exit, with room around the thresholds."""
    temperatures, thresholds = (1.5, 1.0, 0.8, 1.0), [NEVER_EXIT] * 3
    logits = engine.logits(images)
    left = np.ones(len(images), bool)
    for exit in range(3):
        sure = simulate(
            logits[: exit + 1], Policy(temperatures[: exit + 1], (NEVER_EXIT,) * exit, average=average)
        ).confidence
        ranked = np.sort(sure[left])
        middle = np.arange(len(ranked) // 2, len(ranked) * 5 // 6)
        widest = middle[np.diff(ranked)[middle].argmax()]
        thresholds[exit] = float(ranked[widest : widest + 2].mean())
        left &= sure < thresholds[exit]
    return Policy(temperatures, tuple(thresholds), average=average)


@pytest.mark.parametrize("few_classes", [4, 5])  # with 5, one image is decided on in plain floats
@pytest.mark.parametrize("average", ["own", "mean"])
def test_the_cascade_equals_a_simulation_alone_and_in_batches(
    engine: Engine, images: Array, average: Average, few_classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekd.runtime.classifier.FEW_CLASSES", few_classes)
    policy = splitting(engine, images, average)
    expected = simulate(engine.logits(images), policy)
    assert set(expected.exits.tolist()) == {0, 1, 2, 3}
    classifier = Classifier(engine, policy=policy)
    together = classifier.run(images)
    assert together.exits.tolist() == expected.exits.tolist()
    assert together.probabilities == pytest.approx(expected.probabilities, abs=1e-5)
    assert together.confidence == pytest.approx(expected.confidence, abs=1e-5)
    alone = [classifier.run(images[i : i + 1]) for i in range(len(images))]
    assert [int(one.exits[0]) for one in alone] == expected.exits.tolist()
    assert np.concatenate([one.probabilities for one in alone]) == pytest.approx(expected.probabilities, abs=1e-5)


def test_compaction_covers_all_boundary_tensors(two_maps_onnx: Path) -> None:
    engine = open_engine(two_maps_onnx, threads=1)
    images = np.random.default_rng(3).normal(size=(12, 3, 16, 16)).astype(np.float32)
    logits = engine.logits(images)
    policy = Policy((1.0, 1.0), (float(np.median(softmax(logits[0]).max(axis=1))),))
    expected = simulate(logits, policy)
    assert np.bincount(expected.exits).tolist() == [6, 6]
    found = Classifier(engine, policy=policy).run(images)
    assert found.exits.tolist() == expected.exits.tolist()
    assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-5)


def test_full_and_final(engine: Engine, images: Array) -> None:
    logits = engine.logits(images)
    policy = Policy((2.0,) * 4)
    full = Classifier(engine, strategy="full", policy=policy).run(images)
    assert full.probabilities == pytest.approx(ensemble(logits), abs=1e-5)  # temperature 1 whatever the policy's
    assert full.confidence == pytest.approx(full.probabilities.max(axis=1))
    final = Classifier(engine, strategy="final", policy=policy).run(images)
    assert final.probabilities == pytest.approx(softmax(logits[3], 2.0), abs=1e-5)
    assert set(full.exits.tolist()) == set(final.exits.tolist()) == {3}
    never = Classifier(engine, policy=Policy((1.0,) * 4, (NEVER_EXIT,) * 3, average="mean")).run(images)
    assert never.probabilities == pytest.approx(full.probabilities, abs=1e-5)


@pytest.mark.parametrize(
    ("remaining", "current", "stage_ms", "expected"),
    [
        (8, 8, {1: 1.0, 8: 2.0}, 8),
        (3, 8, {1: 1.0, 8: 8.0}, 3),  # 3 ms against 8
        (5, 8, {1: 2.0, 4: 2.0, 8: 2.0}, 8),  # the smaller batch is no faster
        (4, 8, {1: 1.0, 4: 9.0, 8: 8.0}, 8),  # the smaller batch is slower
        (6, 8, {1: 1.0, 4: 9.0, 8: 8.0}, 8),  # 8.5 by interpolation
        (2, 8, {1: 1.0, 4: 9.0, 8: 8.0}, 2),  # 3.67 by interpolation
        (12, 8, {1: 1.0, 8: 2.0}, 8),  # padding would make it larger than it is
        (3, 8, {}, 3),
    ],
)
def test_next_batch_by_hand(remaining: int, current: int, stage_ms: Mapping[int, float], expected: int) -> None:
    assert next_batch(remaining, current, stage_ms) == expected


class Recorder(Engine):
    """An engine that notes which batches its graphs get. Stages pass their input on; logits are looked up by the first
    pixel, in which the image's number is."""

    def __init__(self, engine: Engine, logits: Array, *, backend: str, stage_ms: dict[str, tuple[float, ...]]) -> None:
        recipe = Recipe("fp32")
        files = {"monolithic.onnx": EngineFile("monolithic", "", 0)}
        manifest = Manifest(engine.metadata, backend, "", recipe, {}, host_info(), files, "", stage_ms=stage_ms)
        load = functools.partial(Recorded, self)
        super().__init__(
            engine.metadata, load, backend=find_backend(backend), recipe=recipe, threads=1, manifest=manifest
        )
        self._logits, self.sizes = logits, list[int]()

    def staged_runner(self, exits: int | None = None) -> StagedRunner:
        return host_staged_runner([self.stage(k) for k in range(exits or len(self.metadata.exits))])

    def record(self, x: npt.NDArray[Any]) -> Array:
        self.sizes.append(len(x))
        return self._logits[:, x[:, 0, 0, 0].astype(int)]


class Recorded:
    """One graph of a `Recorder`."""

    row_shapes = ((3, 32, 32), (5,))

    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder, self._name = recorder, name

    def __call__(self, *xs: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        logits = self._recorder.record(xs[0])
        return list(logits) if self._name == "monolithic" else [logits[int(self._name[-1])], *xs]


def numbered(count: int) -> Array:
    images = np.zeros((count, 3, 32, 32), np.float32)
    images[:, 0, 0, 0] = np.arange(count)
    return images


LINEAR = {str(size): (float(size),) * 4 for size in (1, 4, 16)}
FLAT = {str(size): (1.0,) * 4 for size in (1, 4, 16)}


@pytest.mark.parametrize(
    ("backend", "stage_ms", "sizes"),
    [
        ("onnxruntime", LINEAR, [11, 7, 4, 2]),  # only those who stay
        ("onnxruntime", FLAT, [11, 11, 11, 11]),  # removing gains nothing
        ("onnxruntime", {}, [11, 7, 4, 2]),
        ("openvino", LINEAR, [16, 16, 4, 4]),  # only sizes that were timed
        ("openvino", FLAT, [16, 16, 16, 16]),
    ],
)
def test_batches_are_compacted_when_that_is_faster(
    engine: Engine, backend: str, stage_ms: dict[str, tuple[float, ...]], sizes: list[int]
) -> None:
    leaves = np.array([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 0])  # 4, 3, 2 and 2 images
    logits = np.random.default_rng(2).normal(size=(4, 11, 5)).astype(np.float32) * 0.1
    for i, exit in enumerate(leaves):
        logits[exit:, i, i % 5] += 5
    policy = Policy((1.0,) * 4, (0.5,) * 3)
    recorder = Recorder(engine, logits, backend=backend, stage_ms=stage_ms)
    found = Classifier(recorder, policy=policy).run(numbered(11))
    assert recorder.sizes == sizes
    assert found.exits.tolist() == leaves.tolist()
    assert found.probabilities == pytest.approx(simulate(logits, policy).probabilities, abs=1e-6)


def test_large_batches_are_split_and_padded(engine: Engine) -> None:
    logits = np.random.default_rng(2).normal(size=(4, 50, 5)).astype(np.float32)
    recorder = Recorder(engine, logits, backend="openvino", stage_ms=LINEAR)
    found = Classifier(recorder, strategy="full").run(numbered(50))
    assert recorder.sizes == [16, 16, 16, 4]  # 50 = 3 x 16 + 2
    assert found.probabilities == pytest.approx(ensemble(logits), abs=1e-6)


def test_no_images(engine: Engine) -> None:
    nothing = Classifier(engine).run(np.empty((0, 3, 32, 32), np.float32))
    assert nothing.probabilities.shape == (0, 5)
    assert Classifier(engine).predict([]) == []


def test_predict_takes_files_pictures_and_arrays(engine: Engine, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    path = tmp_path / "cell.png"
    Image.fromarray(pixels).save(path)
    classifier = Classifier(engine)
    one = classifier.predict(path)
    assert one.label == classifier.metadata.classes[one.index]
    assert one.confidence == max(one.probabilities) == one.probabilities[one.index]
    assert sum(one.probabilities) == pytest.approx(1)
    assert one.exit == 3
    assert classifier.predict(str(path)) == classifier.predict(Image.fromarray(pixels)) == one
    several = classifier.predict([path, pixels[:20], pixels] * 11)  # 33 are more than one batch
    assert len(several) == 33
    assert several[32].probabilities == pytest.approx(one.probabilities, abs=1e-5)
    assert several[1].probabilities != pytest.approx(one.probabilities, abs=1e-5)
    with pytest.raises(DataError, match="gone"):
        classifier.predict([path, tmp_path / "gone.png"])


def test_threads_may_share_a_classifier(engine: Engine, images: Array) -> None:
    classifier = Classifier(engine, policy=splitting(engine, images))
    parts = [images[i % 20 : i % 20 + 1 + i % 3] for i in range(24)]
    expected = [classifier.run(part) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(classifier.run, parts))
    for a, b in zip(expected, found):
        assert a.exits.tolist() == b.exits.tolist()
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-6)


def test_the_default_strategy(engine: Engine, images: Array, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert Classifier(engine).strategy == "full"
    assert caplog.text.count("edgekd tune") == 1
    assert Classifier(engine, policy=splitting(engine, images)).strategy == "cascade"


def test_a_path_is_opened(student_onnx: Path, images: Array) -> None:
    classifier = Classifier(str(student_onnx), threads=1)
    assert classifier.engine.threads == 1
    assert len(classifier.run(images[:3]).exits) == 3


def test_invalid_arguments_are_errors(engine: Engine, images: Array) -> None:
    with pytest.raises(ConfigError, match="run edgekd tune"):
        Classifier(engine, strategy="cascade")
    with pytest.raises(ConfigError, match=r"(?s)no strategy 'fulll'.*Did you mean 'full'"):
        Classifier(engine, strategy="fulll")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"the policy has 2 exits, .* has 4"):
        Classifier(engine, policy=Policy((1.0, 1.0)))
    with pytest.raises(ConfigError, match="already open"):
        Classifier(engine, threads=2)
    for bad in (images[0], images[:, :, :16], images.astype(np.float64)):
        with pytest.raises(DataError, match="is not a batch"):
            Classifier(engine).run(bad)
