"""Networks: parameter counts of the paper, exits, global context, weights from elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18

from edgekd.errors import ArtifactError, ConfigError
from edgekd.models import SingleExit, build
from edgekd.models.multi_exit import GlobalContext, multi_exit_resnet18, resnet_backbone
from edgekd.models.weights import load_state, read_state


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_parameters_of_paper_a() -> None:
    """ResNet18 with a CIFAR stem and 100 classes: 11.22 M. With four exits the paper prints 12.33 M; ours has
    12.30 M, since it gives neither the ratio of the context block (16, GCNet's) nor the widths of the bottlenecks
    (a quarter, ResNet's)."""
    assert count(resnet_backbone(classes=100, image_size=32)) == 11_220_132
    assert count(multi_exit_resnet18(classes=100, image_size=32)) == 12_301_704


def test_context_block_starts_as_identity_and_then_sees_all() -> None:
    block, x = GlobalContext(32), torch.randn(2, 32, 5, 7)
    assert torch.equal(block(x), x)
    nn.init.normal_(block.transform[-1].weight)
    changed = x.clone()
    changed[:, :, 0, 0] += 5
    assert not torch.allclose(block(x)[:, :, 4, 6], block(changed)[:, :, 4, 6])


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


@pytest.mark.parametrize("exits", [(1, 2), (0, 4), (2, 1, 4), (1, 5), ()])
def test_impossible_exits(exits: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        build("multi-exit-resnet18", classes=5, image_size=64, exits=exits)


def test_stem_follows_image_size() -> None:
    small = build("multi-exit-resnet18", classes=5, image_size=64)
    large = build("multi-exit-resnet18", classes=5, image_size=65)
    assert small.backbone.conv1.kernel_size == (3, 3)
    assert large.backbone.conv1.kernel_size == (7, 7)


@pytest.mark.parametrize("name", ["mixnet_s", "resnet18", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_teachers_by_name(name: str) -> None:
    """timm's and torchvision's, with linear and convolutional classifiers."""
    out = build(name, classes=7, image_size=96).eval()(torch.randn(2, 3, 96, 96))
    assert [tuple(s.shape) for s in out.logits] == [(2, 7)]


def test_unknown_network_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'resnet18'.*multi-exit-resnet18"):
        build("resnet_18", classes=5, image_size=64)


def test_no_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="cannot be fetched"):
        build("mixnet_s.ft_in1k", classes=5, image_size=96, pretrained=True)


def test_plain_weights_find_the_backbone(tmp_path: Path) -> None:
    source = resnet18(num_classes=1000)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    student = multi_exit_resnet18(classes=5, image_size=112)
    loaded = load_state(student, read_state(tmp_path / "w.safetensors"), source="w")
    assert torch.equal(student.backbone.layer3[1].conv2.weight, source.layer3[1].conv2.weight)
    assert set(loaded.unknown) == {"fc.weight", "fc.bias"}
    assert all(name.startswith("exits.") for name in loaded.missing)
    assert "2 left (fc." in loaded.summary()


def test_other_shapes_are_named() -> None:
    net = SingleExit(resnet18(num_classes=5))
    loaded = load_state(net, resnet18(num_classes=1000).state_dict(), source="w")
    assert set(loaded.reshaped) == {"backbone.fc.weight", "backbone.fc.bias"}


def test_weights_of_another_architecture() -> None:
    with pytest.raises(ConfigError, match=r"fits this network nowhere: it has blocks\.0"):
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
    torch.save({"state_dict": {}, "code": test_stem_follows_image_size}, tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match="no weights-only file"):
        read_state(tmp_path / "w.pth")


def test_shared_weights_load_whole(shared: Path, tmp_path: Path) -> None:
    """The real ImageNet ResNet18: every tensor of the backbone is given."""
    import lzma

    packed = shared / "weights" / "resnet18.safetensors.xz"
    (tmp_path / "w.safetensors").write_bytes(lzma.decompress(packed.read_bytes()))
    student = multi_exit_resnet18(classes=5, image_size=112)
    loaded = load_state(student, read_state(tmp_path / "w.safetensors"), source="w")
    assert not [n for n in loaded.missing if n.startswith("backbone.")]
    assert not loaded.reshaped
