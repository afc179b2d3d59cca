"""What networks cost, against published counts and numbers worked by hand; the command that prints it."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.cli import edgekd
from torch import Tensor, nn

from edgekd.errors import ConfigError
from edgekd.models.cost import cost, count
from edgekd.models.networks import build


@pytest.mark.parametrize(
    ("name", "parameters_m", "macs_g"),
    [
        ("resnet18", 11.69, 1.82),
        ("mobilenet_v2", 3.50, 0.30),
        ("shufflenet_v2_x1_0", 2.28, 0.146),
        ("squeezenet1_1", 1.24, 0.35),
        ("densenet121", 7.98, 2.87),
        ("ghostnet_100", 5.18, 0.141),
    ],
)
def test_published_counts_at_224_pixels_and_1000_classes(name: str, parameters_m: float, macs_g: float) -> None:
    """The papers' own tables. Parameters fit to the digits printed; the papers' multiply-adds within 2 %, since some
    count biases, normalisation or pooling too."""
    found = cost(name, classes=1000, image_size=224)
    assert found.parameters / 1e6 == pytest.approx(parameters_m, abs=0.006)
    assert found.macs / 1e9 == pytest.approx(macs_g, rel=0.02)


@pytest.mark.parametrize(
    ("name", "parameters_m"),
    [
        ("vgg19", 143.7),
        ("alexnet", 61.1),
        ("resnet50", 25.6),
        ("resnet101", 44.5),
        ("resnet152", 60.2),
        ("inception_v3", 23.8),  # without the auxiliary classifier, 27.2 with it
        ("resnest50d", 27.5),
        ("resnext101_32x8d", 88.8),
    ],
)
def test_published_parameters_of_large_networks(name: str, parameters_m: float) -> None:
    with torch.device("meta"):
        network = build(name, classes=1000, image_size=224)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(parameters_m, abs=0.06)


@pytest.mark.parametrize(("name", "parameters_m", "size_mb"), [("mixnet_s", 2.6, 10.44), ("mixnet_l", 5.8, 23.218)])
def test_parameters_of_garg2022(name: str, parameters_m: float, size_mb: float) -> None:
    """At 8 classes. The paper's sizes are parameters x 4 bytes; a checkpoint also holds the buffers, 1.3 % more."""
    found = cost(name, classes=8, image_size=112)
    assert found.parameters / 1e6 == pytest.approx(parameters_m, abs=0.05)
    assert found.parameters * 4 / 1e6 == pytest.approx(size_mb, rel=1e-3)
    assert 0 < found.checkpoint_mb - size_mb < 0.02 * size_mb


class Example(nn.Module):
    """The network in torchstat's README."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 10, 5), nn.Conv2d(10, 20, 5)
        self.drop = nn.Dropout2d()
        self.fc1, self.fc2 = nn.Linear(56180, 50), nn.Linear(50, 10)

    def forward(self, x: Tensor) -> Tensor:
        pool = nn.functional.max_pool2d
        x = pool(self.conv1(x), 2).relu()
        x = pool(self.drop(self.conv2(x)), 2).relu()
        answer: Tensor = self.fc2(self.fc1(x.flatten(1)).relu())
        return answer


def test_the_example_of_torchstat() -> None:
    """It prints 95,998,220 operations, of which the convolutions' biases are one for each number they return, and
    3.56 MB of memory."""
    macs, returned = count(Example(), torch.zeros(1, 3, 224, 224))
    assert macs == 95_998_220 - 10 * 220**2 - 20 * 106**2
    assert returned / 2**20 == pytest.approx(3.56, abs=0.005)


def test_memory_of_chen2022() -> None:
    """It prints ShuffleNetV2's memory as 1/7 of DenseNet-121's; torchstat gives 20.85 and 147.1 MB."""
    assert cost("shufflenet_v2_x1_0", classes=1000, image_size=224).activation_mib == pytest.approx(20.85, abs=0.01)


def test_grouped_convolutions_and_matrix_products_by_hand() -> None:
    """(1, 8, 4, 4) through 8 groups of 3x3, then attention of 16 places with 8 numbers each."""

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)

        def forward(self, x: Tensor) -> Tensor:
            places = self.conv(x).flatten(2)
            return places @ (places.transpose(1, 2) @ places).softmax(-1)

    macs, returned = count(Attend(), torch.zeros(1, 8, 4, 4))
    assert macs == 8 * 9 * 16 + 16 * 16 * 8 + 8 * 16 * 16
    assert returned == 8 * 16 * 4


def test_exits_cost_little() -> None:
    """Three shallow exits on GhostNet: under a third more multiply-adds, and the plain network inside."""
    plain, exits = (cost(name, classes=5, image_size=64) for name in ("ghostnet_100", "multi-exit-ghostnet_100"))
    assert plain.parameters < exits.parameters < 1.1 * plain.parameters
    assert plain.macs < exits.macs < 1.33 * plain.macs


def test_an_unknown_network_and_an_image_that_is_too_small() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'squeezenet1_1'"):
        cost("squeezenet11", classes=5, image_size=64)
    with pytest.raises(ConfigError, match="cannot work on images of 32 x 32"):
        cost("inception_v3", classes=5, image_size=32)


def test_cost_as_text_and_json() -> None:
    words = ("cost", "squeezenet1_1", "mlp", "--image-size", "64", "--classes", "8")
    rows = edgekd("models", *words).splitlines()
    assert [row.split()[0] for row in rows] == ["network", "squeezenet1_1", "mlp"]
    costs = json.loads(edgekd("models", *words, "--json"))
    assert [c["network"] for c in costs] == ["squeezenet1_1", "mlp"]
    assert rows[1].split()[1] == f"{costs[0]['parameters'] / 1e6:.2f}"
    assert costs[0]["image_size"] == 64


def test_list() -> None:
    names = [line.strip() for line in edgekd("models", "list", "resnet18").splitlines()]
    assert {"multi-exit-resnet18", "scan-resnet18", "resnet18"} <= set(names)
    assert "resnet50" not in names
    assert "Did you mean 'ghostnet_100'" in edgekd("models", "list", "ghostnet_1000", code=1)


def test_show() -> None:
    text = edgekd("models", "show", "multi-exit-mobilenet_v2", "--features", "--image-size", "64")
    assert "stages: features.3, features.6, features.13, features" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("features.6 "))
    assert row == ["features.6", "stage", "2", "InvertedResidual", "32", "x", "8", "x", "8"]
    assert "features.3 " not in edgekd("models", "show", "mobilenet_v2", "--image-size", "64")
    assert "stages: none" in edgekd("models", "show", "mlp", "--image-size", "64", "--features")
    assert "Did you mean 'multi-exit-mobilenet_v2'" in edgekd(
        "models", "show", "multi-exit-mobilenetv2", "--features", code=1
    )
