"""`edgekd models`: which networks there are, what is inside one, what each costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgekd.cli.common import echo
from edgekd.errors import ConfigError

if TYPE_CHECKING:
    from edgekd.models.cost import Cost

ClassesOption = Annotated[int, typer.Option(min=1, help="How many classes it tells apart.")]
PixelsOption = Annotated[int, typer.Option(min=1, help="Side of the input in pixels.")]

StemOption = Annotated[str, typer.Option(help="imagenet, or small: that of a ResNet or MSDNet for tiny images.")]

app = typer.Typer(no_args_is_help=True, help="List networks, look inside them, count what they cost.")


@app.command("list")
def list_(part: Annotated[str, typer.Argument(metavar="[FILTER]", help="Only names that hold this.")] = "") -> None:
    """edgekd's own networks, then those of timm and torchvision."""
    from edgekd.models.networks import OWN, PREFIX, library, nearest_network

    own, others = ([n for n in names if part in n] for names in (OWN, sorted(frozenset().union(*library()))))
    if not own and not others:
        raise ConfigError(f"no network has '{part}' in its name", fix=nearest_network(part))
    for title, names in (("edgekd", own), (f"timm and torchvision; {PREFIX}NAME adds exits", others)):
        if names:
            echo("\n".join([f"{title}:", *(f"  {name}" for name in names)]))


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Any name of edgekd models list.")],
    features: Annotated[bool, typer.Option("--features", help="List every feature point.")] = False,
    image_size: PixelsOption = 224,
    classes: ClassesOption = 5,
    stem: StemOption = "imagenet",
) -> None:
    """A network's size, stages and feature points: the places for exits and for methods that compare maps."""
    from edgekd.models import feature_points
    from edgekd.models.networks import build, stem_named
    from edgekd.text import aligned

    network = build(name, classes=classes, image_size=image_size, stem=stem_named(stem))
    parameters = sum(p.numel() for p in network.parameters())
    found = feature_points.points(network, image_size=image_size)
    try:
        stages = feature_points.ends(found)
    except ConfigError:  # a perceptron has no maps
        stages = ()
    own = hasattr(network, "exits")  # a multi-exit network returns its pooled features itself
    pooled = "" if own else feature_points.pooled(network, image_size=image_size)
    echo(f"{name}: {parameters:,} parameters with {classes} classes")
    echo(f"stages: {', '.join(stages) or 'none'}")
    echo(f"pooled: {pooled or 'in front of each exit'}")
    if features:
        marks = {pooled.removesuffix(feature_points.INPUT): "pooled"} | {
            s: f"stage {k}" for k, s in enumerate(stages, start=1)
        }
        rows = [[p.name, marks.get(p.name, ""), p.kind, " x ".join(map(str, p.shape))] for p in found]
        echo(aligned([["feature point", "default", "class", "channels x height x width"], *rows]))


@app.command()
def cost(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Any names of edgekd models list.")],
    image_size: PixelsOption = 224,
    classes: ClassesOption = 5,
    stem: StemOption = "imagenet",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Parameters, multiply-adds, memory of the activations and size of the weights, counted for one image."""
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
