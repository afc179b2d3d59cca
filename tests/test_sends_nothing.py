"""No command opens a socket or asks for a host, native code and forked children included."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from faults.base import SUITE

if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
    pytest.skip("the filter is for Linux on two architectures", allow_module_level=True)

WATCH = """
import ctypes, os, platform, struct, sys

def note(event, args):
    if event in ("urllib.Request", "socket.getaddrinfo", "socket.gethostbyname"):
        with open(os.environ["SENT"], "a") as log:
            log.write(f"{event} {args}\\n")

sys.addaudithook(note)

arch, socket = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}[platform.machine()]
load, equal, end = 0x20, 0x15, 0x06
steps = [
    (load, 0, 0, 4), (equal, 0, 9, arch),
    (load, 0, 0, 0), (equal, 0, 7, socket),
    (load, 0, 0, 16), (equal, 5, 0, 1),  # AF_UNIX is allowed: processes talk to one another through it
    (equal, 0, 2, 2), (load, 0, 0, 24), (equal, 1, 0, 2),  # AF_INET and SOCK_DGRAM fail: libuuid wants the MAC address
    (end, 0, 0, 0x80000000), (end, 0, 0, 0x00050001), (end, 0, 0, 0x7FFF0000),  # end the process; EPERM; allow
]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP
"""
"""A seccomp filter ends this process, or a child of it, at a socket for the network (SIGSYS). What Python asks for is
written down before: OpenVINO asks in a forked child that nobody misses."""
USE = {
    "onnxruntime": "session = onnxruntime.InferenceSession(onnx, providers=['CPUExecutionProvider'])",
    "openvino": "openvino.Core()",
}
COMMANDS = """
data synthetic --out cells --count 60 --size 32
train --data cells --model multi-exit-test_resnet --protocol demo --weights none --epochs 1 --image-size 32 \
--set workers=0 --set batch_size=16 --set precision=32-true --out run
export run --data cells --out student.onnx
compile student.onnx --recipe int8 --data cells --split run/split.json --set batch_sizes=[1] \
--set openvino.static_batch_sizes=[1] --out student.engine
bench student.engine --data cells --split run/split.json --suite tiny.toml --set rounds=1 --set variants=["final"] \
--no-report --out record.json
predict student.engine cells
"""
NCNN = """
compile student.onnx --backend ncnn --set batch_sizes=[1] --out ncnn.engine
predict ncnn.engine cells
"""
IN_CI = ("CI", "TF_BUILD", "GITHUB_ACTIONS", "GITLAB_CI", "JENKINS_URL", "BUILDKITE", "CIRCLECI", "TRAVIS")
"""Where one of these is set, both libraries keep silent by themselves."""


def private(folder: Path) -> dict[str, str]:
    """The environment with an empty home and temporary folder, and nothing that turns telemetry off."""
    kept = {k: v for k, v in os.environ.items() if k not in (*IN_CI, "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    (folder / "tmp").mkdir(parents=True)
    return {**kept, "HOME": str(folder), "TMPDIR": str(folder / "tmp"), "SENT": str(folder / "sent")}


@pytest.mark.slow
def test_libraries_send_nothing_once_edgekd_is_imported(student_onnx: Path, tmp_path: Path) -> None:
    """ONNX Runtime asks for its host some nine seconds after the import. Without edgekd both are caught."""
    started = {}
    for library, use in USE.items():
        for first in ("edgekd", "sys"):
            home = tmp_path / library / first
            script = f"{WATCH}\nonnx = {str(student_onnx)!r}\nimport {first}, {library}, time\n{use}\ntime.sleep(14)"
            command = [sys.executable, "-c", script]
            started[library, first] = home, subprocess.Popen(command, env=private(home), stderr=subprocess.PIPE)
    for (library, first), (home, process) in started.items():
        _, said = process.communicate(timeout=120)
        left = [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]
        if first == "edgekd":
            assert (process.returncode, left) == (0, []), (library, said)
        else:
            assert process.returncode == -signal.SIGSYS or "sent" in left, (library, said)
            assert len(left) > 1, left  # an identifier of this machine


@pytest.mark.slow
def test_commands_open_no_socket(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    env = private(tmp_path / "home")
    (tmp_path / "tiny.toml").write_text(SUITE)
    script = WATCH + "from edgekd.__main__ import main\nmain()"
    lines = COMMANDS + (NCNN if find_spec("ncnn") and find_spec("pnnx") else "")
    for command in filter(None, lines.splitlines()):
        words = [sys.executable, "-c", script, *command.split()]
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    left = {path.name for path in (tmp_path / "home").rglob("*") if path.is_file()}
    assert not left & {"sent", "deviceid", "onnxruntime.db", ".ses", "stats", "openvino_ga_cid"}
