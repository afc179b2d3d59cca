"""edgekd doctor."""

from __future__ import annotations

import typer

from edgekd.cli.common import (
    echo,
    say,
)


def doctor() -> None:
    """Report what is installed, and run a small graph with each backend."""
    from edgekd.runtime.doctor import report

    lines, healthy = report()
    for line in lines:
        echo(line)
    if not healthy:
        say("error: a backend that is installed does not work")
        raise typer.Exit(1)
