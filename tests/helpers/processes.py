"""Child processes of tests."""

from __future__ import annotations

import signal
import time
from pathlib import Path


def heed_ctrl_c() -> None:
    """For a child: what runs in the background, as CI may, hands down SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_end_of(folder: Path) -> None:
    """Until no process has the folder on its command line; half a minute at most."""
    until = time.monotonic() + 30
    while found := [line for p in Path("/proc").glob("[0-9]*/cmdline") if str(folder) in (line := _read(p))]:
        assert time.monotonic() < until, found
        time.sleep(0.1)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace").replace("\0", " ")
    except OSError:  # ended meanwhile
        return ""
