"""`edgekd data`: download data sets, generate synthetic ones."""

from __future__ import annotations

from typing import Annotated

import typer

from edgekd.cli.common import OutOption, bar, next_command, reserve

app = typer.Typer(no_args_is_help=True, help="Download data sets, generate synthetic ones.")


@app.command()
def get(
    name: Annotated[str, typer.Argument(help="kather2016, cifar100, or a data layout of an installed package.")],
    out: OutOption,
) -> None:
    """Download a data set as class folders, resumable and verified by its checksum."""
    from edgekd.data.download import get as download

    reserve(out)
    with bar(f"get {name}") as progress:
        download(name, out, progress=progress)
    next_command("train", "--data", out, "--model", "resnet18", "--out", "runs/teacher")


@app.command()
def synthetic(
    out: OutOption,
    count: Annotated[int, typer.Option(help="Number of images.")] = 1500,
    size: Annotated[int, typer.Option(help="Side of an image in pixels.")] = 64,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
) -> None:
    """Draw synthetic cells of five overlapping classes."""
    from edgekd.data.synthetic import write_cells

    reserve(out)
    with bar("draw cells") as progress:
        write_cells(out, count=count, size=size, seed=seed, progress=progress)
    next_command("train", "--data", out, "--model", "resnet18", "--protocol", "demo", "--out", "runs/teacher")
