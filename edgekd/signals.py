"""What a command owes the shell that started it: signals that end it in order, and standard streams that are there."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
AGAIN_S = 1.0
"""A signal that comes again within this time is the same one: `timeout` sends two, and impatient users more."""
PATIENCE_S = 10.0
"""How long an import may take that a signal came in the middle of."""
STDOUT = "standard output"


class Stopped(KeyboardInterrupt):
    """Raised where a signal came, so that what is being written is cleared away."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.code = 128 + number


def heed(*, ignored: bool = False) -> None:
    """From now on a signal ends the process at once, without a traceback: there is nothing to clear away yet.

    ignored: heed also those that whoever started this process had it ignore.
    """
    for number in SIGNALS:
        if ignored or signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a job in the background
            signal.signal(number, _end)


@contextlib.contextmanager
def stopping() -> Iterator[Stops]:
    """Within the block a signal raises `Stopped`."""
    stops = Stops()
    heeded = SIGNALS if threading.current_thread() is threading.main_thread() else []
    kept = {n: signal.getsignal(n) for n in heeded if signal.getsignal(n) not in (signal.SIG_IGN, None)}
    for number in kept:
        signal.signal(number, stops)
    try:
        yield stops
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


class Stops:
    """A handler that raises, but not in the middle of an import: an extension that is interrupted while it is loaded
    may raise ImportError, which looks as if it were not installed.

    by: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.by: int | None = None
        self._since = self._raised = -float("inf")

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.by is None:
            self.by, self._since = number, now
        if _importing(frame):
            if now - self._since > PATIENCE_S:
                _end(number, frame)
            again = threading.Timer(0.05, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
        elif now - self._raised > AGAIN_S:
            self._raised = now
            raise Stopped(number)


def _importing(frame: FrameType | None) -> bool:
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _end(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


class _Output(io.FileIO):
    """Standard output whose errors say what failed."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = STDOUT
            raise


def shield_tracker() -> None:
    """Start multiprocessing's resource tracker so that it outlives SIGHUP, as it does SIGINT and SIGTERM by itself.

    A terminal that is closed would end it, and the one that follows it prints tracebacks.
    """
    if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
        from multiprocessing import resource_tracker

        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            resource_tracker.ensure_running()
        finally:
            signal.signal(signal.SIGHUP, before)


def streams() -> None:
    """Open what was closed (`>&-`): else the next file that is opened would get its number, and what is printed.

    A character that a stream cannot encode is written as an escape.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)  # the lowest number that is free
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")
    encoding = sys.stdout.encoding if sys.stdout else "utf-8"
    raw = io.BufferedWriter(_Output(1, "w", closefd=False))
    sys.stdout = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=raw.isatty())


def silence(stream: object) -> None:
    """Let a stream that fails lead to nowhere, so that it does not fail again when the process ends."""
    if isinstance(stream, io.TextIOWrapper):
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
