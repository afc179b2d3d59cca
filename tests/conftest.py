"""Fixtures: the real images beside the project, and a small exported student."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
from fakes.machine import box, small_student  # noqa: F401  # fixtures
from faults.base import make_base
from helpers.device_kernel import kernels  # noqa: F401  # a fixture
from helpers.light import pytest_collection_modifyitems, pytest_ignore_collect  # noqa: F401  # hooks

if TYPE_CHECKING:
    pass


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and weights; tests that need it skip where it is missing."""
    if not (SHARED / "data" / "sipakmed").is_dir():
        pytest.skip(f"real images are missing: no {SHARED / 'data'}")
    return SHARED


@pytest.fixture
def without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    """An x86 CPU that says it has no VNNI. What the libraries run is the real one's."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("only x86 can be without VNNI")
    monkeypatch.setattr("edgekd.host._cpuinfo", lambda key: "fpu avx2" if key == "flags" else "Old CPU")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the fault tests work on: see tests/faults/base.py."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("faults") / "base"
    make_base(folder)
    return folder


@pytest.fixture(scope="session")
def student_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multi-exit ResNet18 for 5 classes at 32 pixels with seeded random weights, exported."""
    import torch

    from edgekd.artifacts.metadata import ModelMetadata
    from edgekd.data.preprocess import Preprocess
    from edgekd.export import export
    from edgekd.models.base import exits_of
    from edgekd.models.networks import build
    from edgekd.policy import Policy

    torch.manual_seed(0)
    network = build("multi-exit-resnet18", classes=5, image_size=32, stem="small")
    for head in network.exits:  # the blocks start as identities; these shall do something
        torch.nn.init.normal_(head.context.transform[-1].weight, std=0.05)
    images = np.random.default_rng(0).normal(size=(8, 3, 32, 32)).astype(np.float32)
    exits = exits_of(network.eval()(torch.from_numpy(images)))
    metadata = ModelMetadata("multi-exit-resnet18", tuple("abcde"), Preprocess(32), exits, Policy((1.0,) * 4))
    path = tmp_path_factory.mktemp("student") / "student.onnx"
    export(network, metadata, out=path, images=images, names=[f"image {i}" for i in range(8)])
    return path


@pytest.fixture(scope="session")
def two_maps_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of two scales and two exits for 5 classes at 16 pixels, cut through both maps, exported."""
    import torch
    from torch import nn

    from edgekd.artifacts.metadata import ModelMetadata
    from edgekd.data.preprocess import Preprocess
    from edgekd.export import export
    from edgekd.models.base import MultiExitNetwork, Outputs, exits_of
    from edgekd.policy import Policy

    class TwoScales(MultiExitNetwork):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.coarse = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, stride=2, padding=1)
            self.down, self.same = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Conv2d(12, 16, 1)
            self.heads = nn.ModuleList([nn.Linear(12, 5), nn.Linear(16, 5)])

        def forward(self, x: torch.Tensor) -> Outputs:
            fine = self.fine(x).relu()
            coarse = self.coarse(fine).relu()
            last = (self.down(fine) + self.same(coarse)).relu()
            features = tuple(m.mean((2, 3)) for m in (coarse, last))
            logits = tuple(head(f) for head, f in zip(self.heads, features))
            return Outputs(logits, features, ((fine, coarse), last))

    torch.manual_seed(0)
    network = TwoScales().eval()
    images = np.random.default_rng(0).normal(size=(8, 3, 16, 16)).astype(np.float32)
    exits = exits_of(network(torch.from_numpy(images)))
    metadata = ModelMetadata("two-scales", tuple("abcde"), Preprocess(16), exits, Policy((1.0,) * 2))
    path = tmp_path_factory.mktemp("two") / "student.onnx"
    export(network, metadata, out=path, images=images, names=[f"image {i}" for i in range(8)])
    return path


class Exported(NamedTuple):
    """student.onnx, the largest difference of its logits from torch, and forty real cells, eight of each class."""

    path: Path
    difference: float
    cells: np.ndarray


@pytest.fixture(scope="session")
def exported(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Networks by name, exported when first asked for: chance weights, batch norm measured on the cells."""
    import torch

    from edgekd.artifacts.metadata import ModelMetadata
    from edgekd.data.images import load_batch
    from edgekd.data.preprocess import Preprocess
    from edgekd.export import export
    from edgekd.models.base import exits_of
    from edgekd.models.networks import build
    from edgekd.policy import Policy

    folders = sorted((shared / "data" / "sipakmed").iterdir())
    files = [file for folder in folders for file in sorted(folder.iterdir())[:8]]

    @functools.cache
    def make(name: str) -> Exported:
        size = 72 if "resnet" in name else 48
        cells = load_batch(files, Preprocess(size))
        torch.manual_seed(0)
        network = build(name, classes=5, image_size=size, stem="small" if name == "msdnet" else "imagenet")
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
                torch.nn.init.constant_(module.weight, 0.5)  # some start at 0, and their blocks would do nothing
                torch.nn.init.constant_(module.bias, 0.5)  # at 0, deep networks of chance weights are chaotic
        with torch.no_grad():
            network.train()(torch.from_numpy(cells[::5]))
            out = network.eval()(torch.from_numpy(cells[:1]))
        metadata = ModelMetadata(
            name, tuple("abcde"), Preprocess(size), exits_of(out), Policy((1.0,) * len(out.logits))
        )
        path = tmp_path_factory.mktemp("exported") / "student.onnx"
        names = [f"cell {i}" for i in range(8)]
        return Exported(path, export(network, metadata, out=path, images=cells[::5], names=names), cells)

    return make


@pytest.fixture(scope="session")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 synthetic cells of 24 pixels in five classes, 35 of them for training with the seed 0."""
    from edgekd.data.synthetic import write_cells

    folder = tmp_path_factory.mktemp("cells") / "cells"
    write_cells(folder, count=60, size=24)
    return folder
