"""The `edgekd` command; each subcommand is a thin layer over the function of the same name."""

from __future__ import annotations

import contextlib
import errno
import logging
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from edgekd import extras, signals
from edgekd.cli.add_exits import add_exits
from edgekd.cli.bench import bench
from edgekd.cli.certify import certify
from edgekd.cli.common import LogFormatter, reserved, say
from edgekd.cli.compare import compare
from edgekd.cli.compile import compile_
from edgekd.cli.config import app as config_app
from edgekd.cli.data import app as data_app
from edgekd.cli.demo import demo
from edgekd.cli.devices import devices
from edgekd.cli.distill import distill
from edgekd.cli.doctor import doctor
from edgekd.cli.evaluate import evaluate
from edgekd.cli.export import export
from edgekd.cli.models import app as models_app
from edgekd.cli.predict import predict
from edgekd.cli.reproduce import reproduce
from edgekd.cli.sign import sign
from edgekd.cli.train import train
from edgekd.cli.tune import tune
from edgekd.cli.verify import verify
from edgekd.errors import EdgekdError
from edgekd.signals import Stopped, stopping


class _Commands(TyperGroup):
    """Converts expected errors to a message and an exit code; only bugs print a traceback."""

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            return super().main(*args, **extra)
        except OSError as error:  # --help and --version, which invoke no command
            sys.exit(_failed(error))
        finally:
            try:
                sys.stdout.flush()
            except OSError as error:
                sys.exit(_failed(error))

    def invoke(self, ctx: Any) -> Any:
        with reporting_errors():
            return super().invoke(ctx)


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """Turn errors that a user can cause, and signals, into one message and an exit code.

    Raises:
        SystemExit: Such an error; any other passes.
    """
    with stopping() as stops:
        try:
            with reserved():
                yield
        except (Exception, KeyboardInterrupt) as error:
            if stops.by and not isinstance(error, KeyboardInterrupt):  # a library converted the signal to its own error
                error = Stopped(stops.by)
            if isinstance(error, ModuleNotFoundError):
                error = extras.missing(error) or error
            if code := _failed(error):
                sys.exit(code)
            raise


def _failed(error: BaseException) -> int:
    """Print what failed and what to do; return the exit code, or 0 for a bug, which needs its traceback."""
    if isinstance(error, KeyboardInterrupt):
        kept = getattr(error, "resume", "")
        _tell(f"{error.args[0] if error.args else 'interrupted'}; unfinished output was removed{kept}")
        return error.code if isinstance(error, Stopped) else 130
    if isinstance(error, EdgekdError):
        _tell(f"error: {error.what}" + (f"\n  fix: {error.fix}" if error.fix else ""))
        return 1
    if isinstance(error, OSError):
        if error.filename == signals.STDOUT:
            signals.silence(sys.stdout)
        if isinstance(error, BrokenPipeError):  # `edgekd … | head`
            return 141
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        cut = "the printed output is truncated" if error.filename == signals.STDOUT else "no file was partly written"
        fix = f"free some space and run it again; {cut}" if full else "check the path and its permissions"
        _tell(f"error: {error.strerror or error}: {error.filename or 'while writing'}\n  fix: {fix}")
        return 1
    return 0


def _tell(text: str) -> None:
    try:
        say(text)
    except OSError:  # a closed terminal, a full disk
        signals.silence(sys.stderr)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="From a folder of labelled images to a compact early-exit classifier, compiled for your device.",
)


def _version(requested: bool) -> None:
    if requested:
        from edgekd._version import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more details.")] = False,
) -> None:
    log_to_stderr(verbose=verbose)


def log_to_stderr(*, verbose: bool = False) -> None:
    """Print edgekd's log messages, and other libraries' warnings, on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("edgekd").setLevel(logging.DEBUG if verbose else logging.INFO)


app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models")
app.add_typer(config_app, name="config")
for command in (
    train,
    distill,
    add_exits,
    evaluate,
    export,
    compile_,
    tune,
    certify,
    predict,
    bench,
    compare,
    sign,
    verify,
    reproduce,
    devices,
    doctor,
    demo,
):
    app.command(name=command.__name__.rstrip("_").replace("_", "-"))(command)
