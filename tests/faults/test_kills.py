"""Kills at every change of a name; signals as a shell sends them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faults.kills import KINDS
from helpers.processes import heed_ctrl_c


@pytest.mark.slow
def test_killed_at_every_change_of_a_name(base: Path) -> None:
    """A folder that is exchanged or moved aside, a file that is written anew, one in a folder, two."""
    words = [sys.executable, Path(__file__).with_name("kills.py"), "--base", base, "--renames"]
    commands = "compile,compile-moved,tune,export,evaluate"
    done = subprocess.run([*words, "--commands", commands], capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["kills"] > 20, done.stderr
    assert not found["problems"], done.stdout
    assert all(found[kind] == 0 for kind in KINDS)


SIGNALLED = """
import os, sys
from edgekd.__main__ import main

module, number, *sys.argv[1:] = sys.argv[1:]
left = [int(number)]

def hook(event, args):
    if event == "import" and args[0] == module and left:
        os.kill(os.getpid(), left.pop())

sys.addaudithook(hook)
main()
"""


@pytest.mark.parametrize(
    ("module", "sig"),
    [
        ("typer", signal.SIGTERM),
        ("numpy._core._multiarray_umath", signal.SIGINT),
        ("onnx.onnx_cpp2py_export", signal.SIGHUP),
        ("onnxruntime.capi.onnxruntime_pybind11_state", signal.SIGINT),
        ("openvino._pyopenvino", signal.SIGTERM),
    ],
)
def test_signals_in_the_middle_of_imports(base: Path, tmp_path: Path, module: str, sig: signal.Signals) -> None:
    """No traceback, nothing is "not installed", nothing is left, and the exit code is the signal's."""
    words = ["compile", base / "student.onnx", "--set", "batch_sizes=[1]", "--out", tmp_path / "e"]
    command = [sys.executable, "-c", SIGNALLED, module, str(int(sig)), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=heed_ctrl_c)
    assert done.returncode == 128 + sig, done.stderr
    assert done.stderr.startswith("interrupted")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
