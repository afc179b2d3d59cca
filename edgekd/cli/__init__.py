"""The `edgekd` command: one verb a command, each a thin layer over the function of the same name."""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from edgekd import extras
from edgekd.cli import deploy, learn, measure
from edgekd.cli.common import LogFormatter, say
from edgekd.cli.data import app as data_app
from edgekd.cli.demo import demo
from edgekd.cli.models import app as models_app
from edgekd.cli.predict import predict
from edgekd.cli.reproduce import reproduce
from edgekd.cli.sign import sign, verify
from edgekd.errors import EdgekdError


class _Commands(TyperGroup):
    """Turns what a user can cause into one message and an exit code; a traceback is left for bugs."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("interrupted; files that were being written are as they were before")
            raise typer.Exit(130) from None
        except (EdgekdError, ModuleNotFoundError) as error:
            told = extras.missing(error) if isinstance(error, ModuleNotFoundError) else error
            if told is None:
                raise
            say(f"error: {told.what}" + (f"\n  fix: {told.fix}" if told.fix else ""))
            raise typer.Exit(1) from None
        except BrokenPipeError:  # `edgekd … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            fix = "make room and run it again; nothing was half-written" if full else "check the path and its rights"
            say(f"error: {error.strerror or error}: {error.filename or 'while writing'}\n  fix: {fix}")
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A folder of labelled images to a compact classifier that answers early when an image is easy.",
)


def _version(asked: bool) -> None:
    if asked:
        from edgekd import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more.")] = False,
) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("edgekd").setLevel(logging.DEBUG if verbose else logging.INFO)


app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models")
for command in (
    learn.train,
    learn.distill,
    learn.evaluate,
    learn.export,
    deploy.compile_,
    deploy.tune,
    predict,
    measure.bench,
    measure.compare,
    sign,
    verify,
    reproduce,
    deploy.devices,
    deploy.doctor,
    demo,
):
    app.command(name=command.__name__.rstrip("_"))(command)


def main() -> None:
    """Entry point of the `edgekd` command."""
    app(prog_name="edgekd")
