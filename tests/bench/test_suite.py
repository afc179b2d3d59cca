"""The whole bench on a real small network, and what happens when a worker fails or its parent dies."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.processes import heed_ctrl_c
from PIL import Image

from edgekd import config
from edgekd.artifacts.metadata import put_metadata, read_onnx
from edgekd.bench import variants
from edgekd.bench.measure import bench, expected_seconds, run_worker
from edgekd.bench.record import Record, read_record, write_record
from edgekd.bench.suite import Limits, Suite
from edgekd.bench.tables import markdown
from edgekd.bench.worker import WorkerTask, batched, choose
from edgekd.data.split import Item, Split
from edgekd.errors import BackendError, ConfigError
from edgekd.runtime.engine import open_engine
from edgekd.serialization import to_json

TINY = Suite(batch_sizes=(1, 4), min_count=(5, 2), min_seconds=0.0, warmup_seconds=0.0, rounds=1, pool=9, threads=1,
             variants=("cascade", "no-early-exit", "full"))  # fmt: skip


@pytest.fixture(scope="module")
def tuned(student_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student with thresholds at the medians of its confidences, so that images leave everywhere."""
    path = tmp_path_factory.mktemp("tuned") / "student.onnx"
    model, metadata = read_onnx(student_onnx)
    images = np.random.default_rng(5).normal(size=(12, 3, 32, 32)).astype(np.float32)
    logits = open_engine(student_onnx, threads=1).logits(images)
    sure = variants.softmax(logits).max(axis=-1)
    policy = dataclasses.replace(metadata.policy, thresholds=tuple(np.median(sure[:3], axis=1).tolist()))
    put_metadata(model, dataclasses.replace(metadata, policy=policy))
    onnx.save(model, str(path))
    return path


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Split]:
    """Eleven pictures of five classes, all for testing."""
    data, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    items = [Item(f"{'abcde'[i % 5]}/{i:02}.png", i % 5) for i in range(11)]
    for item in items:
        (data / item.path).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(data / item.path)
    return data, Split(tuple("abcde"), {"test": tuple(items)}, "ratio:3,1,1", 0, "none", 11, 0, "abc")


@pytest.fixture(scope="module")
def measured(tuned: Path, split: tuple[Path, Split]) -> tuple[Record, list[tuple[int, int]]]:
    ticks: list[tuple[int, int]] = []
    estimates: list[float] = []
    record = bench(
        tuned,
        suite=TINY,
        data=split[0],
        split=split[1],
        against={"plain": tuned},
        command="edgekd bench x",
        progress=lambda done, total: ticks.append((done, total)),
        on_estimate=estimates.append,
    )
    assert len(estimates) == 1
    assert estimates[0] > 0
    return record, ticks


def test_the_estimated_time_by_hand() -> None:
    """Two rounds of a process that takes 3 s besides measuring, 0.1 s a query and 0.5 s a batch of 4."""
    suite = dataclasses.replace(TINY, min_count=(5, 4), min_seconds=1.0, warmup_seconds=0.25, rounds=2)
    once = 3 + (0.25 + 1.0) + (0.25 + 4 * 0.5)
    accuracy = (900 + 100) * 0.1
    assert expected_seconds(suite, 3.0, [0.1, 0.5], count=900, interleaved=False) == pytest.approx(2 * once + accuracy)
    with_pair = 2 * (once + 0.25 + 2 * 1.0) + accuracy
    assert expected_seconds(suite, 3.0, [0.1, 0.5], count=900, interleaved=True) == pytest.approx(with_pair)


def test_every_variant_is_measured(measured: tuple[Record, list[tuple[int, int]]], tmp_path: Path) -> None:
    record, ticks = measured
    assert ticks == [(i, 4) for i in (1, 2, 3, 4)]
    assert [v.name for v in record.variants] == ["cascade", "no-early-exit", "full", "plain"]
    for v in record.variants:
        assert [len(t.samples_ms[0]) >= n for t, n in zip(v.timings, TINY.min_count)] == [True, True]
        assert v.metrics.n == len(v.predictions) == len(v.exits) == 11
        assert v.memory_mib > 1
        assert v.load_ms[0] > v.first_ms[0] > 0
        assert [len(pair) for pair in v.interleaved_ms] == ([2] if v.name == "no-early-exit" else [])
    assert len(record.preprocess_ms) == 11
    assert {t.name.split()[0] for t in record.targets} >= {"cascade", "Python"}
    write_record(tmp_path / "record.json", record)
    assert read_record(tmp_path / "record.json") == record
    assert "| plain (" in markdown(record)


def test_bench_counts_what_the_engine_answers(
    measured: tuple[Record, list[tuple[int, int]]], tuned: Path, split: tuple[Path, Split]
) -> None:
    record, engine = measured[0], open_engine(tuned, threads=1)
    images = variants_input(split)
    for kind, name in (("cascade", "cascade"), ("full", "full"), ("final", "plain")):
        answer = variants.make_predictor(engine, kind)
        decisions = [answer(images[i : i + 1]) for i in range(len(images))]
        found = record.find(name)
        assert found is not None
        assert found.exits == tuple(int(d.exits[0]) for d in decisions)
        assert found.predictions == tuple(int(d.probabilities[0].argmax()) for d in decisions)
    cascade = record.find("cascade")
    assert cascade is not None
    assert len(set(cascade.exits)) > 1


def variants_input(split: tuple[Path, Split]) -> np.ndarray:
    from edgekd.data.images import load_subset
    from edgekd.data.preprocess import Preprocess

    return load_subset(split[1], "test", data=split[0], preprocess=Preprocess(32))[0]


def test_variants_graphs_and_predictions(tuned: Path, student_onnx: Path) -> None:
    engine = open_engine(tuned, threads=1)
    every = variants.variant_names(engine.metadata, ("exits", "cascade", "no-early-exit", "full", "final"))
    assert every == ["exit_0", "exit_1", "exit_2", "exit_3", "cascade", "no-early-exit", "full", "final"]
    assert "cascade" not in variants.variant_names(open_engine(student_onnx).metadata, ("exits", "cascade"))
    assert variants.graph_names("exit_1", 4) == {"stage_0", "stage_1"}
    assert variants.graph_names("cascade", 4) == {"stage_0", "stage_1", "stage_2", "stage_3"}
    assert variants.graph_names("final", 4) == {"final"}
    assert variants.graph_names("final", 1) == {"monolithic"}
    images = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    logits = engine.logits(images)
    for k in range(4):
        decision = variants.make_predictor(engine, f"exit_{k}")(images)
        assert decision.exits.tolist() == [k] * 3
        np.testing.assert_allclose(decision.probabilities, variants.softmax(logits[k]), atol=1e-5)
    assert variants.make_predictor(engine, "no-early-exit")(images).exits.tolist() == [3] * 3
    for name in every:
        assert 0 < variants.overhead_ms(engine, name, [images[:1]] * 3) < 50


def test_pool_and_batches() -> None:
    images = np.arange(10, dtype=np.float32)[:, None]
    assert sorted(choose(images, 99, seed=1)[:, 0]) == list(range(10))
    assert not np.array_equal(choose(images, 10, seed=1), choose(images, 10, seed=2))
    assert [len(b) for b in batched(images, 4)] == [4, 4]
    assert [b[:, 0].tolist() for b in batched(images[:3], 5)] == [[0, 1, 2, 0, 1]]


def test_refusals(tuned: Path, split: tuple[Path, Split]) -> None:
    data, one = split
    with pytest.raises(ConfigError, match="'full' is already a row"):
        bench(tuned, suite=TINY, data=data, split=one, against={"full": tuned})
    limited = dataclasses.replace(TINY, targets=Limits(faster={"plain": 6.0}))
    with pytest.raises(ConfigError, match=r"targets\.faster\.plain: no model has this name"):
        bench(tuned, suite=limited, data=data, split=one)
    other = dataclasses.replace(one, classes=tuple("vwxyz"))
    with pytest.raises(ConfigError, match="a, b, c, d, e; the split has v, w, x, y, z"):
        bench(tuned, suite=TINY, data=data, split=other)


@pytest.mark.parametrize("name", ["quick", "full"])
def test_shipped_suites(name: str) -> None:
    suite = config.load(Suite, "benchmarks/suites", name)
    assert suite.batch_sizes == (1, 32)
    assert name == "quick" or suite.rounds * suite.min_count[0] >= 1000  # enough for p99 at batch 1


@pytest.mark.parametrize(
    ("change", "said"),
    [("batch_sizes=[2]", "the first is 1"), ("min_count=[5]", "min_count"), ("rounds=0", "rounds"),
     ("variants=['exit']", "none of"), ("roundz=1", "Did you mean 'rounds'")],
)  # fmt: skip
def test_suites_that_cannot_be(change: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config.load(Suite, "benchmarks/suites", "quick", overrides=config.parse_overrides([change]))


def task(folder: Path, engine: Path, *, seconds: float = 0.0) -> WorkerTask:
    np.save(folder / "images.npy", np.zeros((2, 3, 32, 32), np.float32))
    images = str(folder / "images.npy")
    return WorkerTask(engine=str(engine), variant="full", images=images, threads=1, batch_sizes=(1,), min_count=(2,),
                      min_seconds=seconds, warmup_seconds=0.0, pool=2, round=0, idle_watts=None)  # fmt: skip


def test_failing_worker_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"measuring full failed: no ONNX file at .*gone\.onnx .+"):  # and advice
        run_worker(task(tmp_path, tmp_path / "gone.onnx"), tmp_path / "run", name="full")


@pytest.mark.skipif(sys.platform != "linux", reason="children are found in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_die_with_their_parent(tuned: Path, tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "long.json").write_bytes(to_json(task(tmp_path, tuned, seconds=120.0)))
    code = (
        "from pathlib import Path; from edgekd.serialization import read_json\n"
        "from edgekd.bench.measure import run_worker\n"
        "from edgekd.bench.worker import WorkerTask\n"
        f"here = Path({str(tmp_path)!r})\n"
        "run_worker(read_json(here / 'long.json', WorkerTask, what='task'), here / 'run', name='long')"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, preexec_fn=heed_ctrl_c)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    child = eventually(lambda: int(children.read_text() or 0))
    parent.send_signal(how)
    parent.wait(timeout=30)
    eventually(lambda: not alive(child))


def eventually(condition, *, seconds: float = 60.0):  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
