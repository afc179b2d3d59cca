"""Processes that read images: Ctrl-C at any moment, little shared memory, images that vanish, a killed process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edgekd.data.preprocess import Preprocess
from edgekd.data.split import Item
from edgekd.errors import DataError, TrainingError
from edgekd.training.dataset import EpochSampler, ImageSet
from edgekd.training.loader import Loader

MOMENTS = Path(__file__).parents[1] / "helpers" / "moments.py"


def reading(cells: Path, *, workers: int = 1) -> Loader:
    folder = cells / "halo"
    items = [Item(p.name, k % 2) for k, p in enumerate(sorted(folder.iterdir()))]
    images = ImageSet(items, data=folder, preprocess=Preprocess(16))
    return Loader(images, batch_size=4, sampler=EpochSampler(len(items)), workers=workers)


def moments(cells: Path, times: int, ms: float, *, shm: str = "") -> subprocess.CompletedProcess[str]:
    """In a group of its own; with shm, in a mount namespace whose /dev/shm has that size."""
    command = [sys.executable, str(MOMENTS), str(cells / "halo"), str(times), str(ms)]
    if shm:
        mount = f'mount -t tmpfs -o size={shm} tmpfs /dev/shm && exec "$@"'
        command = ["unshare", "-m", "sh", "-c", mount, "sh", *command]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, start_new_session=True)


def test_ctrl_c_at_many_moments_prints_nothing(cells: Path) -> None:
    """From before the first process to the middle of reading: the whole group hears it, as from a terminal."""
    done = moments(cells, 20, 25)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout.split()[0]) >= 10


@pytest.mark.parametrize(
    ("shm", "message"), [("64k", "batches"), ("12k", "cannot be started: No space left on device")]
)
def test_little_shared_memory_is_enough_or_the_reason_is_given(cells: Path, shm: str, message: str) -> None:
    """Batches do not go through it; the semaphores do."""
    if os.geteuid() or not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("only root may mount")
    done = moments(cells, 2, 400, shm=shm)
    assert message in done.stdout
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_batches(cells: Path, workers: int) -> None:
    batches = list(reading(cells, workers=workers))
    assert [[tuple(t.shape) for t in batch] for batch in batches[:2]] == [[(4, 3, 16, 16), (4,), (4,)]] * 2
    assert [batch[0].dtype for batch in batches] == [torch.float32] * len(batches)
    batches[0][0].zero_()  # it can be written to
    assert not any(t.is_shared() for batch in batches for t in batch)


def test_an_image_that_vanished_is_named_without_a_traceback(cells: Path) -> None:
    images = ImageSet([Item("lost.png", 0)], data=cells, preprocess=Preprocess(16))
    with pytest.raises(DataError, match=r"lost\.png") as raised:
        list(Loader(images, batch_size=1, sampler=EpochSampler(1), workers=1))
    assert "Traceback" not in str(raised.value)


def test_a_process_that_was_killed(cells: Path) -> None:
    images = reading(cells).dataset.images  # type: ignore[attr-defined]
    batches = Loader(images, batch_size=4, sampler=Endless(4), workers=1)
    running = iter(batches)
    next(running)
    os.kill(batches._iterator._workers[0].pid, signal.SIGKILL)  # type: ignore[union-attr]
    with pytest.raises(TrainingError, match="was killed") as raised:
        for _ in running:
            pass
    assert "--workers" in raised.value.fix


class Endless(EpochSampler):
    """The first image, again and again."""

    def __len__(self) -> int:
        return 10**6

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter([(0, 0)] * 10**6)
