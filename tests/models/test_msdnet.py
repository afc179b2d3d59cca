"""MSDNet: shapes, the published code's parameter counts, and stages that depend on nothing but their boundary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.multi_exit_outputs import THREE_EXITS, training_batch
from torch import Tensor, nn

from edgekd.artifacts.metadata import ModelMetadata
from edgekd.data.preprocess import Preprocess
from edgekd.distill.base import NetworkOutput
from edgekd.distill.criterion import Criterion, LossSettings
from edgekd.errors import ConfigError
from edgekd.export import export
from edgekd.models.base import Outputs, exits_of
from edgekd.models.msdnet import LARGE, MSDNet, msdnet
from edgekd.models.networks import build
from edgekd.policy import Policy


def scales(out: Outputs, k: int) -> tuple[Tensor, ...]:
    """An exit's boundary; MSDNet's are always tuples."""
    found = out.maps[k]
    assert isinstance(found, tuple)
    return found


STEM = {32: "small", 96: "imagenet", 224: "imagenet"}


def lively(**kwargs: object) -> MSDNet:
    """In eval mode, with running statistics of its own, so that no two maps happen to be alike."""
    torch.manual_seed(0)
    net = msdnet(**kwargs)  # type: ignore[arg-type]
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return net.eval()


@pytest.mark.parametrize(
    ("size", "classes", "blocks", "parameters"),
    [(32, 100, 4, 1_534_716), (32, 100, 7, 3_067_960), (224, 1000, 4, 19_500_352), (224, 1000, 5, 23_958_440)],
)
def test_parameters_of_the_published_code(size: int, classes: int, blocks: int, parameters: int) -> None:
    """Counted there with `--base 4 --stepmode even`, 16 channels and step 2 for CIFAR (7 blocks are its README's),
    32 and 4 for ImageNet (5 are)."""
    with torch.device("meta"):
        net = msdnet(classes=classes, stem=STEM[size], exits=tuple(range(1, blocks + 1)))
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("size", "widths", "shapes"),
    [
        (
            32,
            [128] * 4,
            [[(40, 32), (80, 16), (160, 8)], [(58, 16), (116, 8)], [(82, 16), (164, 8)], [(116, 8)]],
        ),
        (
            96,
            [384, 416, 432, 440],
            [
                [(96, 24), (192, 12), (384, 6), (384, 3)],
                [(208, 12), (416, 6), (416, 3)],
                [(432, 6), (432, 3)],
                [(440, 3)],
            ],
        ),
    ],
)
def test_shapes(batch: int, size: int, widths: list[int], shapes: list[list[tuple[int, int]]]) -> None:
    """Maps by hand: width w times the scale's factor. Small: w = 16 + 4 * 6 = 40; then a scale is dropped and w
    halved, (40 + 6) // 2 + 6 = 29; 29 + 2 * 6 = 41; (41 + 6) // 2 + 6 = 29. Large: 96, 104, 108, 110."""
    out = build("msdnet", classes=7, image_size=size, stem=STEM[size]).eval()(torch.randn(batch, 3, size, size))
    assert [tuple(s.shape) for s in out.logits] == [(batch, 7)] * 4
    assert [tuple(f.shape) for f in out.features] == [(batch, w) for w in widths]
    assert [[(m.shape[1], m.shape[2]) for m in scales(out, k)] for k in range(4)] == shapes


@pytest.mark.parametrize("size", [32, 96])
def test_a_stage_needs_only_the_maps_before_it(size: int) -> None:
    """Each block run on its boundary alone gives the next boundary and logits of the whole network."""
    net = lively(classes=5, stem=STEM[size])
    whole = net(torch.randn(2, 3, size, size))
    for k in range(1, 4):
        state = net.backbone[k]([m.clone() for m in scales(whole, k - 1)])
        assert torch.equal(net.exits[k](state[-1])[0], whole.logits[k])
        assert all(torch.equal(a, b) for a, b in zip(state[-len(scales(whole, k)) :], scales(whole, k)))


def test_every_boundary_map_is_needed() -> None:
    """Zeroing any one scale changes the next exit or one behind it."""
    net = lively(classes=5, stem="small")
    whole = net(torch.randn(2, 3, 32, 32))
    for k in range(3):
        for s in range(len(scales(whole, k))):
            state = [torch.zeros_like(m) if i == s else m for i, m in enumerate(scales(whole, k))]
            changed = False
            for j in range(k + 1, 4):
                state = net.backbone[j](state)
                changed |= not torch.equal(net.exits[j](state[-1])[0], whole.logits[j])
            assert changed, (k, s)


def test_an_exit_does_not_depend_on_later_blocks() -> None:
    net, images = lively(classes=5, stem="small"), torch.randn(2, 3, 32, 32)
    before = net(images).logits
    for p in net.backbone[2].parameters():
        nn.init.normal_(p)
    after = net(images).logits
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [True, True, False, False]


def test_exits_between_blocks_can_be_left_out() -> None:
    """Exits 2 and 4: the same four blocks, and what the third takes over is the boundary of the second."""
    torch.manual_seed(3)
    some = msdnet(classes=5, stem="small", exits=(2, 4))
    out = some.eval()(torch.randn(1, 3, 32, 32))
    assert len(some.backbone) == 4
    assert [len(m) for m in out.maps] == [2, 1]
    assert [tuple(m.shape[1:]) for m in scales(out, 0)] == [(58, 16, 16), (116, 8, 8)]


@pytest.mark.parametrize("exits", [(0, 1), (2, 1), (1, 1), (), ("final",), (1, "final")])
def test_impossible_exits(exits: tuple[int | str, ...]) -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        build("msdnet", classes=5, image_size=32, exits=exits)


def test_an_output_of_fewer_images() -> None:
    output = NetworkOutput(lively(classes=5, stem="small")(torch.randn(3, 3, 32, 32)))
    assert torch.equal(output.first(2).outputs.logits[1], output.outputs.logits[1][:2])


def test_joint_training_reaches_every_parameter() -> None:
    """The paper's loss is the sum of cross-entropies: method `ce`."""
    torch.manual_seed(0)
    net, target = msdnet(classes=5, stem="small"), torch.tensor([0, 1, 2, 3])
    Criterion(LossSettings())(training_batch(net(torch.randn(4, 3, 32, 32)), target=target)).backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not idle


@pytest.mark.parametrize("name", ["sd", "byot", "scan"])
def test_methods_that_compare_features_refuse_unequal_widths(name: str) -> None:
    net = MSDNet(LARGE, classes=5, exits=(1, 2)).eval()
    criterion = Criterion(LossSettings(method=name), student=THREE_EXITS)
    with pytest.raises(ConfigError, match=r"exit_0 \d+, exit_1 \d+") as caught:
        criterion(training_batch(net(torch.randn(2, 3, 96, 96)), target=[0, 1]))
    assert "multi-exit-resnet18" in caught.value.fix


def test_exported_and_cut(tmp_path: Path) -> None:
    """`export` checks that each stage follows from its boundary, and compares the logits."""
    net = lively(classes=5, stem="small", exits=(1, 2))
    exits = exits_of(net(torch.zeros(1, 3, 32, 32)))
    assert [e.boundary for e in exits] == [("stage_0_0", "stage_0_1"), ("stage_1",)]
    metadata = ModelMetadata("msdnet", tuple("abcde"), Preprocess(32), exits, Policy((1.0,) * 2))
    images = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    assert export(net, metadata, out=tmp_path / "student.onnx", images=images, names=list("abc")) < 1e-5
