"""Tensors in device memory: upload, download and compaction of rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.backends.cuda.base import Memory
from edgekd.backends.cuda.device import device


def moves(rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (to, from, count): non-overlapping copies that move ascending `rows` to the front in place, in this order.

    Adjacent rows are copied together, as many as the distance allows: [0, 3, 4, 9] -> (1, 3, 2), (3, 9, 1).
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
    """An input or output: device memory for the largest batch, and pinned host memory to copy through.

    Args:
        shape: Shape of one row.
        dtype: Type of the elements.
        rows: Largest batch.

    Attributes:
        address: Address of the device memory.
        host: The pinned array, (rows, *shape).
    """

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
        """Enqueue an upload of `rows` to the front."""
        self.host[: len(rows)] = rows
        device().upload(self.address, self.host[: len(rows)])

    def fetch(self, count: int) -> None:
        """Enqueue a download of the first `count` rows into `host`."""
        device().download(self.host[:count], self.address)

    def compact(self, rows: Sequence[int]) -> None:
        """Enqueue a compaction to ascending `rows`; the rows after them are undefined."""
        for to, source, count in moves(rows):
            start = self.address
            device().move(start + to * self._row_bytes, start + source * self._row_bytes, count * self._row_bytes)
