"""Synthetic cells: the same seed draws the same pixels, and the folder is one that the data room takes."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekd.data.folders import check, scan
from edgekd.data.splitting import make_split
from edgekd.data.synthetic import CLASSES, SPREAD, write_cells
from edgekd.errors import DataError


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {p.relative_to(folder).as_posix(): np.asarray(Image.open(p)) for p in folder.rglob("*.png")}


def test_seed_decides_every_pixel(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        write_cells(tmp_path / name, count=12, size=32, seed=seed)
    one, same, other = (pixels(tmp_path / name) for name in ("one", "same", "other"))
    assert one.keys() == same.keys()
    assert all((one[path] == same[path]).all() for path in one)
    assert any((one[path] != other[path]).any() for path in one.keys() & other.keys())


def test_cells_pass_the_checks_and_have_groups(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    write_cells(tmp_path / "cells", count=152, progress=lambda done, total: steps.append((done, total)))
    checked = check(scan(tmp_path / "cells"))
    assert checked.folder.classes == tuple(CLASSES) == tuple(sorted(CLASSES))
    assert np.bincount([i.label for i in checked.folder.items]).tolist() == [31, 31, 30, 30, 30]
    assert steps[-1] == (152, 152)
    split = make_split(checked, group="cluster")
    assert split.leaking == 0
    assert split.groups >= 5 * 3
    assert next(iter(pixels(tmp_path / "cells").values())).shape == (64, 64, 3)


def test_classes_overlap_but_differ() -> None:
    """Who knew a cell's true measures would still mistake about one in a hundred; a network only sees pixels."""
    mean = np.array([astuple(cell) for cell in CLASSES.values()]) / astuple(SPREAD)
    rng = np.random.default_rng(0)
    label = rng.integers(0, len(CLASSES), 20_000)
    distance = np.linalg.norm((mean[label] + rng.normal(size=(20_000, 6)))[:, None] - mean, axis=-1)
    assert 0.98 < (distance.argmin(axis=1) == label).mean() < 0.995


def test_invalid_arguments_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(DataError, match="is not empty"):
        write_cells(tmp_path)
    with pytest.raises(DataError, match="too few"):
        write_cells(tmp_path / "cells", count=9)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
