"""The small networks in the tables of Gao et al. 2022: shapes, parameters worked by hand, training and export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.artifacts.metadata import ModelMetadata
from edgekd.data.preprocess import Preprocess
from edgekd.export import export
from edgekd.models.base import exits_of
from edgekd.models.networks import build
from edgekd.models.papers import compact_vgg, deep_pap, dense, mlp
from edgekd.policy import Policy

NAMES = ["mlp", "compact-vgg", "deep-pap"]


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_parameters_by_hand() -> None:
    with torch.device("meta"):
        sizes = [count(make(classes=5, image_size=224)) for make in (mlp, compact_vgg)]
    three = 3072 * 512 + 512 + 512 * 128 + 128 + 128 * 5 + 5
    convs = [(3, 32), (32, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256), (256, 256)]
    assert sizes == [three, sum(9 * a * b + 3 * b for a, b in convs) + 256 * 257 + 257 * 5]
    assert sizes[1] == 2_376_069


def test_deep_pap_has_caffenet_s_convolutions() -> None:
    """Its five have as many weights and biases: 34,944 + 307,456 + 885,120 + 663,936 + 442,624;
    at 227 pixels 256 maps of 6 x 6 go into the linear layers."""
    net = deep_pap(classes=5, image_size=227)
    features = net[0]
    assert count(features) == 34_944 + 307_456 + 885_120 + 663_936 + 442_624
    assert count(net) - count(features) == 9216 * 1024 + 1024 + 1024 * 256 + 256 + 256 * 5 + 5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "batch"), [(32, 1), (64, 2), (96, 1), (112, 2), (150, 1)])
def test_shapes(name: str, size: int, batch: int) -> None:
    out = build(name, classes=7, image_size=size).eval()(torch.randn(batch, 3, size, size))
    assert [tuple(s.shape) for s in out.logits] == [(batch, 7)]
    assert not out.features
    assert not out.maps


def test_mlp_sees_an_average() -> None:
    """At 64 pixels, shuffling the pixels inside 2 x 2 squares changes nothing."""
    net, x = mlp(classes=3, image_size=64).eval(), torch.randn(2, 3, 64, 64)
    flipped = x.reshape(2, 3, 32, 2, 64).flip(3).reshape(2, 3, 64, 64)
    torch.testing.assert_close(net(x), net(flipped))
    assert not torch.allclose(net(x), net(x.flip(3)))


def test_dense_ends_bare() -> None:
    assert [type(m).__name__ for m in dense(4, 3, 2, dropout=0.5)] == ["Linear", "ReLU", "Dropout", "Linear"]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_training_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    net = build(name, classes=5, image_size=32)
    nn.functional.cross_entropy(net(torch.randn(4, 3, 32, 32)).logits[0], torch.arange(4)).backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]


@pytest.mark.parametrize("name", NAMES)
def test_exported(tmp_path: Path, name: str) -> None:
    net = build(name, classes=5, image_size=32).eval()
    metadata = ModelMetadata(
        name, tuple("abcde"), Preprocess(32), exits_of(net(torch.zeros(1, 3, 32, 32))), Policy((1.0,))
    )
    images = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    assert export(net, metadata, out=tmp_path / "student.onnx", images=images, names=list("abc")) < 1e-5
