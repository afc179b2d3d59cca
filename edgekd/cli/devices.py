"""edgekd devices."""

from __future__ import annotations

from edgekd.cli.common import (
    echo,
)


def devices() -> None:
    """List the device profiles."""
    from edgekd.device_profiles import table
    from edgekd.text import aligned

    echo(aligned(table()))
