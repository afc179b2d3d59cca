"""edgekd doctor."""

from __future__ import annotations

import typer

from edgekd.cli.common import (
    echo,
    say,
)


def doctor() -> None:
    """What is installed, and whether each backend builds and runs a small graph."""
    from edgekd.runtime.doctor import report

    lines, healthy = report()
    for line in lines:
        echo(line)
    if not healthy:
        say("error: a backend that is installed does not work")
        raise typer.Exit(1)
