"""`edgekd data`: download data sets, draw synthetic cells."""

from __future__ import annotations

from typing import Annotated

import typer

from edgekd.cli.common import OutOption, bar, next_command, reserve

app = typer.Typer(no_args_is_help=True, help="Download data sets, draw synthetic cells.")


@app.command()
def get(
    name: Annotated[str, typer.Argument(help="kather2016 or cifar100 (and where to ask for sipakmed).")],
    out: OutOption,
) -> None:
    """Download a data set as class folders, with resume and checksum."""
    from edgekd.data.download import get as download

    reserve(out)
    with bar(f"get {name}") as progress:
        download(name, out, progress=progress)
    next_command("train", "--data", out, "--model", "resnet18", "--out", "runs/teacher")


@app.command()
def synthetic(
    out: OutOption,
    count: Annotated[int, typer.Option(help="How many cells.")] = 1500,
    size: Annotated[int, typer.Option(help="Side in pixels.")] = 64,
    seed: Annotated[int, typer.Option(help="The same seed draws the same pixels.")] = 0,
) -> None:
    """Draw synthetic cells of five classes that overlap."""
    from edgekd.data.synthetic import write_cells

    reserve(out)
    with bar("draw cells") as progress:
        write_cells(out, count=count, size=size, seed=seed, progress=progress)
    next_command("train", "--data", out, "--model", "resnet18", "--protocol", "demo", "--out", "runs/teacher")
