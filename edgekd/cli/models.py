"""`edgekd models`: the known networks, their feature points and their cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgekd.cli.common import echo
from edgekd.errors import ConfigError

if TYPE_CHECKING:
    from edgekd.models.cost import Cost

ClassesOption = Annotated[int, typer.Option(min=1, help="Number of classes.")]
ImageSizeOption = Annotated[int, typer.Option(min=1, help="Side of the images in pixels.")]
StemOption = Annotated[str, typer.Option(help="imagenet, or small (for tiny images; ResNets and MSDNet only).")]

app = typer.Typer(no_args_is_help=True, help="List networks, show their feature points, count their cost.")


@app.command("list")
def list_(
    text: Annotated[str, typer.Argument(metavar="[FILTER]", help="Only names that contain this text.")] = "",
) -> None:
    """List edgekd's own networks, then those of timm and torchvision."""
    from edgekd.models.networks import NETWORKS, PREFIX, library, nearest_network

    own, others = ([n for n in names if text in n] for names in (NETWORKS, sorted(frozenset().union(*library()))))
    if not own and not others:
        raise ConfigError(f"no network name contains '{text}'", fix=nearest_network(text))
    for title, names in (("edgekd", own), (f"timm and torchvision; {PREFIX}NAME adds exits", others)):
        if names:
            echo("\n".join([f"{title}:", *(f"  {name}" for name in names)]))


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A name shown by edgekd models list.")],
    features: Annotated[bool, typer.Option("--features", help="List every feature point.")] = False,
    image_size: ImageSizeOption = 224,
    classes: ClassesOption = 5,
    stem: StemOption = "imagenet",
) -> None:
    """Show a network's size, stages and feature points: the places for exits and for methods that compare maps."""
    from edgekd.models import feature_points
    from edgekd.models.networks import build, stem_named
    from edgekd.text import aligned

    network = build(name, classes=classes, image_size=image_size, stem=stem_named(stem))
    parameters = sum(p.numel() for p in network.parameters())
    trace = feature_points.trace(network, image_size=image_size)
    points = trace.points()
    try:
        stages = feature_points.stage_ends(points)
    except ConfigError:  # a perceptron has no maps
        stages = ()
    pooled = "" if trace.outputs.features else trace.pooled()
    echo(f"{name}: {parameters:,} parameters with {classes} classes")
    echo(f"stages: {', '.join(stages) or 'none'}")
    echo(f"pooled: {pooled or 'in front of each exit'}")
    if features:
        roles = {pooled.removesuffix(feature_points.INPUT): "pooled"}
        roles |= {stage: f"stage {k}" for k, stage in enumerate(stages, start=1)}
        rows = [[p.name, roles.get(p.name, ""), p.kind, " x ".join(map(str, p.shape))] for p in points]
        echo(aligned([["feature point", "default", "class", "channels x height x width"], *rows]))


@app.command()
def cost(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names shown by edgekd models list.")],
    image_size: ImageSizeOption = 224,
    classes: ClassesOption = 5,
    stem: StemOption = "imagenet",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count parameters, multiply-adds, memory of the activations and size of the weights, for one image."""
    from edgekd.models.cost import cost
    from edgekd.models.networks import stem_named
    from edgekd.serialization import to_json

    costs = [cost(name, classes=classes, image_size=image_size, stem=stem_named(stem)) for name in names]
    if as_json:
        echo(to_json([vars(c) for c in costs]).decode())
    else:
        echo(_table(costs))


def _table(costs: list[Cost]) -> str:
    from edgekd.text import aligned

    rows = [["network", "parameters, M", "MACs, M", "activations, MiB", "weights, MB"]]
    for c in costs:
        numbers = (c.parameters / 1e6, c.macs / 1e6, c.activation_mib, c.checkpoint_mb)
        rows.append([c.network, *(f"{number:.2f}" for number in numbers)])
    return aligned(rows)
