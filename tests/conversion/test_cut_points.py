"""Cut points on graphs exported from torch, whose shapes and multiplications are counted by hand."""

from __future__ import annotations

import pytest
import torch
from helpers.small_classifiers import Dense, Residual, Tokens, exported
from torch import nn

from edgekd.conversion.cut_points import candidates, find_cut_points
from edgekd.errors import ConfigError


def test_a_residual_network_is_cut_between_blocks() -> None:
    cuts = find_cut_points(exported(Residual()))
    single = [cut for cut in cuts if len(cut.tensors) == 1]
    assert [cut.shapes for cut in single] == [((8, 16, 16),), ((8, 16, 16),), ((16,),)]
    # 3x3 convolutions: 16*16*8*27 once, 16*16*8*72 twice in the first block; 8*8*16*72 and 8*8*16*144 in the second,
    # with a shortcut of 8*8*16*8; the last place is behind the pooling, before the linear layer's 16*5
    stem, one, two, last = 55296, 2 * 147456, 73728 + 147456 + 8192, 80
    total = stem + one + two + last
    assert [cut.share for cut in single] == pytest.approx(
        [stem / total, (stem + one) / total, (stem + one + two) / total]
    )
    assert {len(cut.tensors) for cut in candidates(cuts)} == {1, 2}  # two single ones are too few to do without others


def test_tokens_are_cut_between_blocks() -> None:
    useful = candidates(find_cut_points(exported(Tokens())))
    assert useful[0].shapes == ((16, 12),)  # the patches
    assert {cut.shapes for cut in useful[1:]} == {((17, 12),)}


def test_a_dense_block_is_not_cut_through_more_tensors_than_three() -> None:
    useful = candidates(find_cut_points(exported(Dense())))
    assert useful
    assert all(len(cut.tensors) <= 3 for cut in useful)


def test_a_network_without_a_cut_point_is_refused_with_its_narrowest_place() -> None:
    class Parallel(nn.Module):
        """Five branches that meet at the end."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ModuleList(nn.Conv2d(3, 4, 3, padding=1) for _ in range(5))
            self.second = nn.ModuleList(nn.Conv2d(4, 5, 3, padding=1) for _ in range(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            maps = [first(x).relu() for first in self.first]
            return torch.stack([second(m) for second, m in zip(self.second, maps)]).sum(0).mean((2, 3))

    with pytest.raises(ConfigError, match=r"no cut point .* where it narrows most, after [0-9]+%"):
        find_cut_points(exported(Parallel()))


def test_a_network_with_nearly_all_in_one_layer_is_refused() -> None:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 64), nn.ReLU(), nn.Linear(64, 5))
    with pytest.raises(ConfigError, match="a single layer has nearly all of its multiplications"):
        find_cut_points(exported(layers))
