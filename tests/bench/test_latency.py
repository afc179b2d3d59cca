from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from edgekd.bench.latency import TURN, summarise, time_interleaved, time_queries, variation


def test_summary_by_hand() -> None:
    s = summarise([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]])
    assert (s.n, s.mean, s.p50, s.p90, s.p99) == (11, 6.0, 6.0, 10.0, None)
    assert s.cv == pytest.approx(np.sqrt(10) / 6)


def test_p99_from_a_thousand_samples() -> None:
    assert summarise([range(1, 1000)]).p99 is None
    assert summarise([range(1, 1001)]).p99 == pytest.approx(990.01)


def test_interval_holds_the_mean_and_is_reproducible() -> None:
    samples = np.random.default_rng(1).gamma(4, size=500).tolist()
    s = summarise([samples])
    assert s.mean_interval[0] < s.mean < s.mean_interval[1]
    assert s.p50_interval[0] <= s.p50 <= s.p50_interval[1]
    # 1.96 standard errors, as theory has it
    assert s.mean_interval[1] - s.mean_interval[0] == pytest.approx(2 * 1.96 * 2 / np.sqrt(500), rel=0.2)
    assert summarise([samples]) == s


def test_equal_samples_have_no_spread() -> None:
    s = summarise([[2.0] * 10])
    assert (s.mean_interval, s.p50_interval, s.cv) == ((2.0, 2.0), (2.0, 2.0), 0.0)


def test_processes_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(10, 0.1, 200).tolist(), rng.normal(12, 0.1, 200).tolist()
    apart, mixed = summarise([a, b]), summarise([a[::2] + b[::2], a[1::2] + b[1::2]])
    assert apart.mean_interval[1] - apart.mean_interval[0] > 5 * (mixed.mean_interval[1] - mixed.mean_interval[0])


def test_variation_is_around_each_exit() -> None:
    values, exits = np.array([1.0, 1.0, 9.0, 9.0]), np.array([0, 0, 3, 3])
    assert variation(values, exits) == 0
    assert variation(values, np.zeros(4, int)) == pytest.approx(0.8)
    assert summarise([[1.0, 9.0], [1.0, 9.0]], exits=[[0, 3], [0, 3]]).cv == 0


def test_rotation_asks_in_turn_until_time_and_count_are_reached() -> None:
    seen: list[float] = []

    def query(x: np.ndarray) -> int:
        seen.append(float(x[0]))
        return len(seen)

    queries = [np.array([i], np.float32) for i in range(3)]
    samples, returned = time_queries(query, queries, seconds=0, count=7)
    assert seen == [0, 1, 2, 0, 1, 2, 0]
    assert returned == list(range(1, 8))
    assert len(samples) == 7
    assert min(samples) > 0
    many, _ = time_queries(query, queries, seconds=0.05, count=1)
    assert sum(many) <= 0.06 * 1000
    assert len(many) > 7


def test_turns_give_every_way_the_same_queries() -> None:
    asked: list[list[int]] = [[], []]
    ways = [lambda x, own=own: own.append(int(x[0])) or 0 for own in asked]  # type: ignore[func-returns-value]
    queries = [np.array([i]) for i in range(7)]
    samples = time_interleaved(ways, queries, seconds=0)
    assert [len(own) for own in samples] == [TURN, TURN]
    assert asked[0] == asked[1] == [i % 7 for i in range(TURN)]
    samples = time_interleaved(ways, queries, seconds=0.01)
    assert len(samples[0]) == len(samples[1]) > TURN
    assert asked[0][TURN : 3 * TURN] == [i % 7 for i in range(2 * TURN)]


def test_memory_grows_with_what_is_held() -> None:
    """In a fresh process: one that has freed memory before would take that again."""
    code = (
        "import numpy as np; from edgekd.bench.memory import peak_mib, resident_mib\n"
        "before = resident_mib(); held = np.ones(64 * 2**17)\n"  # 64 MiB, touched
        "assert resident_mib() - before > 60; assert peak_mib() >= resident_mib() - 1; assert held[0] == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
