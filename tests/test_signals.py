"""Signals that end a command in order."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgekd.signals import Stopped, deferred, stopping

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers() -> None:
    """CI may run tests in the background, where SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_raised_once(number: signal.Signals) -> None:
    """`timeout` sends two: the second must not break off what clears up after the first."""
    before = signal.getsignal(number)
    cleared = []

    def work() -> None:
        try:
            send(number)
        finally:
            send(number)
            cleared.append(True)

    with stopping() as stops, pytest.raises(Stopped, match=number.name) as caught:
        work()
    assert cleared
    assert (stops.by, caught.value.code) == (number, 128 + number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", SIGNALS)
def test_an_import_is_finished_first(number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an extension may raise ImportError in its place, which reads as "not installed"."""
    (tmp_path / "odd_inner.py").write_text(f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(0.2)\n")
    outer = "try:\n    import odd_inner\nexcept BaseException:\n    raise ImportError('as some extensions do')\n"
    (tmp_path / "odd_outer.py").write_text(outer)
    monkeypatch.syspath_prepend(tmp_path)

    def work() -> None:
        importlib.import_module("odd_outer")
        time.sleep(5)

    with stopping(), pytest.raises(Stopped):
        work()
    assert {"odd_inner", "odd_outer"} <= sys.modules.keys()
    del sys.modules["odd_inner"], sys.modules["odd_outer"]


def test_ignored_signals_stay_ignored() -> None:
    """`nohup edgekd train …` outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping() as stops:
            send(signal.SIGHUP)
        assert stops.by is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_native_code(number: signal.Signals) -> None:
    """What native code calls cannot raise through it."""
    done = []

    def work() -> None:
        with deferred() as received:
            send(number)
            send(number)
            done.append(list(received))

    with stopping(), pytest.raises(Stopped, match=number.name):
        work()
    assert done == [[number, number]]


def test_a_second_signal_ends_the_process() -> None:
    code = (
        "import os, signal, edgekd.signals as s\ns.AGAIN_S = -1\nsignal.signal(2, signal.default_int_handler)\n"
        "with s.deferred():\n    os.kill(os.getpid(), 2)\n    os.kill(os.getpid(), 2)\n    print('went on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
