"""edgekd sign."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.common import echo

TargetArgument = Annotated[Path, typer.Argument(metavar="STUDENT.ENGINE", help="Engine folder or student.onnx.")]


def sign(
    target: TargetArgument, key: Annotated[Path, typer.Option(help="Your Ed25519 private key, a PEM file.")]
) -> None:
    """Sign an engine or student.onnx with your own key (requires cryptography)."""
    from edgekd.artifacts.signing import sign as make

    echo(f"{make(target, key)}: signed")
