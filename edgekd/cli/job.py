"""The process of one job: runs edgekd commands in turn and exits when its parent dies."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

from edgekd import signals
from edgekd.training.jobs import GRACE_S


def _child(commands: Sequence[Sequence[str]]) -> None:
    """The commands, up to the first that fails."""
    signals.heed(ignored=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from edgekd.cli.main import app

    for words in commands:
        try:
            app(words, prog_name="edgekd")
        except SystemExit as end:
            if end.code:
                raise


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE_S)
    os._exit(130)


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
