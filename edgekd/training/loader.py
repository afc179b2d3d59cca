"""Data loading in worker processes that use no shared memory and print no traceback when training is interrupted."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver
from signal import SIGHUP, SIGINT, SIGTERM
from typing import Any, TypeAlias

import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from edgekd.errors import ConfigError, EdgekdError, TrainingError
from edgekd.signals import shield_tracker
from edgekd.training.dataset import EpochSampler, ImageSet, Key, Sample

Result: TypeAlias = Sample | EdgekdError


class Batch(tuple[torch.Tensor, ...]):
    """Images float32 (N, 3, H, W), labels (N,) and indices (N,).

    It is sent between processes as arrays through a pipe. Torch would put tensors into shared memory, of which a
    container has 64 MiB, and pass them by a thread that prints a traceback when the reader is interrupted.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _batch, tuple(tensor.numpy() for tensor in self)


def _batch(*arrays: npt.NDArray[Any]) -> Batch:
    return Batch(map(torch.from_numpy, arrays))


def _collate(samples: Sequence[Result]) -> Batch | EdgekdError:
    """Return a batch, or the error of an image; torch's own collation would use shared memory in a worker."""
    good = [sample for sample in samples if not isinstance(sample, EdgekdError)]
    if len(good) < len(samples):
        return next(sample for sample in samples if isinstance(sample, EdgekdError))
    images, labels, indices = zip(*good)
    return Batch((torch.stack(images), torch.tensor(labels), torch.tensor(indices)))


class _Results(Dataset[Result]):
    """Samples, or their errors, which torch would re-raise with a traceback as their text."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __getitem__(self, key: Key) -> Result:
        try:
            return self.images[key]
        except EdgekdError as error:
            return error


class Loader(DataLoader[Result]):
    """Yields `Batch`es of a sampler's images.

    A script that trains with workers needs `if __name__ == "__main__":`, as always with Python's processes.

    Args:
        images: The images.
        batch_size: Images in a batch.
        sampler: Order of the images.
        workers: Processes that read images and stay alive between epochs; 0 reads in this process.
        drop_last: Drop the last batch if it is smaller.

    Raises:
        ConfigError: Dropping the last batch would leave no batch.
        EdgekdError: While iterating: an image cannot be read, workers cannot be started, or one was killed.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        sampler: EpochSampler,
        workers: int = 0,
        drop_last: bool = False,
    ) -> None:
        if drop_last and len(sampler) < batch_size:
            raise ConfigError(
                f"{len(sampler)} training images a process do not fill a batch of {batch_size}",
                fix=f"use --batch-size {max(1, len(sampler) // 2)} or less",
            )
        if workers:
            start_processes()
        super().__init__(
            _Results(images),
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            drop_last=drop_last,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            # a fork of a process that has run OpenVINO returns wrong pixels or crashes
            multiprocessing_context="forkserver" if workers else None,
        )
        self.epoch_sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0, of the next iteration."""
        self.epoch_sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            with _uninterrupted():
                batches = super().__iter__()
        except OSError as error:  # semaphores are files in /dev/shm
            raise TrainingError(
                f"{self.num_workers} processes that read images cannot be started: {error.strerror or error}",
                fix="use fewer --workers, 0 for none, or free some of /dev/shm",
            ) from error
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise TrainingError(
                    "a process that reads images was killed, perhaps because memory ran out",
                    fix="continue with --resume and fewer --workers",
                ) from error
            if isinstance(batch, EdgekdError):
                raise batch
            yield batch


def start_processes() -> None:
    """Start the server from which workers are forked, and let it import torch in the background."""
    with _uninterrupted():
        forkserver.set_forkserver_preload([__name__])
        forkserver.ensure_running()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Defer signals to the end of the block; processes that start in it inherit the mask and ignore Ctrl-C.

    The mask alone is not enough: another thread of this process may receive the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    shield_tracker()  # started later, it would remove the mask
    received: list[int] = []
    deferring = True

    def hold(number: int, _: object) -> None:
        if deferring:
            received.append(number)
        else:  # the end of the block was itself interrupted, and this handler is still installed
            signal.signal(number, before[number])
            signal.raise_signal(number)

    before: dict[int, Any] = {number: signal.getsignal(number) for number in (SIGINT, SIGTERM, SIGHUP)}
    for number in before:
        signal.signal(number, hold)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        deferring = False
        for number, handler in before.items():
            signal.signal(number, handler)
        for sent in received:
            signal.raise_signal(sent)
