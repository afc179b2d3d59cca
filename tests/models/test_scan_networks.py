"""SCAN: its network against the published code's counts, its attention, and its loss by hand and in numpy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.multi_exit_outputs import THREE_EXITS, outputs, training_batch
from scipy.special import log_softmax
from torch import Tensor, nn

from edgekd.artifacts.metadata import ModelMetadata
from edgekd.data.preprocess import Preprocess
from edgekd.distill.base import FeatureShapes
from edgekd.distill.criterion import Criterion, LossSettings
from edgekd.distill.methods import method_names
from edgekd.distill.scan import scan_loss
from edgekd.errors import ConfigError
from edgekd.export import export
from edgekd.models.base import Outputs, exits_of
from edgekd.models.networks import build
from edgekd.models.scan import Attention, scala, scan_resnet18, scan_resnet50
from edgekd.policy import Policy

LN3 = math.log(3.0)


def test_parameters_of_the_published_code() -> None:
    """Both counted there, for CIFAR-100."""
    with torch.device("meta"):
        small, large = (make(classes=100, stem="small") for make in (scan_resnet18, scan_resnet50))
    assert sum(p.numel() for p in small.parameters()) == 15_164_240
    assert sum(p.numel() for p in large.parameters()) == 61_149_904


@pytest.mark.parametrize(
    ("name", "size", "batch", "exits"),
    [
        ("scan-resnet18", 32, 1, (1, 2, 3, 4)),
        ("scan-resnet18", 112, 2, (1, 2, 3, 4)),
        ("scan-resnet18", 45, 2, (2, 4)),
        ("scan-resnet50", 32, 1, (3, 4)),
    ],
)
def test_shapes(name: str, size: int, batch: int, exits: tuple[int, ...]) -> None:
    """At 112 and 45 pixels some maps have odd sides, which the transposed convolution would overshoot."""
    width = 2048 if "50" in name else 512
    stem = "small" if size < 64 else "imagenet"
    out = build(name, classes=7, image_size=size, exits=exits, stem=stem).eval()(torch.randn(batch, 3, size, size))
    assert [tuple(s.shape) for s in out.logits] == [(batch, 7)] * len(exits)
    assert [tuple(f.shape) for f in out.features] == [(batch, width)] * len(exits)
    assert [m.shape[1] for m in out.maps if isinstance(m, Tensor)] == [width // 2 ** (4 - e) for e in exits]


@pytest.mark.parametrize("side", [7, 8])
def test_attention_is_a_mask(side: int) -> None:
    block, x = Attention(6), torch.randn(3, 6, side, side)
    mask = block.mask(x)
    assert ((mask > 0) & (mask < 1)).all()
    out = block.eval()(x)
    assert out.shape == x.shape
    assert (out.abs() < x.abs()).all()
    assert (out.sign() == x.sign()).all()


def test_attention_by_hand() -> None:
    """Zero weights and a normalisation that adds ln 3: the mask is sigmoid(ln 3) = 3/4 everywhere."""
    block, x = Attention(2).eval(), torch.randn(1, 2, 5, 5)
    up, norm = block.mask[3], block.mask[4]
    nn.init.zeros_(up.weight)
    nn.init.zeros_(up.bias)
    nn.init.constant_(norm.bias, LN3)
    torch.testing.assert_close(block(x), 0.75 * x)


def test_scala_reduces_in_one_step() -> None:
    assert scala(4, 16, 8).eval()(torch.randn(2, 4, 32, 32)).shape == (2, 16, 4, 4)


def test_an_exit_does_not_depend_on_later_stages() -> None:
    net, images = scan_resnet18(classes=5, stem="small").eval(), torch.randn(1, 3, 32, 32)
    before = net(images).logits
    for p in net.backbone.layer3.parameters():
        nn.init.normal_(p)
    assert [torch.equal(a, b) for a, b in zip(before, net(images).logits)] == [True, True, False, False]


def test_exits_are_those_of_a_resnet() -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        build("scan-resnet18", classes=5, image_size=32, exits=(1, 2))


def test_exported_and_cut(tmp_path: Path) -> None:
    """At 45 pixels the first two maps have odd sides."""
    torch.manual_seed(0)
    net = build("scan-resnet18", classes=5, image_size=45, exits=(1, 2, 4), stem="small").eval()
    exits = exits_of(net(torch.zeros(1, 3, 45, 45)))
    metadata = ModelMetadata("scan-resnet18", tuple("abcde"), Preprocess(45), exits, Policy((1.0,) * 3))
    images = np.random.default_rng(0).normal(size=(3, 3, 45, 45)).astype(np.float32)
    assert export(net, metadata, out=tmp_path / "student.onnx", images=images, names=list("abc")) < 1e-5


def test_loss_by_hand() -> None:
    """Shallow exit (1/2, 1/2), deepest (3/4, 1/4), label 0; at tau 1 both halves are ln 2. Features 1,000 apart twice:
    5e-7 times a sum of 2e6, however many images."""
    logits = (torch.zeros(2, 2), torch.tensor([[LN3, 0.0]] * 2))
    features = (torch.full((2, 1), 1e3), torch.zeros(2, 1))
    value = scan_loss(Outputs(logits, features, ()), torch.tensor([0, 0]), temperature=1.0)
    assert value.item() == pytest.approx(math.log(4 / 3) + math.log(2) + 1.0, abs=1e-5)


def test_loss_against_numpy() -> None:
    """With the default temperature the factor is the published 9."""
    out, target = outputs(), torch.tensor([0, 1, 2, 3, 4, 0])
    s, f = ([t.detach().double().numpy() for t in part] for part in (out.logits, out.features))

    hot = np.eye(5)[target.numpy()]
    expected = -(hot * log_softmax(s[2], axis=1)).sum() / 6
    for m in range(2):
        expected -= 0.5 * (hot * log_softmax(s[m], axis=1)).sum() / 6
        expected -= 0.5 * 9 * (np.exp(log_softmax(s[2] / 3, axis=1)) * log_softmax(s[m] / 3, axis=1)).sum() / 6
        expected += 5e-7 * ((f[m] - f[2]) ** 2).sum()
    loss = Criterion(LossSettings(method="scan"), student=THREE_EXITS)
    assert loss(training_batch(out, target=target)).item() == pytest.approx(expected, rel=1e-5)


def test_equal_exits_leave_the_teacher_s_entropy() -> None:
    logits, features = torch.randn(4, 5), torch.randn(4, 8)
    value = scan_loss(Outputs((logits,) * 2, (features,) * 2, ()), torch.arange(4), temperature=3.0)
    p = (logits / 3).softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    hard = nn.functional.cross_entropy(logits, torch.arange(4))
    assert value.item() == pytest.approx((1.5 * hard + 4.5 * entropy).item(), rel=1e-5)


def test_the_deepest_exit_learns_from_labels_alone() -> None:
    out, target = outputs(), torch.tensor([0, 1, 2, 3, 4, 0])
    scan_loss(out, target, temperature=3.0).backward()
    assert out.features[-1].grad is None
    alone = out.logits[-1].detach().requires_grad_()
    nn.functional.cross_entropy(alone, target).backward()
    torch.testing.assert_close(out.logits[-1].grad, alone.grad)
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in (*out.logits[:-1], *out.features[:-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 4])
def test_gradients_are_finite(dtype: torch.dtype, batch: int) -> None:
    """Batch 1, one class; features of 1,000, whose squares overflow half precision; repeated images."""
    one = outputs(1, dtype=dtype)
    repeated = Outputs(*(tuple(t.detach().repeat(batch, 1).requires_grad_() for t in part) for part in one[:2]), ())
    for out in (outputs(batch, dtype=dtype, scale=1e3), repeated):
        value = Criterion(LossSettings(method="scan"), student=THREE_EXITS)(training_batch(out))
        value.backward()
        assert value.dtype == torch.float32
        assert all(torch.isfinite(t.grad).all() for t in (*out.logits, *out.features[:-1]) if t.grad is not None)


def test_settings_reach_the_loss() -> None:
    out, target = outputs(), torch.tensor([0, 1, 2, 3, 4, 0])
    settings = LossSettings(method="scan", temperature=5.0, label_smoothing=0.1)
    expected = scan_loss(out, target, temperature=5.0, label_smoothing=0.1)
    assert Criterion(settings, student=THREE_EXITS)(training_batch(out, target=target)).item() == pytest.approx(
        expected.item()
    )
    assert expected.item() != pytest.approx(scan_loss(out, target, temperature=5.0).item())


def test_it_brings_its_own_cross_entropy_and_needs_exits() -> None:
    assert method_names("scan") == ["scan"]
    with pytest.raises(ConfigError, match="compares exits"):
        Criterion(LossSettings(method="scan"))


def test_a_step_of_training_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    net, target = scan_resnet18(classes=5, stem="small"), torch.tensor([0, 1])
    loss = Criterion(LossSettings(method="scan"), student=FeatureShapes(exits=4))
    loss(training_batch(net(torch.randn(2, 3, 32, 32)), target=target)).backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not idle
