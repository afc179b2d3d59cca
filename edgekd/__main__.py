"""The `edgekd` command, also as `python -m edgekd`."""

from __future__ import annotations

from edgekd import signals


def main() -> None:
    """Run the command; signals and streams are set up before slow imports."""
    signals.heed()
    signals.streams()
    from edgekd.cli.main import app

    app(prog_name="edgekd")


if __name__ == "__main__":
    main()
