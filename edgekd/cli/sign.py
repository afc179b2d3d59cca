"""`edgekd sign` and `edgekd verify`: signatures with the user's own key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.common import echo

TargetArgument = Annotated[Path, typer.Argument(metavar="STUDENT.ENGINE", help="Engine folder or student.onnx.")]


def sign(
    target: TargetArgument, key: Annotated[Path, typer.Option(help="Your Ed25519 private key, a PEM file.")]
) -> None:
    """Sign an engine or student.onnx with your own key (needs cryptography)."""
    from edgekd.sign import sign as make

    echo(f"{make(target, key)}: signed")


def verify(
    target: TargetArgument, key: Annotated[Path, typer.Option(help="The signer's Ed25519 public key, a PEM file.")]
) -> None:
    """Check that an engine or student.onnx is whole and is what the holder of a key signed."""
    from edgekd.sign import verify as check

    check(target, key)
    echo(f"{target}: signed with the key of {key}")
