"""Feature points: found by name, seen, and the defaults of stages, pre-activations and pooled features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from edgekd.errors import ConfigError
from edgekd.models import feature_points
from edgekd.models.networks import build


class Small(nn.Module):
    """Two stages, a squeeze-and-excitation at the end of the second, dropout in front of the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True))
        self.block = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Sigmoid())
        self.whole = nn.Identity()
        self.unused = nn.Conv2d(1, 1, 1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        answer: Tensor = self.head(self.whole(x * self.squeeze(x)))
        return answer


def test_points_in_the_order_in_which_they_end() -> None:
    found = feature_points.trace(Small(), image_size=8).points()
    order = ["stem.0", "stem.1", "stem", "block.0", "block.1", "block.2", "block", "squeeze.0", "squeeze.1"]
    assert [p.name for p in found][:9] == order
    assert found[2] == feature_points.FeaturePoint("stem", "Sequential", (4, 8, 8))
    assert found[6].shape == (6, 4, 4)
    assert "unused" not in [p.name for p in found]


def test_what_is_seen_is_what_the_modules_did() -> None:
    net, x = Small().eval(), torch.randn(2, 3, 8, 8)
    with feature_points.observe(net, ["block", "block.2:input"]) as seen:
        net(x)
    normed = net.block[1](net.block[0](net.stem(x)))
    assert torch.allclose(seen["block.2:input"], normed)  # although the ReLU overwrites it
    assert torch.allclose(seen["block"], normed.relu())
    assert normed.min() < 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_point_that_is_unknown_or_silent() -> None:
    net, x = Small(), torch.randn(2, 3, 8, 8)
    with (
        pytest.raises(ConfigError, match=r"no feature point 'blok'\nDid you mean 'block'"),
        feature_points.observe(net, ["blok"]),
    ):
        net(x)
    with pytest.raises(ConfigError, match="'unused' never fired"), feature_points.observe(net, ["unused"]):
        net(x)
    with pytest.raises(ConfigError, match="'unused' never fired"):
        feature_points.trace(net, image_size=8).preactivations(["unused"])
    with pytest.raises(ConfigError, match="cannot work on images of 2 x 2"):
        feature_points.trace(build("alexnet", classes=5, image_size=2), image_size=2)


def test_defaults_of_a_small_network() -> None:
    net = Small()
    trace = feature_points.trace(net, image_size=8)
    assert trace.stages() == ("stem", "block")  # not the Identity behind it
    assert trace.preactivations(["stem", "block"]) == ("stem.1:input", "block.2:input")
    assert trace.pooled() == "head.2:input"
    assert trace.flat("head.2:input").shape == (1, 6)
    assert trace.map_shape("block.2:input") == (6, 4, 4)
    with pytest.raises(ConfigError, match=r"'head\.1' is not a map: its shape is \(1, 6\)"):
        trace.map_shape("head.1")
    with pytest.raises(ConfigError, match="'squeeze' has no activation module"):
        trace.preactivations(["squeeze"])  # it only weighs channels


@pytest.mark.parametrize(
    ("name", "ends", "pooled"),
    [
        ("resnet18", "layer1 layer2 layer3 layer4", "global_pool"),
        ("multi-exit-resnet18", "layer1 layer2 layer3 layer4", ""),
        ("ghostnet_100", "blocks.2 blocks.4 blocks.6 blocks", "flatten"),  # its dropout is a function
        ("mobilenet_v2", "features.3 features.6 features.13 features", "classifier.0:input"),
        ("squeezenet1_1", "features.1 features.4 features.7 features", "classifier.0:input"),
        ("shufflenet_v2_x1_0", "maxpool stage2 stage3 conv5", "conv5"),
        ("mixnet_s", "blocks.1 blocks.2 blocks.4 bn2", "global_pool"),
        ("alexnet", "features.1 features.4 features.11 features", "classifier.5"),
    ],
)
def test_defaults_of_real_networks(name: str, ends: str, pooled: str) -> None:
    size = 64 if name != "alexnet" else 96
    net = build(name, classes=5, image_size=size)
    trace = feature_points.trace(net, image_size=size)
    assert trace.stages() == tuple(ends.split())
    assert len(trace.preactivations(trace.stages())) == 4
    if pooled:
        assert trace.pooled() == pooled


@pytest.mark.parametrize(
    ("name", "same"), [("resnet18", 4), ("densenet121", 4), ("regnetx_002", 4), ("dla34", 4), ("mobilenetv2_100", 3)]
)
def test_stages_agree_with_timm(name: str, same: int) -> None:
    """timm's `feature_info` has the same channels and resolutions. Its last stage of a MobileNet ends before the
    convolution of the head; ours, from which the deepest exit's feature is averaged, ends after it."""
    net = build(name, classes=5, image_size=64)
    trace = feature_points.trace(net, image_size=64)
    ours = [trace.map_shape(stage)[:2] for stage in trace.stages()]
    theirs = [(stage["num_chs"], 64 // stage["reduction"]) for stage in net.backbone.feature_info][-4:]
    assert ours[:same] == theirs[:same]
    assert [size for _, size in ours] == [size for _, size in theirs]
    if same < 4:
        assert (ours[3], theirs[3]) == ((1280, 2), (320, 2))


@pytest.mark.parametrize("name", ["ghostnet_100", "mobilenet_v2", "squeezenet1_1"])
def test_the_pooled_feature_is_the_classifiers_before_dropout(name: str) -> None:
    net = build(name, classes=5, image_size=64).eval()
    point, x = feature_points.trace(net, image_size=64).pooled(), torch.randn(2, 3, 64, 64)
    last = [n for n, m in net.backbone.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1] + ":input"
    with torch.no_grad(), feature_points.observe(net, [point, last]) as still:
        net(x)
    feature = feature_points.flat(still[point])
    assert torch.allclose(feature, feature_points.flat(still[last]), atol=0)
    for module in net.modules():
        module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)
    with torch.no_grad(), feature_points.observe(net, [point, last]) as dropped:
        net(x)
    assert torch.allclose(feature, feature_points.flat(dropped[point]), atol=0)
    assert not torch.allclose(feature, feature_points.flat(dropped[last]), atol=0)


def test_where_a_network_can_be_cut() -> None:
    net = nn.Sequential(nn.Conv2d(3, 64, 1), BasicBlock(64, 64), nn.Flatten(), nn.Linear(64 * 64, 5))
    for name in ("1.conv1", "1.bn1", "1.conv2"):
        with pytest.raises(ConfigError, match=f"cannot be cut at '{name}'"):
            feature_points.check_cuts(net, ["0", name], image_size=8)
    feature_points.check_cuts(net, ["0", "1"], image_size=8)
    with pytest.raises(ConfigError, match=r"'1\.relu' and '1' return the same map"):
        feature_points.check_cuts(net, ["0", "1.relu", "1"], image_size=8)


def test_one_half_of_a_split_is_no_cut() -> None:
    """Both halves come from one node of autograd's graph."""

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.other, kept = x.chunk(2, 1)
            return kept

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.part, self.join = nn.Conv2d(3, 4, 1), Half(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            kept = self.part(self.conv(x))
            whole: Tensor = self.join(torch.cat([kept, self.part.other], 1))
            return whole.mean((2, 3))

    feature_points.check_cuts(Net(), ["conv", "join"], image_size=4)
    with pytest.raises(ConfigError, match="cannot be cut at 'part'"):
        feature_points.check_cuts(Net(), ["conv", "part", "join"], image_size=4)


def test_looking_changes_nothing() -> None:
    net = build("mobilenet_v2", classes=5, image_size=64).train()
    net.backbone.features[3].eval()
    mode, state = [m.training for m in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}
    random = torch.get_rng_state()
    feature_points.trace(net, image_size=64).pooled()
    feature_points.check_cuts(net.backbone, ["features.3"], image_size=64)
    assert [m.training for m in net.modules()] == mode
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_a_network_without_maps_has_no_stages() -> None:
    with pytest.raises(ConfigError, match="no maps"):
        feature_points.trace(build("mlp", classes=5, image_size=64), image_size=64).stages()
