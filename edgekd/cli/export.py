"""`edgekd export`: run folder to student.onnx."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.common import (
    DataFolder,
    OutOption,
    echo,
    next_command,
    reserve,
)
from edgekd.cli.train import data_folder


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: OutOption,
    data: DataFolder = None,
    images: Annotated[int, typer.Option(help="Number of validation images to compare on.")] = 32,
) -> None:
    """Export a run folder to student.onnx (opset 17, dynamic batch), checked against torch on real images."""
    import torch

    from edgekd.artifacts.training_images import TrainingImages
    from edgekd.data.images import load_subset
    from edgekd.data.split import read_split
    from edgekd.export import export, model_metadata
    from edgekd.files import NETWORK
    from edgekd.training.run_folder import load_model

    network, trained = load_model(run)
    split, data = read_split(run), data_folder(run, data)
    reserve(out, NETWORK, data=data)
    batch, _ = load_subset(split, "val", data=data, preprocess=trained.preprocess, limit=images)
    with torch.no_grad():
        outputs = network(torch.from_numpy(batch[:1]))
    metadata = model_metadata(
        trained.network, trained.classes, trained.preprocess, outputs, provenance=trained.provenance
    )
    seen = [*split.subset("train"), *split.subset("val")]
    metadata = dataclasses.replace(metadata, training_images=TrainingImages.of(seen, split.group))
    worst = export(network, metadata, out=out, images=batch, names=[i.path for i in split.subset("val")])
    echo(f"{out}: {len(metadata.exits)} exits, largest difference from torch {worst:.1e} on {len(batch)} images")
    files: tuple[object, ...] = ("--data", data, "--split", run / "split.json", "--out", out.with_suffix(".engine"))
    next_command("compile", out, "--recipe", "int8", *files)
