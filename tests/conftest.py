"""Fixtures: the real images beside the project, and a small exported student."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest


def heed_ctrl_c() -> None:
    """For a child: what runs in the background, as CI may, hands down SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and weights; tests that need it skip where it is missing."""
    if not (SHARED / "data" / "sipakmed").is_dir():
        pytest.skip(f"real images are missing: no {SHARED / 'data'}")
    return SHARED


@pytest.fixture(scope="session")
def student_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multi-exit ResNet18 for 5 classes at 32 pixels with seeded random weights, exported."""
    import torch

    from edgekd.artifact import Card
    from edgekd.export import exits_of, export
    from edgekd.models import build
    from edgekd.runtime.policy import Policy
    from edgekd.runtime.preprocess import Preprocess

    torch.manual_seed(0)
    network = build("multi-exit-resnet18", classes=5, image_size=32)
    for head in network.exits:  # the blocks start as identities; these shall do something
        torch.nn.init.normal_(head.context.transform[-1].weight, std=0.05)
    card = Card("multi-exit-resnet18", tuple("abcde"), Preprocess(32), exits_of(4, 4), Policy((1.0,) * 4))
    images = np.random.default_rng(0).normal(size=(8, 3, 32, 32)).astype(np.float32)
    path = tmp_path_factory.mktemp("student") / "student.onnx"
    export(network, card, out=path, images=images, names=[f"image {i}" for i in range(8)])
    return path
