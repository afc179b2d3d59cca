"""Images of a split and their order, independent of the number of workers and of restarts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, Sampler

from edgekd.data.preprocess import Preprocess, open_image
from edgekd.data.split import Item
from edgekd.errors import ConfigError
from edgekd.training.augment import Augment, augmented

Sample: TypeAlias = tuple[torch.Tensor, int, int]
Key: TypeAlias = tuple[int, int]


class ImageSet(Dataset[Sample]):
    """Images of one subset: `images[epoch, index]` is (float32 (3, H, W), label, index).

    Augmentation is a function of (seed, epoch, index) alone; without it the epoch has no influence.

    Args:
        items: The images' paths and labels.
        data: Folder that the paths are relative to.
        preprocess: Preprocessing of the images.
        augment: Augmentation; None for none.
        seed: Seed of the augmentation.

    Raises:
        DataError: When indexed: the file cannot be read; it is named.
    """

    def __init__(
        self,
        items: Sequence[Item],
        *,
        data: Path,
        preprocess: Preprocess,
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        self.items = tuple(items)
        self.data = data
        self.preprocess = preprocess
        self.augment = augment
        self.seed = seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Key) -> Sample:
        epoch, index = key
        item = self.items[index]
        image = open_image(self.data / item.path)
        if self.augment is None:
            pixels = self.preprocess(image)
        else:
            rng = np.random.default_rng((self.seed, epoch, index))
            pixels = augmented(image, self.augment, self.preprocess, rng)
        return torch.from_numpy(pixels), item.label, index


class EpochSampler(Sampler[Key]):
    """Yields (epoch, index) pairs for one of `world` processes, the same number for each.

    The order is a function of (seed, epoch). If `count` is not a multiple of `world`, the order is padded with its
    first samples; an evaluation drops them by their index.

    Args:
        count: Number of images.
        seed: Seed of the order.
        rank: Index of this process, from 0.
        world: Number of processes.
        shuffle: Shuffle the images; else they are in their own order.
    """

    def __init__(self, count: int, *, seed: int = 0, rank: int = 0, world: int = 1, shuffle: bool = True) -> None:
        self.count = count
        self.seed = seed
        self.rank = rank
        self.world = world
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0, of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.count / self.world)

    def __iter__(self) -> Iterator[Key]:
        order = np.arange(self.count)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        own = np.resize(order, len(self) * self.world)[self.rank :: self.world]
        return iter([(self.epoch, int(index)) for index in own])


class ClassSampler(EpochSampler):
    """Yields batches of `per_class` images (K) of each of batch_size / K classes (P), for triplets.

    The order is a function of (seed, epoch): each batch draws its classes, and each class yields its images in shuffled
    rounds, so that no image is in a batch twice. An epoch has as many batches as the images fill. Compared with plain
    shuffling, small classes are oversampled and large ones undersampled.

    Args:
        classes: Name of the class of each image.
        per_class: Images of a class in a batch, K.
        batch_size: Images in a batch, P * K.
        seed: Seed of the order.
        rank: Index of this process, from 0.
        world: Number of processes.

    Raises:
        ConfigError: The classes cannot fill such a batch, or it would have one class.
    """

    def __init__(
        self,
        classes: Sequence[str],
        *,
        per_class: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(len(classes), seed=seed, rank=rank, world=world)
        names, number = np.unique(np.asarray(classes), return_inverse=True)
        self.members = [np.flatnonzero(number == k) for k in range(len(names))]
        self.per_class, self.batch_size = per_class, batch_size
        smallest = min(range(len(names)), key=lambda k: len(self.members[k]))
        size, many = len(self.members[smallest]), len(names)
        if size < per_class:
            raise ConfigError(
                f"class {names[smallest]} has {size} training images, and a batch takes {per_class} of a class",
                fix=f"use --set per_class={size}" if size > 1 else "use --set sampler=shuffle, or more images",
            )
        if batch_size % per_class or not 2 <= batch_size // per_class <= many:
            raise ConfigError(
                f"a batch of {batch_size} images, {per_class} of a class, cannot be made of {many} classes",
                fix=f"use --set batch_size={many * per_class}, a smaller multiple of {per_class}, or another per_class",
            )

    def __len__(self) -> int:
        return max(1, self.count // (self.batch_size * self.world)) * self.batch_size

    def __iter__(self) -> Iterator[Key]:
        rng = np.random.default_rng((self.seed, self.epoch))
        groups = [_shuffled_groups(own, self.per_class, rng) for own in self.members]
        drawn = self.batch_size // self.per_class
        batches = [
            [int(index) for k in rng.permutation(len(groups))[:drawn] for index in next(groups[k])]
            for _ in range(len(self) // self.batch_size * self.world)
        ]
        return iter([(self.epoch, index) for batch in batches[self.rank :: self.world] for index in batch])


def _shuffled_groups(
    members: npt.NDArray[np.intp], count: int, rng: np.random.Generator
) -> Iterator[npt.NDArray[np.intp]]:
    """Yield groups of `count` images of one class without end; each round is shuffled, and its remainder is dropped."""
    while True:
        yield from rng.permutation(members)[: len(members) // count * count].reshape(-1, count)
