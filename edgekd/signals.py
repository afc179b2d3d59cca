"""Orderly termination on signals, and standard streams that always exist."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
AGAIN_S = 1.0
"""Signals within this time after the first are ignored: `timeout` sends two, and impatient users more."""
PATIENCE_S = 10.0
"""Longest time that an import may continue after a signal."""
STDOUT = "standard output"


class Stopped(KeyboardInterrupt):
    """Raised on a signal, so that unfinished output is removed."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.code = 128 + number


def heed(*, ignored: bool = False) -> None:
    """Let signals end the process immediately and without a traceback, while there is nothing to clean up yet.

    Args:
        ignored: Include signals that the parent process set to be ignored.
    """
    for number in SIGNALS:
        if ignored or signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a background job
            signal.signal(number, _end)


@contextlib.contextmanager
def stopping() -> Iterator[Stops]:
    """Let signals raise `Stopped` within the block."""
    stops = Stops()
    with _handled(stops, lambda handler: handler not in (signal.SIG_IGN, None)):
        yield stops


@contextlib.contextmanager
def deferred() -> Iterator[list[int]]:
    """Keep signals from raising within the block, where native code would swallow it; the first is handled behind it.

    A second one, if not in the same moment, ends the process immediately.

    Yields:
        The signals received so far: work that can be ended early should be.
    """
    received: list[int] = []
    since = 0.0

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if received and time.monotonic() - since > AGAIN_S:
            _end(number, frame)
        since = since or time.monotonic()
        received.append(number)

    kept: dict[int, Any] = {}
    try:
        with _handled(receive, callable) as kept:
            yield received
    finally:
        if received:
            kept[received[0]](received[0], None)


@contextlib.contextmanager
def _handled(
    handler: Callable[[int, FrameType | None], object], replaces: Callable[[Any], bool]
) -> Iterator[dict[int, Any]]:
    """Let `handler` handle signals within the block, in place of the handlers for which `replaces` is true.

    Yields:
        Signal to the handler before; none outside the main thread, where handlers cannot be set.
    """
    heeded = SIGNALS if threading.current_thread() is threading.main_thread() else []
    kept = {n: before for n in heeded if replaces(before := signal.getsignal(n))}
    for number in kept:
        signal.signal(number, handler)
    try:
        yield kept
    finally:
        for number, before in kept.items():
            signal.signal(number, before)


class Stops:
    """Signal handler that raises `Stopped`, but not during an import.

    An extension module that is interrupted while loading may raise ImportError, as if it were not installed.

    Attributes:
        by: The received signal, or None.
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
    """Standard output whose errors name it."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = STDOUT
            raise


def shield_tracker() -> None:
    """Start multiprocessing's resource tracker so that it ignores SIGHUP, as it already does SIGINT and SIGTERM.

    Otherwise closing the terminal ends it, and its successor prints tracebacks.
    """
    if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
        from multiprocessing import resource_tracker

        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            resource_tracker.ensure_running()
        finally:
            signal.signal(signal.SIGHUP, before)


def streams() -> None:
    """Open standard streams that were closed (`>&-`).

    Otherwise the next opened file would get their descriptor, and with it everything that is printed. Characters that a
    stream cannot encode are escaped.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)  # the lowest free descriptor
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")
    encoding = sys.stdout.encoding if sys.stdout else "utf-8"
    raw = io.BufferedWriter(_Output(1, "w", closefd=False))
    sys.stdout = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=raw.isatty())


def silence(stream: object) -> None:
    """Redirect a failed stream to the null device, so that it does not fail again at exit."""
    if isinstance(stream, io.TextIOWrapper):
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
