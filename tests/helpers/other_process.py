"""Another process that holds a file or folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

HOLD = """
import sys, tempfile
from pathlib import Path
from edgekd import files
{setup}
with files.{what}:
    print("ready", flush=True)
    sys.stdin.read()
"""


class Other:
    """Another process that is in the middle of a block of `files`."""

    def __init__(self, what: str, setup: str = "", **env: str) -> None:
        code = HOLD.format(what=what, setup=setup)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | env, **pipes)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()
