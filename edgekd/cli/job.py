"""The process of one job: runs edgekd commands in turn and exits when its parent dies."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from edgekd import signals
from edgekd.child import end_with_parent


def _child(commands: Sequence[Sequence[str]]) -> None:
    """The commands, up to the first that fails."""
    signals.heed(ignored=True)
    end_with_parent()
    from edgekd.cli.main import app

    for words in commands:
        try:
            app(words, prog_name="edgekd")
        except SystemExit as end:
            if end.code:
                raise


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
