"""The settings that tests train a tiny network with, in seconds."""

from __future__ import annotations

from edgekd.data.preprocess import Preprocess
from edgekd.training.protocol import Protocol

TINY = Protocol(
    network="test_resnet",
    weights="none",
    precision="32-true",
    preprocess=Preprocess(32),
    epochs=1,
    batch_size=8,
    lr=0.01,
    workers=0,
)
