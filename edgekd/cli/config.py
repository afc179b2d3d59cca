"""`edgekd config`: the TOML files that ship with edgekd, to read and to copy."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from edgekd import config
from edgekd.cli.common import echo, reserve
from edgekd.errors import ArtifactError, ConfigError, nearest
from edgekd.files import atomic_write
from edgekd.text import aligned


class Kind(NamedTuple):
    """One kind of shipped TOML file: title, folder name in `edgekd.config`, and the option that accepts a copy."""

    title: str
    folder: str
    option: str


KINDS = (
    Kind("compile recipes", "compile", "edgekd compile --recipe"),
    Kind("benchmark suites", "benchmarks/suites", "edgekd bench --suite"),
    Kind("training protocols", "protocols", "edgekd train --protocol"),
    Kind("tables of the papers", "papers", "edgekd reproduce"),
    Kind("device profiles", "devices", ""),
)
NameArgument = Annotated[str, typer.Argument(help="A name shown by edgekd config list.", show_default=False)]

app = typer.Typer(no_args_is_help=True, help="List, print and copy the TOML files that ship with edgekd.")


@app.command("list")
def list_() -> None:
    """List every shipped file by kind, with a one-line description."""
    for kind in KINDS:
        echo(f"{kind.title}" + (f" ({kind.option} NAME):" if kind.option else ":"), bold=True)
        rows = [[f"  {path.stem}", _description(path.read_text(encoding="utf-8"))] for path in _paths(kind)]
        echo(aligned(rows, remarks=True))


@app.command()
def show(name: NameArgument) -> None:
    """Print a shipped file."""
    _, path = _find(name)
    echo(path.read_text(encoding="utf-8").removesuffix("\n"))


@app.command()
def copy(
    name: NameArgument,
    out: Annotated[
        Path | None, typer.Argument(metavar="[FILE.toml]", help="Target path; NAME.toml in this folder if not given.")
    ] = None,
) -> None:
    """Copy a shipped file to change it. Existing files are never overwritten."""
    kind, source = _find(name)
    out = out or Path(source.name)
    if out.suffix != ".toml":
        raise ConfigError(f"{out} does not end in .toml, and no command would read it", fix=f"{out}.toml")
    reserve(out)
    if out.exists() or out.is_symlink():
        raise ArtifactError(f"{out} exists", fix="give another name, or delete it")
    atomic_write(out, source.read_bytes())
    echo(f"wrote {out}" + (f"; use it with {kind.option} {shlex.quote(str(out))}" if kind.option else ""))


def _paths(kind: Kind) -> Iterator[Path]:
    return (config.find(kind.folder, name) for name in config.names(kind.folder))


def _find(name: str) -> tuple[Kind, Path]:
    """Return the kind and path of a shipped file; no two kinds share a name.

    Raises:
        ConfigError: No file has this name; the nearest is given.
    """
    known = {path.stem: (kind, path) for kind in KINDS for path in _paths(kind)}
    if name not in known:
        raise ConfigError(f"no shipped file is called '{name}'", fix=nearest(name, known))
    return known[name]


def _description(text: str) -> str:
    """Return the title or caption of a file, or else the first sentence of the comment that it begins with."""
    if titled := re.search(r'^(?:title|caption) = "(.+)"$', text, re.MULTILINE):
        return titled[1]
    comment = re.match(r"(?:#.*\n)*", text)
    words = " ".join(line.lstrip("# ") for line in comment[0].splitlines()) if comment else ""
    return re.split(r"(?<=\.) (?=[A-Z])", words)[0]
