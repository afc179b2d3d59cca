"""Progress of a job that consists of parts of known weight."""

from __future__ import annotations

from edgekd.types import Progress

STEPS = 100


class Span:
    """A span of a job: what is reported within it is scaled to its share of the whole.

    Args:
        report: Called with the steps done and `STEPS`; None to report nothing.
        start: Fraction of the whole that is done when the span begins.
        end: Fraction of the whole that is done when it ends.
    """

    def __init__(self, report: Progress | None, start: float = 0.0, end: float = 1.0) -> None:
        self._report = report
        self._start = start
        self._end = end
        self._next = start

    def part(self, weight: float) -> Span:
        """Return the span of the next part of this one.

        Args:
            weight: The part's fraction of this span.
        """
        start, self._next = self._next, min(self._next + weight * (self._end - self._start), self._end)
        return Span(self._report, start, self._next)

    def fraction(self, done: float) -> None:
        """Report that a fraction of this span is done."""
        if self._report:
            self._report(round(STEPS * (self._start + done * (self._end - self._start))), STEPS)

    def __call__(self, done: int, total: int) -> None:
        """Report that `done` of the `total` items of this span are done."""
        self.fraction(done / total)
