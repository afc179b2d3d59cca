"""The `edgekd` command, also as `python -m edgekd`."""

from __future__ import annotations

from edgekd import signals


def main() -> None:
    """Run the command; signals and streams are seen to before what takes long to import."""
    signals.heed()
    signals.streams()
    from edgekd.cli.main import app

    app(prog_name="edgekd")


if __name__ == "__main__":
    main()
