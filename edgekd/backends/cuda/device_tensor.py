"""Rows of tensors in device memory: in, out, and those that go on to the front."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.backends.cuda.device import Memory, device


def moves(rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(to, from, count): copies in this order that bring rising `rows` to the front in place, none onto itself.

    Neighbours go together, as many as lie apart: [0, 3, 4, 9] -> (1, 3, 2), (3, 9, 1).
    """
    start = 0
    while start < len(rows):
        end = start + 1
        apart = rows[start] - start
        while end < len(rows) and rows[end] == rows[end - 1] + 1 and end - start < apart:
            end += 1
        if apart:
            yield start, rows[start], end - start
        start = end


class Tensor:
    """Rows of an input or output: device memory for the largest batch, and pinned memory to copy them through."""

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike, rows: int) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._rows = rows
        self._row_bytes = math.prod(shape) * self.dtype.itemsize

    @functools.cached_property
    def _memory(self) -> Memory:
        return device().allocate(self._rows * self._row_bytes)

    @property
    def address(self) -> int:
        return self._memory.address

    @functools.cached_property
    def host(self) -> npt.NDArray[Any]:
        return device().pinned((self._rows, *self.shape), self.dtype)

    def put(self, rows: npt.NDArray[Any]) -> None:
        """Enqueue a copy of these rows to the front."""
        self.host[: len(rows)] = rows
        device().upload(self.address, self.host[: len(rows)])

    def fetch(self, count: int) -> None:
        """Enqueue a copy of the first rows into `host`."""
        device().download(self.host[:count], self.address)

    def keep(self, rows: Sequence[int]) -> None:
        """Enqueue bringing rising `rows` to the front; those behind them are left as they are."""
        for to, source, count in moves(rows):
            start = self.address
            device().move(start + to * self._row_bytes, start + source * self._row_bytes, count * self._row_bytes)
