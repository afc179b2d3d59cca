"""Calibration: the three methods against plain formulations, and a cache that cannot be stale."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.errors import BackendError, ConfigError
from edgekd.files import cache_folder
from edgekd.quantization import calibration
from edgekd.quantization.calibration import Entropy, Histogram, MinMax, Percentile, activation_ranges, divergence

IMAGES = np.random.default_rng(0).normal(size=(20, 3, 4, 4)).astype(np.float32)


def network(factor: float = 2.0) -> onnx.ModelProto:
    """images -> doubled -> answer = doubled - 1."""
    shape = ["n", 3, 4, 4]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)
    answer = helper.make_tensor_value_info("answer", TensorProto.FLOAT, shape)
    constants = [
        numpy_helper.from_array(np.array(factor, np.float32), "two"),
        numpy_helper.from_array(np.array(1, np.float32), "one"),
    ]
    nodes = [helper.make_node("Mul", ["images", "two"], ["doubled"], name="mul")]
    nodes += [helper.make_node("Sub", ["doubled", "one"], ["answer"], name="sub")]
    graph = helper.make_graph(nodes, "test", [images], [answer], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def seen(kind: type[MinMax], values: np.ndarray, *, parts: int = 7) -> float:
    collector = kind()
    for part in np.array_split(values.astype(np.float32), parts):
        collector.add(part)
    return collector.amax()


def test_inner_tensors_inputs_and_outputs_are_measured(tmp_path: Path) -> None:
    found = activation_ranges(network(), ["images", "doubled", "answer"], IMAGES, method="minmax", folder=tmp_path)
    assert found["images"] == np.abs(IMAGES).max()
    assert found["doubled"] == pytest.approx(2 * np.abs(IMAGES).max())
    assert found["answer"] == pytest.approx(np.abs(2 * IMAGES - 1).max())


def test_merged_bins_are_the_bins_of_all_values_at_once() -> None:
    values = np.random.default_rng(1).normal(size=10_000).astype(np.float32) * np.linspace(
        0.1, 9, 10_000, dtype=np.float32
    )
    found = Histogram()
    for part in np.array_split(values, 9):
        found.add(part)
    assert found.upper_edge >= found.largest == np.abs(values).max()
    expected, _ = np.histogram(np.abs(values).astype(np.float64), calibration.BINS, range=(0, found.upper_edge))
    assert found.counts.sum() == len(values)
    assert np.abs(found.counts - expected).sum() <= 4  # float32 may fall to the other side of an edge


def test_zeros_first_and_nothing_but_zeros() -> None:
    assert seen(Percentile, np.zeros(50)) == seen(Entropy, np.zeros(50)) == seen(MinMax, np.zeros(50)) == 0
    late = np.concatenate([np.zeros(5000), np.ones(5000)])
    assert seen(Percentile, late) == seen(MinMax, late) == 1


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_percentile_cuts_the_tail(scale: float) -> None:
    values = scale * np.random.default_rng(2).standard_t(3, size=1_000_000)
    expected = np.quantile(np.abs(values), 0.99999)
    assert seen(Percentile, values) == pytest.approx(expected, abs=np.abs(values).max() / 1000)
    assert seen(Percentile, values) < np.abs(values).max()


def plain_divergence(bins: np.ndarray, top: int) -> float:
    """The same by loops over bins, as in TensorRT's slides."""
    reference = bins[:top].astype(float)
    reference[-1] += bins[top:].sum()
    rounded = np.zeros(top)
    for level in range(calibration.LEVELS):
        inside = [b for b in range(top) if b * calibration.LEVELS // top == level and bins[b]]
        for b in inside:
            rounded[b] = bins[inside].sum() / len(inside)
    p, q = reference / reference.sum(), rounded / rounded.sum()
    if any(q[b] == 0 for b in range(top) if p[b]):
        return np.inf
    return sum(p[b] * np.log(p[b] / q[b]) for b in range(top) if p[b])


def test_divergence_of_clipped_and_rounded() -> None:
    rng = np.random.default_rng(3)
    bins = rng.poisson(200 * np.exp(-np.arange(512) / 60)).astype(np.float64)
    for top in (128, 160, 200, 333, 512):
        assert divergence(bins, top) == pytest.approx(plain_divergence(bins, top))


def test_entropy_clips_outliers_and_keeps_what_is_even() -> None:
    rng = np.random.default_rng(4)
    even = rng.uniform(-1, 1, size=200_000)
    assert seen(Entropy, even) > 0.9
    assert seen(Entropy, np.append(even, 30.0)) < 3


def test_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = activation_ranges(network(), ["doubled"], IMAGES, method="entropy", folder=tmp_path)
    monkeypatch.setattr(calibration, "_session", None)
    assert activation_ranges(network(), ["doubled"], IMAGES, method="entropy", folder=tmp_path) == first
    tuned = network()
    tuned.metadata_props.add(key="edgekd", value="other thresholds")
    assert activation_ranges(tuned, ["doubled"], IMAGES, method="entropy", folder=tmp_path) == first


@pytest.mark.parametrize("what", ["weights", "images", "order", "method", "tensors"])
def test_whatever_differs_is_measured_anew(what: str, tmp_path: Path) -> None:
    model, tensors, images, method = network(), ["doubled"], IMAGES, "minmax"
    activation_ranges(model, tensors, images, method=method, folder=tmp_path)
    if what == "weights":
        model = network(2.0000002)
    elif what == "images":
        images = IMAGES + np.float32(1e-7)
    elif what == "order":
        images = IMAGES[::-1]
    elif what == "method":
        method = "percentile"
    else:
        tensors = ["doubled", "answer"]
    activation_ranges(model, tensors, images, method=method, folder=tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 2


@pytest.mark.parametrize("damage", ["cut", "other key", "no numbers"])
def test_a_damaged_or_foreign_file_is_not_used(damage: str, tmp_path: Path) -> None:
    first = activation_ranges(network(), ["doubled"], IMAGES, method="minmax", folder=tmp_path)
    (file,) = tmp_path.glob("*.json")
    kept = json.loads(file.read_text())
    if damage == "cut":
        file.write_text(file.read_text()[:40])
    elif damage == "other key":
        file.write_text(json.dumps({**kept, "key": "0" * 64, "ranges": {"doubled": 1.0}}))
    else:
        file.write_text(json.dumps({**kept, "ranges": {"doubled": None}}))
    assert activation_ranges(network(), ["doubled"], IMAGES, method="minmax", folder=tmp_path) == first
    assert json.loads(file.read_text()) == kept


def test_where_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    activation_ranges(network(), ["doubled"], IMAGES, method="minmax")
    assert [f.parent for f in tmp_path.rglob("*.json")] == [tmp_path / "edgekd" / "calibration"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("calibration") == Path.home() / ".cache" / "edgekd" / "calibration"


def test_where_nothing_can_be_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert activation_ranges(network(), ["doubled"], IMAGES, method="minmax", folder=tmp_path / "file" / "in it")
    assert "cannot be cached" in caplog.text


def test_without_onnxruntime_only_what_is_kept_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = activation_ranges(network(), ["doubled"], IMAGES, method="minmax", folder=tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert activation_ranges(network(), ["doubled"], IMAGES, method="minmax", folder=tmp_path) == first
    with pytest.raises(BackendError, match="not installed") as error:
        activation_ranges(network(), ["answer"], IMAGES, method="minmax", folder=tmp_path)
    assert "pip install onnxruntime" in error.value.fix


def test_refuses_what_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no calibration images"):
        activation_ranges(network(), ["doubled"], IMAGES[:0], method="minmax", folder=tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'entropy'"):
        activation_ranges(network(), ["doubled"], IMAGES, method="entrpy", folder=tmp_path)
    with pytest.raises(BackendError, match="doubled is not finite"):
        activation_ranges(network(), ["doubled"], IMAGES * np.float32(8e37), method="minmax", folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    activation_ranges(
        network(), ["doubled"], IMAGES, method="minmax", folder=tmp_path, progress=lambda *at: calls.append(at)
    )
    assert calls == [(8, 20), (16, 20), (20, 20)]
