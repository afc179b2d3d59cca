"""Running edgekd commands in the process of the tests."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from edgekd.cli.main import app


def edgekd(*words: str | Path, code: int = 0) -> str:
    """Run a command in this process; its whole output."""
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.output
