"""Scratch memory of one device, in which all its engines work in turns."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from edgekd.backends.cuda.base import CudaDevice, Memory


class ScratchUser(Protocol):
    """An object that works in the scratch memory; it is kept by identity."""

    def scratch_moved(self) -> None:
        """Drop whatever is bound to the address of the scratch memory: a CUDA graph holds it."""


class Scratch:
    """Memory as large as the largest need of any user, freed with the last one.

    What runs on one stream runs one after the other, so all users can have the same memory. Every function must be
    called inside `with device:`.

    Args:
        device: The GPU.
    """

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._needs: weakref.WeakKeyDictionary[ScratchUser, int] = weakref.WeakKeyDictionary()
        self._memory: Memory | None = None

    def reserve(self, user: ScratchUser, size: int) -> None:
        """Note that `user` needs `size` bytes; if they are more than there are, all users are told that they move."""
        self._needs[user] = size
        if self._memory is not None and self._memory.size < size:
            for each in list(self._needs):
                each.scratch_moved()
            self._memory = None

    @property
    def memory(self) -> Memory:
        """The memory, which stays where it is until a user with a larger need comes.

        Raises:
            BackendError: Out of memory.
        """
        if self._memory is None:
            self._memory = self._device.allocate(max([1, *self._needs.values()]))
        return self._memory
