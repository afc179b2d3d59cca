"""Child processes that end when their parent does: the parent holds the other end of their standard input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import IO

GRACE_S = 10
"""Seconds that an interrupted child has to end by itself."""


def start_child(
    module: str, *arguments: str, stdout: int | IO[bytes], stderr: int | IO[bytes], env: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start `python -m MODULE ARGUMENTS`, which has to call `end_with_parent`; closing its `stdin` stops it.

    Args:
        module: Name of the module.
        *arguments: Its command-line arguments.
        stdout: As for `subprocess.Popen`.
        stderr: As for `subprocess.Popen`.
        env: Environment variables; those of this process if None.
    """
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, env=env)


def end_with_parent() -> None:
    """Interrupt this process when its standard input is closed, which happens however the parent ends."""
    threading.Thread(target=_wait_and_end, daemon=True).start()


def _wait_and_end() -> None:
    while os.read(0, 1):  # not sys.stdin: its lock would be held when the interpreter shuts down
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE_S)
    os._exit(130)
