"""edgekd compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.common import echo


def compare(
    records: Annotated[list[Path], typer.Argument(metavar="RECORD.JSON")],
    force: Annotated[bool, typer.Option("--force", help="Compare in spite of differences, and list them.")] = False,
) -> None:
    """Put records side by side in one table; refuse records measured under different conditions, and name these."""
    from edgekd.bench.compare import compare as table
    from edgekd.bench.record import read_record

    echo(table({str(path): read_record(path) for path in records}, force=force))
