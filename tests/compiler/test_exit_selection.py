"""Exits that do not pay are cut out of an engine while it is tuned; times are given, so no test depends on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekd.artifacts.manifest import NETWORK_FILE, read_manifest
from edgekd.artifacts.metadata import read_student
from edgekd.backends.base import load_recipe
from edgekd.compiler import exit_selection
from edgekd.compiler.build import compile_engine
from edgekd.compiler.exit_selection import Times, tune_exits, worthwhile_exits
from edgekd.compiler.gain import Gain, Ratio, measure_gain
from edgekd.errors import ConfigError
from edgekd.policy import NEVER_EXIT, Policy
from edgekd.runtime.engine import Engine, open_engine
from edgekd.runtime.tuning import PathPoint
from edgekd.testing.students import small_student
from edgekd.types import Array

IMAGES = np.random.default_rng(3).normal(size=(40, 3, 16, 16)).astype(np.float32)
STAGES = {1: (1.0, 1.0, 1.0), 32: (32.0, 32.0, 32.0)}


def gain(one: float, batch: float = 0.5, *, plain: float = 2.0, width: float = 0.0) -> Gain:
    """A gain with these ratios at batch sizes 1 and 32; an image takes the plain network `plain` ms."""
    ratios = {1: one, 32: batch}
    return Gain({n: Ratio(n * plain * r, n * plain, r, r - width / 2, r + width / 2) for n, r in ratios.items()})


def logits(*sure: int) -> Array:
    """Logits (3, 10, 2) with more than 0.9 for the first `sure[k]` images at exit k, and for all at the last."""
    made = np.zeros((3, 10, 2), np.float32)
    for k, count in enumerate((*sure, 10)):
        made[k, :count, 0] = 5.0
    return made


USED = 0.5, 0.999
"""Thresholds with which every exit of the small student is taken."""
POLICY = Policy((1.0,) * 3, (0.9, 0.9))


def test_times_of_merged_stages() -> None:
    """Three stages of 1 ms and a plain network of 2 ms: each of the two early exits costs 0.5 ms."""
    times = Times(STAGES, gain(0.5))
    assert times.merged((0, 1, 2))[1] == (1.0, 1.0, 1.0)
    assert times.merged((0, 2))[1] == (1.0, 1.5)
    assert times.merged((1, 2))[1] == (1.5, 1.0)
    assert times.merged((2,)) == {1: (2.0,), 32: (64.0,)}
    # 6 of 10 leave at exit 0, 2 at exit 1: 1 + 0.4 * 1 + 0.2 * 1 ms; without exit 1: 1 + 0.4 * 1.5
    for size in (1, 32):
        assert times.expected_ms(logits(6, 8), POLICY, (0, 1, 2), size=size) == pytest.approx(1.6 * size)
        assert times.expected_ms(logits(6, 8), POLICY, (0, 2), size=size) == pytest.approx(1.6 * size)


@pytest.mark.parametrize(
    ("sure", "measured", "kept"),
    [
        ((6, 6), gain(0.8), (0, 2)),  # nobody leaves at exit 1
        ((0, 9), gain(0.8), (1, 2)),  # nor here at exit 0
        ((6, 9), gain(0.75), (0, 1, 2)),  # 1 + .4 + .1 = 1.5 with both, 1.6 without exit 1, 1.6 without exit 0
        ((6, 9), gain(1.1), (2,)),  # measured to be slower than estimated, so 1.17 with one exit fewer
        ((6, 6), gain(1.1), (0, 2)),  # 1.1 * 1.6 / 1.8 = 0.98 without exit 1: to be built and measured
        ((6, 6), gain(1.2), (2,)),
        ((6, 9), gain(0.75, 1.25), (2,)),  # faster alone, but not in batches
    ],
)
def test_the_exits_that_are_worthwhile(sure: tuple[int, int], measured: Gain, kept: tuple[int, ...]) -> None:
    assert worthwhile_exits(STAGES, logits(*sure), POLICY, measured) == kept


def test_when_a_gain_pays() -> None:
    assert gain(0.9, 1.0, width=0.04).pays
    assert not gain(0.99, 1.0, width=0.04).pays  # perhaps no faster
    assert not gain(0.5, 1.05, width=0.04).pays
    assert gain(0.9, 0.5, width=0.04).is_clear
    assert not gain(0.9, 0.5, width=0.4).is_clear


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    student = read_student(small_student(tmp_path / "student.onnx"))
    settings = load_recipe("fp32", {"batch_sizes": [1], "graphs": "all"})
    compile_engine(student, tmp_path / "e", recipe=settings, backend="onnxruntime", validation=None)
    return tmp_path / "e"


def search(thresholds: dict[int, tuple[float, ...]]) -> Callable[[Array, tuple[float, ...]], PathPoint]:
    """A search that finds these thresholds by the number of exits, and no others."""

    def find(recorded: Array, stages: tuple[float, ...]) -> PathPoint:
        assert len(recorded) == len(stages)
        if len(stages) not in thresholds:
            raise ConfigError("too much is lost", fix="allow more")
        return PathPoint(Policy((1.0,) * len(stages), thresholds[len(stages)]), sum(stages), 0.0, ())

    return find


def measured(monkeypatch: pytest.MonkeyPatch, *gains: Gain) -> None:
    results = iter(gains)
    monkeypatch.setattr(exit_selection, "measure_gain", lambda *_: next(results))


def test_exits_are_cut_out_until_the_others_pay(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 1 is never taken; then the engine pays."""
    measured(monkeypatch, gain(0.9), gain(0.1))
    before = open_engine(engine).logits(IMAGES)
    found = tune_exits(engine, search({3: (0.3, NEVER_EXIT), 2: (0.3,)}), IMAGES)
    assert found.tuned.policy.thresholds == (0.3,)
    assert len(read_manifest(engine).metadata.exits) == 2
    assert found.engine.manifest == read_manifest(engine)
    np.testing.assert_allclose(found.logits, before[[0, 2]], atol=1e-4)
    cut, again, result = found.messages
    assert again.startswith("compile again")
    assert cut.startswith("exit_1 does not pay and is cut out: none of 40 images leave there")
    assert "ratio 0.10" in result


def test_an_engine_that_never_pays_becomes_the_plain_network(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, gain(1.3), gain(1.2))
    found = tune_exits(engine, search({3: (0.3, 0.3), 2: (0.3,), 1: ()}), IMAGES)
    assert read_manifest(engine).metadata.outputs == ["exit_0"]
    assert found.gain is None
    assert found.messages[-1] == "the engine is the plain network, without early exit"
    assert any("no faster than the plain network" in line for line in found.messages)


@pytest.mark.parametrize(
    ("reason", "said"),
    [("request", ""), ("goal", "too much is lost"), ("busy", "too busy to tell"), ("old", NETWORK_FILE)],
)
def test_exits_that_stay(engine: Path, monkeypatch: pytest.MonkeyPatch, reason: str, said: str) -> None:
    measured(monkeypatch, gain(1.3, width=0.9 if reason == "busy" else 0.0))
    if reason == "old":
        (engine / NETWORK_FILE).unlink()
    before = {path.name: path.read_bytes() for path in engine.iterdir()}
    goals = {3: USED} if reason == "goal" else {3: USED, 2: (0.5,), 1: ()}
    found = tune_exits(engine, search(goals), IMAGES, keep_exits=reason == "request")
    assert {path.name: path.read_bytes() for path in engine.iterdir()} == before
    assert said in " ".join(found.messages)
    assert bool(found.messages) == bool(said)


def test_a_gain_is_measured_on_both(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cascade runs the stages, the plain network the final graph; every batch has images of every exit's share."""
    opened: Engine = open_engine(engine)
    found = measure_gain(opened, engine, Policy((1.0,) * 3, (0.3, 0.3)), IMAGES, seconds=0.01)
    assert list(found.by_size) == [1, 32]
    assert all(0 < r.low <= r.ratio <= r.high and r.cascade_ms > 0 for r in found.by_size.values())
    assert set(opened._runners) == {"stage_0", "stage_1", "stage_2", "final"}
