"""Small classifiers of 16-pixel images in five classes, and their ONNX graphs as `read_classifier` returns them."""

from __future__ import annotations

import onnx
import torch
from torch import Tensor, nn

from edgekd.conversion.modules import classifier_of
from edgekd.data.preprocess import Preprocess

CLASSES = tuple("abcde")


def exported(module: nn.Module) -> onnx.ModelProto:
    return classifier_of(module, classes=CLASSES, preprocess=Preprocess(16), name="small").model


class Residual(nn.Module):
    """A stem and two residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.Conv2d(16, 16, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 16, 1, stride=2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.b(self.a(x).relu())).relu()
        x = (self.shortcut(x) + self.d(self.c(x).relu())).relu()
        return self.fc(x.mean((2, 3)))


class Tokens(nn.Module):
    """A vision transformer: 16 patches and a class token of 12 numbers, two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 12))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token + 0 * x[:, :1], x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.fc(x[:, 0])


class Block(nn.Module):
    """Attention of one head, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(2))
        self.qkv, self.up, self.down = nn.Linear(12, 36), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, dim=2)
        x = x + (q @ k.transpose(1, 2)).softmax(dim=2) @ v
        return x + self.down(self.up(self.norms[1](x)).relu())


class Dense(nn.Module):
    """A dense block of five layers that read all maps before them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 4 * k, 4, 3, padding=1) for k in range(5))
        self.fc = nn.Linear(23, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x * 1.5]
        for layer in self.layers:
            maps.append(layer(torch.cat(maps, dim=1)).relu())
        return self.fc(torch.cat(maps, dim=1).mean((2, 3)))
