"""Kills at every change of a name; signals as a shell sends them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import heed_ctrl_c
from kills import KINDS

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.slow
def test_killed_at_every_change_of_a_name(base: Path) -> None:
    """A folder that is exchanged and one that is moved aside, a file that is written anew, one in a folder."""
    words = [sys.executable, Path(__file__).with_name("kills.py"), "--base", base, "--renames"]
    done = subprocess.run([*words, "--commands", "compile-moved,tune,export,evaluate"], capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["kills"] > 30, done.stderr
    assert not found["problems"], done.stdout
    assert all(found[kind] == 0 for kind in KINDS)


def command(*words: str | Path, cwd: Path) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "edgekd", *map(str, words)]
    return subprocess.Popen(line, cwd=cwd, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c)


@pytest.mark.parametrize("sig", SIGNALS)
def test_signals_in_the_middle_of_imports(base: Path, tmp_path: Path, sig: signal.Signals) -> None:
    """Whenever it comes, there is no traceback, nothing is "not installed", and the code is the signal's."""
    for delay in (0.15, 0.4, 0.8, 1.2):
        out = tmp_path / f"{delay}.engine"
        process = command("compile", base / "student.onnx", "--out", out, cwd=tmp_path)
        time.sleep(delay)
        process.send_signal(sig)
        _, said = process.communicate(timeout=60)
        if 'File "<frozen' in said and "edgekd" not in said:  # Python itself was not yet there
            continue
        assert process.returncode == 128 + sig, (delay, said)
        assert "Traceback" not in said
        assert "installed" not in said
        assert "interrupted" in said
    assert not list(tmp_path.rglob("*"))
