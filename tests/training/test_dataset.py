"""Batches: the same whatever the workers and restarts; augmentation checked pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgekd.data.preprocess import Preprocess, open_image
from edgekd.data.split import Item
from edgekd.errors import ConfigError, DataError
from edgekd.training.augment import Augment, augmented
from edgekd.training.dataset import ClassSampler, EpochSampler, ImageSet
from edgekd.training.loader import Loader

ALL = Augment((0.5, 1.0), (0.75, 1.33), hflip=0.5, vflip=0.5, transpose=0.5, rotation=180, jitter=(0.3, 0.5, 0.3, 0.1))
PLAIN = Preprocess(8)


def noise(size: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def vary(augment: Augment, seed: int = 0, preprocess: Preprocess = PLAIN) -> np.ndarray:
    return augmented(noise(preprocess.image_size), augment, preprocess, np.random.default_rng(seed))


@pytest.fixture
def images(shared: Path) -> ImageSet:
    data = shared / "data" / "sipakmed"
    paths = sorted(p.relative_to(data).as_posix() for p in (data / "Parabasal").iterdir())[:10]
    return ImageSet([Item(p, 3) for p in paths], data=data, preprocess=Preprocess(32), augment=ALL, seed=1)


def test_nothing_asked_is_the_preprocessing_alone(images: ImageSet) -> None:
    image = open_image(images.data / images.items[0].path)
    for preprocess in (Preprocess(32), Preprocess(32, resize="crop")):
        same = augmented(image, Augment(), preprocess, np.random.default_rng(0))
        np.testing.assert_array_equal(same, preprocess(image))


def test_flips_and_transposes_by_hand() -> None:
    plain = PLAIN(noise())
    np.testing.assert_array_equal(vary(Augment(hflip=1)), plain[:, :, ::-1])
    np.testing.assert_array_equal(vary(Augment(vflip=1)), plain[:, ::-1])
    np.testing.assert_array_equal(vary(Augment(transpose=1)), plain.transpose(0, 2, 1))
    flipped = sum(bool((vary(Augment(hflip=0.25), seed) != plain).any()) for seed in range(400))
    assert 70 <= flipped <= 130


def test_crops_stay_inside_and_keep_their_range() -> None:
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3)))
    preprocess = Preprocess(32, mean=(0, 0, 0), std=(1, 1, 1))
    for seed in range(50):
        row = augmented(ramp, Augment((0.25, 0.25), (1, 1)), preprocess, np.random.default_rng(seed))[0, 0] * 255
        assert row[-1] - row[0] == pytest.approx(128 * 31 / 32, abs=2)  # half the width of a ramp
        assert 0 <= row[0] <= 130


def test_rotation_fills_with_zeros_and_jitter_keeps_the_range() -> None:
    turned = np.stack([vary(Augment(rotation=45), seed, Preprocess(32)) for seed in range(20)])
    assert np.abs(turned[:, :, 0, 0]).min(axis=0).max() < 0.02
    plain = Preprocess(32, mean=(0, 0, 0), std=(1, 1, 1))
    jittered = vary(Augment(jitter=(0.5, 0.5, 0.5, 0.2)), 1, plain)
    assert jittered.dtype == np.float32
    assert 0 <= jittered.min() < jittered.max() <= 1
    assert (jittered != plain(noise(32))).any()


@pytest.mark.parametrize(
    "wrong",
    [{"crop_scale": (0, 1)}, {"crop_ratio": (2, 1)}, {"hflip": 2}, {"rotation": 270}, {"jitter": (0, 0, 0, 0.6)}],
)
def test_settings_that_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Augment(**wrong)  # type: ignore[arg-type]


def epoch_of(images: ImageSet, epoch: int, workers: int) -> torch.Tensor:
    sampler = EpochSampler(len(images), seed=5)
    sampler.set_epoch(epoch)
    batches = list(Loader(images, batch_size=4, sampler=sampler, workers=workers))
    assert all((labels == 3).all() for _, labels, _ in batches)
    order = torch.cat([index for _, _, index in batches])
    return torch.cat([pixels for pixels, _, _ in batches])[order.argsort()]


def test_workers_change_nothing_and_epochs_do(images: ImageSet) -> None:
    alone = epoch_of(images, 2, 0)
    assert torch.equal(alone, epoch_of(images, 2, 2))
    assert torch.equal(alone[4], images[2, 4][0])
    assert not torch.equal(alone, epoch_of(images, 3, 0))


def test_one_loader_over_epochs_with_workers_that_stay(images: ImageSet) -> None:
    sampler = EpochSampler(len(images), shuffle=False)
    batches = Loader(images, batch_size=10, sampler=sampler, workers=1)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert torch.equal(next(iter(batches))[0][0], images[epoch, 0][0])


def test_sampler_shares_out_evenly() -> None:
    ranks = [list(EpochSampler(10, seed=1, rank=rank, world=3)) for rank in range(3)]
    assert [len(r) for r in ranks] == [4, 4, 4]
    seen = [index for r in ranks for _, index in r]
    assert set(seen) == set(range(10))
    assert list(EpochSampler(3, shuffle=False)) == [(0, 0), (0, 1), (0, 2)]
    assert list(EpochSampler(10, seed=1)) != list(EpochSampler(10, seed=2))


UNEVEN = ["a"] * 11 + ["b"] * 4 + ["c"] * 20 + ["d"] * 5
BY_CLASS = ClassSampler(UNEVEN, per_class=4, batch_size=12, seed=1)


def batches_of(sampler: ClassSampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert len(order) == len(sampler)
    assert {e for e, _ in order} == {epoch}
    return [[i for _, i in order[k : k + 12]] for k in range(0, len(order), 12)]


def test_batches_of_classes() -> None:
    """Each of 4 different images of 3 classes; over the epochs all images come, a class's all about as often."""
    counts = np.zeros(len(UNEVEN))
    for epoch in range(40):
        batches = batches_of(BY_CLASS, epoch)
        assert len(batches) == 3
        for batch in batches:
            names, sizes = np.unique([UNEVEN[i] for i in batch], return_counts=True)
            assert (len(names), set(sizes), len(set(batch))) == (3, {4}, 12)
            counts[batch] += 1
    for name in "abcd":
        own = counts[[c == name for c in UNEVEN]]
        assert own.sum() == pytest.approx(40 * 3 * 12 / 4, rel=0.15)
        np.testing.assert_allclose(own, own.mean(), rtol=0.4)


def test_batches_of_classes_depend_on_seed_and_epoch_alone_and_are_shared_out() -> None:
    again = ClassSampler(UNEVEN, per_class=4, batch_size=12, seed=1)
    assert batches_of(again, 5) == batches_of(BY_CLASS, 5) != batches_of(BY_CLASS, 6)
    assert batches_of(ClassSampler(UNEVEN, per_class=4, batch_size=12, seed=2), 5) != batches_of(BY_CLASS, 5)
    ranks = [ClassSampler(UNEVEN * 2, per_class=4, batch_size=12, rank=r, world=2) for r in range(2)]
    whole = batches_of(ClassSampler(UNEVEN * 2, per_class=4, batch_size=12), 3)
    left, right = (batches_of(sampler, 3) for sampler in ranks)
    assert left == whole[::2]
    assert right == whole[1::2]


@pytest.mark.parametrize(
    ("per_class", "batch_size", "message"),
    [
        (4, 20, "a batch of 20 images, 4 of a class, cannot be made of 4 classes\nuse --set batch_size=16"),
        (4, 14, "a batch of 14 images, 4 of a class"),
        (4, 4, "a batch of 4 images, 4 of a class"),
        (5, 15, "class b has 4 training images, and a batch takes 5 of a class\nuse --set per_class=4"),
    ],
)
def test_batches_that_classes_cannot_fill(per_class: int, batch_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClassSampler(UNEVEN, per_class=per_class, batch_size=batch_size)


def test_errors_name_the_cause(images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="10 training images a process do not fill a batch of 16"):
        Loader(images, batch_size=16, sampler=EpochSampler(10), drop_last=True)
    with pytest.raises(DataError, match=r"lost\.png: no such file"):
        ImageSet([Item("lost.png", 0)], data=tmp_path, preprocess=PLAIN)[0, 0]
