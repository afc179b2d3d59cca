"""edgekd verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.common import echo
from edgekd.cli.sign import TargetArgument


def verify(
    target: TargetArgument, key: Annotated[Path, typer.Option(help="The signer's Ed25519 public key, a PEM file.")]
) -> None:
    """Check that an engine or student.onnx is complete and carries a valid signature of the given key."""
    from edgekd.artifacts.signing import verify as check

    check(target, key)
    echo(f"{target}: signed with the key of {key}")
