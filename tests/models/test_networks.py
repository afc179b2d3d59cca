"""Networks: parameter counts of the paper, exits, global context, weights from elsewhere."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18, resnet50, squeezenet1_1

from edgekd import config, schema
from edgekd.artifacts.metadata import ModelMetadata
from edgekd.cli.distill import parse_exits
from edgekd.data.preprocess import Preprocess
from edgekd.errors import ArtifactError, ConfigError
from edgekd.export import export
from edgekd.models.base import exits_of
from edgekd.models.multi_exit import GlobalContext, multi_exit_resnet18, resnet_backbone
from edgekd.models.networks import SingleExit, build, hub_name, stem_of
from edgekd.models.weights import load_state, read_state
from edgekd.policy import Policy
from edgekd.training.protocol import Protocol


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_parameters_of_gao2022() -> None:
    """ResNet18 with a CIFAR stem and 100 classes: 11.22 M. With four exits the paper prints 12.33 M; ours has
    12.30 M, since it gives neither the ratio of the context block (16, GCNet's) nor the widths of the bottlenecks
    (a quarter, ResNet's)."""
    assert count(resnet_backbone(classes=100, stem="small")) == 11_220_132
    assert count(multi_exit_resnet18(classes=100, stem="small")) == 12_301_704


def test_parameters_of_the_larger_resnet() -> None:
    """ResNet50 without its classifier and four heads on 256, 512, 1024 and 2048 channels, worked out by hand."""

    def head(widths: list[int]) -> int:
        channels, hidden = widths[0], widths[0] // 16
        context = channels + 1 + channels * hidden + hidden + 2 * hidden + hidden * channels + channels
        return context + sum(map(bottleneck, widths, widths[1:])) + widths[-1] * 10 + 10

    def bottleneck(inputs: int, outputs: int) -> int:
        middle = outputs // 4
        return inputs * middle + 9 * middle**2 + middle * outputs + 4 * middle + 2 * outputs

    widths = [256, 512, 1024, 2048]
    backbone = 25_557_032 - (2048 * 1000 + 1000)  # the published count, less the classifier
    net = build("multi-exit-resnet50", classes=10, image_size=96)
    assert count(net) == backbone + sum(head(widths[k:]) for k in range(4))
    assert not load_state(net, resnet50().state_dict(), source="w").reshaped


def test_context_block_starts_as_identity_and_then_sees_all() -> None:
    block, x = GlobalContext(32), torch.randn(2, 32, 5, 7)
    assert torch.equal(block(x), x)
    nn.init.normal_(block.transform[-1].weight)
    changed = x.clone()
    changed[:, :, 0, 0] += 5
    assert not torch.allclose(block(x)[:, :, 4, 6], block(changed)[:, :, 4, 6])


def test_context_block_sees_all_of_few_channels() -> None:
    """The layer norm of a single number is constant, whatever it is given; ONNX Runtime 1.23 refuses it."""
    block, x = GlobalContext(24), torch.randn(2, 24, 5, 7)
    nn.init.normal_(block.transform[-1].weight)
    first, second = block(x) - x
    assert not torch.allclose(first, second, atol=1e-4)


def test_context_block_by_hand() -> None:
    """One channel pair, two places, attention weight ln 3 on the first channel: weights 3/4 and 1/4."""
    block = GlobalContext(2, ratio=1)
    with torch.no_grad():
        block.attention.weight.copy_(torch.tensor([torch.log(torch.tensor(3.0)), 0.0]).view(1, 2, 1, 1))
    block.transform = nn.Identity()  # adds the context itself
    x = torch.tensor([[[[1.0, 0.0]], [[8.0, 4.0]]]])
    context = torch.tensor([0.75 * 1, 0.75 * 8 + 0.25 * 4])
    assert torch.allclose(block(x), x + context[None, :, None, None])


@pytest.mark.parametrize("exits", [(1, 2, 3, 4), (2, 4), (4,)])
def test_exits_can_be_chosen(exits: tuple[int, ...]) -> None:
    out = build("multi-exit-resnet18", classes=7, image_size=96, exits=exits).eval()(torch.randn(2, 3, 96, 96))
    assert [tuple(s.shape) for s in out.logits] == [(2, 7)] * len(exits)
    assert [tuple(f.shape) for f in out.features] == [(2, 512)] * len(exits)
    assert [m.shape[1] for m in out.maps] == [64 * 2 ** (e - 1) for e in exits]


def test_stages_have_names_too() -> None:
    nets = [build("multi-exit-resnet18", classes=7, image_size=64, exits=e) for e in [(2, 4), ("layer2", "final")]]
    assert nets[0].state_dict().keys() == nets[1].state_dict().keys()


MADE = {  # widths of the four stages at 64 pixels, and the side of the last
    "ghostnet_100": ((24, 40, 112, 960), 2),
    "mobilenet_v2": ((24, 32, 96, 1280), 2),
    "squeezenet1_1": ((64, 128, 256, 512), 3),
    "shufflenet_v2_x1_0": ((24, 116, 232, 1024), 2),
    "mixnet_s": ((24, 40, 120, 1536), 2),
}


@pytest.mark.parametrize("name", MADE)
def test_exits_on_any_network(name: str) -> None:
    widths, side = MADE[name]
    net = build(f"multi-exit-{name}", classes=7, image_size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    out = net(x)
    assert [tuple(s.shape) for s in out.logits] == [(2, 7)] * 4
    assert [tuple(f.shape) for f in out.features] == [(2, widths[-1])] * 4
    assert tuple(m.shape[1] for m in out.maps) == widths
    assert out.maps[-1].shape[2] == side
    reduced = [head.reduce(m).shape[1:] for head, m in zip(net.exits, out.maps)]
    assert all(shape[0] == widths[-1] and abs(shape[1] - side) <= 1 for shape in reduced)
    assert torch.equal(out.logits[-1], net.backbone(x))  # the deepest exit is the network's own classifier
    assert torch.equal(out.features[-1], out.maps[-1].mean((2, 3)))


def test_one_exit_is_the_plain_network() -> None:
    torch.manual_seed(0)
    plain = build("ghostnet_100", classes=5, image_size=64).eval()
    torch.manual_seed(0)
    alone = build("multi-exit-ghostnet_100", classes=5, image_size=64, exits=["final"]).eval()
    x = torch.randn(2, 3, 64, 64)
    assert plain.state_dict().keys() == alone.state_dict().keys()
    assert torch.equal(plain(x).logits[0], alone(x).logits[0])


def test_light_head_by_hand() -> None:
    """A 116 x 8 x 8 map to 1024 x 2 x 2: two separable blocks, 116 -> 232 -> 1024, after the context block."""
    head = build("multi-exit-shufflenet_v2_x1_0", classes=5, image_size=64, exits=(2, 4)).exits[0]
    context = 116 + 1 + 116 * 7 + 7 + 2 * 7 + 7 * 116 + 116
    blocks = [9 * a + 2 * a + a * b + 2 * b for a, b in [(116, 232), (232, 1024)]]
    assert count(head) == context + sum(blocks) + 1024 * 5 + 5


def test_exits_by_name_and_number() -> None:
    net = build("multi-exit-mobilenet_v2", classes=5, image_size=64, exits=(1, "features.7", 3, "final"))
    assert net.exit_at == ("features.3", "features.7", "features.13", "features")
    # one inside the last stage needs no halving
    net = build("multi-exit-mobilenet_v2", classes=5, image_size=64, exits=("features.17", 4)).eval()
    assert [tuple(f.shape) for f in net(torch.randn(1, 3, 64, 64)).features] == [(1, 1280)] * 2


@pytest.mark.parametrize(
    ("exits", "says"),
    [
        ((1, 2, 3), r"omit the deepest; the stages are 1 features\.3, .*end with final"),
        ((), "omit the deepest"),
        ((5, 4), "exit 5: no such stage before the deepest"),
        ((0, "final"), "exit 0: no such stage"),
        ((3, 2, 4), r"'features\.13' does not come before 'features\.6'"),
        ((2, 2, 4), r"'features\.6' does not come before 'features\.6'"),
        (("features", "final"), r"'features' does not come before 'features', the last stage"),
        (("classifier.1", "final"), "exit 'classifier.1' returns no map"),
        (("feature.6", "final"), r"no feature point 'feature\.6'.*Did you mean 'features\.6'"),
        (("final", "final"), "no feature point 'final'"),
        (("features.5.conv.0", "final"), r"cannot be cut at 'features\.5\.conv\.0'"),
        (("features.18", "final"), r"'features\.18' and 'features' return the same map"),
    ],
)
def test_exits_that_cannot_be(exits: tuple[int | str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        build("multi-exit-mobilenet_v2", classes=5, image_size=64, exits=exits)


def test_an_exit_behind_the_last_stage() -> None:
    with pytest.raises(ConfigError, match="'conv_head' does not come before 'blocks', the last stage"):
        build("multi-exit-ghostnet_100", classes=5, image_size=64, exits=("conv_head", "final"))


def test_exits_from_flags_and_files(tmp_path: Path) -> None:
    assert parse_exits("2, blocks.6,final") == (2, "blocks.6", "final")
    with pytest.raises(ConfigError, match="an exit without a name"):
        parse_exits("1,,4")
    protocol = Protocol(exits=(2, "blocks.6", "final"))
    config.write_toml(tmp_path / "p.toml", protocol)
    assert config.load(Protocol, "protocols", str(tmp_path / "p.toml")).exits == protocol.exits
    with pytest.raises(ConfigError, match=r"exits\[0\]: expected int or str, found 1\.5"):
        schema.from_dict(Protocol, {"exits": [1.5]}, where="here")


def test_exits_train_copy_and_export(tmp_path: Path) -> None:
    """Two steps under DDP, which refuses parameters that the loss does not reach; then a copy, cut and exported."""
    torch.manual_seed(0)
    net = build("multi-exit-shufflenet_v2_x0_5", classes=5, image_size=64, exits=("stage2", "stage3.3", "final"))
    images = np.random.default_rng(0).normal(size=(8, 3, 64, 64)).astype(np.float32)
    x = torch.from_numpy(images)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        optim = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(2):
            optim.zero_grad()
            sum(s.square().mean() for s in wrapped(x).logits).backward()
            optim.step()
    finally:
        torch.distributed.destroy_process_group()
    assert all(p.grad is not None for p in net.parameters())
    copied = copy.deepcopy(net).eval()
    out = copied(x)
    metadata = ModelMetadata("student", tuple("abcde"), Preprocess(64), exits_of(out), Policy((1.0,) * 3))
    assert (
        export(copied, metadata, out=tmp_path / "s.onnx", images=images, names=[f"image {k}" for k in range(8)]) < 1e-5
    )


@pytest.mark.parametrize("exits", [(1, 2), (0, 4), (2, 1, 4), (1, 5), ()])
def test_impossible_exits(exits: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        build("multi-exit-resnet18", classes=5, image_size=64, exits=exits)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        *(("resnet34", 3), ("resnet18.a1_in1k", 3), ("multi-exit-resnet18", 3), ("multi-exit-resnet34", 3)),
        *(("scan-resnet18", 3), ("msdnet", 3), ("mobilenet_v2", 0), ("multi-exit-mobilenet_v2", 0), ("mlp", 0)),
    ],
)
def test_stem_is_asked_for_and_told_by_weights(name: str, kernel: int) -> None:
    """Of no network does the image size decide it; one that has no choice refuses."""
    with torch.device("meta"):
        states = [build(name, classes=5, image_size=size).state_dict() for size in (32, 112)]
        if not kernel:
            with pytest.raises(ConfigError, match=f"'{name}' has no small stem"):
                build(name, classes=5, image_size=32, stem="small")
        else:
            states.append(build(name, classes=5, image_size=32, stem="small").state_dict())
    assert [stem_of(name, state) for state in states] == ["imagenet", "imagenet", "small"][: len(states)]


@pytest.mark.parametrize("name", ["mixnet_s", "resnet18", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_teachers_by_name(name: str) -> None:
    """timm's and torchvision's, with linear and convolutional classifiers."""
    out = build(name, classes=7, image_size=96).eval()(torch.randn(2, 3, 96, 96))
    assert [tuple(s.shape) for s in out.logits] == [(2, 7)]


def test_unknown_network_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'resnet18'.*multi-exit-resnet18"):
        build("resnet_18", classes=5, image_size=64)


def test_unknown_networks_with_exits() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'multi-exit-mobilenet_v2'"):
        build("multi-exit-mobilenetv2", classes=5, image_size=64)


def test_names_of_hub_weights() -> None:
    assert hub_name("multi-exit-resnet18") == "resnet18"
    assert hub_name("multi-exit-ghostnet_100.in1k") == "ghostnet_100.in1k"
    assert hub_name("mixnet_s") == "mixnet_s"
    with pytest.raises(ConfigError, match="no hub has weights for 'mlp'"):
        hub_name("mlp")


def test_no_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="cannot be fetched"):
        build("mixnet_s.ft_in1k", classes=5, image_size=96, pretrained=True)


def test_plain_weights_find_the_backbone(tmp_path: Path) -> None:
    source = resnet18(num_classes=1000)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    student = multi_exit_resnet18(classes=5)
    loaded = load_state(student, read_state(tmp_path / "w.safetensors"), source="w")
    assert torch.equal(student.backbone.layer3[1].conv2.weight, source.layer3[1].conv2.weight)
    assert set(loaded.unknown) == {"fc.weight", "fc.bias"}
    assert all(name.startswith("exits.") for name in loaded.missing)
    assert "2 left (fc." in loaded.summary()


def test_plain_weights_find_the_backbone_of_any_network() -> None:
    source = squeezenet1_1(num_classes=5)
    student = build("multi-exit-squeezenet1_1", classes=5, image_size=64)
    loaded = load_state(student, source.state_dict(), source="w")
    assert not loaded.unknown
    assert not loaded.reshaped
    assert all(name.startswith("exits.") for name in loaded.missing)
    assert torch.equal(student.backbone.classifier[1].weight, source.classifier[1].weight)


def test_other_shapes_are_named() -> None:
    net = SingleExit(resnet18(num_classes=5))
    loaded = load_state(net, resnet18(num_classes=1000).state_dict(), source="w")
    assert set(loaded.reshaped) == {"backbone.fc.weight", "backbone.fc.bias"}


def test_weights_of_another_architecture() -> None:
    with pytest.raises(ConfigError, match=r"does not fit this network: it has blocks\.0"):
        load_state(SingleExit(resnet18()), {"blocks.0.weight": torch.zeros(3, 3)}, source="w")


@pytest.mark.parametrize(
    ("name", "content"), [("w.safetensors", b"half"), ("w.pth", b"half"), ("w.pth", None), ("w.safetensors", None)]
)
def test_damaged_or_missing_weights(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtifactError):
        read_state(tmp_path / name)


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "code": test_teachers_by_name}, tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match="not a weights-only file"):
        read_state(tmp_path / "w.pth")


def test_shared_weights_load_whole(shared: Path, tmp_path: Path) -> None:
    """The real ImageNet ResNet18: every tensor of the backbone is given."""
    import lzma

    packed = shared / "weights" / "resnet18.safetensors.xz"
    (tmp_path / "w.safetensors").write_bytes(lzma.decompress(packed.read_bytes()))
    student = multi_exit_resnet18(classes=5)
    loaded = load_state(student, read_state(tmp_path / "w.safetensors"), source="w")
    assert not [n for n in loaded.missing if n.startswith("backbone.")]
    assert not loaded.reshaped
