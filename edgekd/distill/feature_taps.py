"""Running a network so that a distillation method sees what it needs of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekd.distill.base import Need, Shapes, View
from edgekd.models import feature_points
from edgekd.models.base import Outputs


@dataclass(frozen=True)
class Viewer:
    """Which feature points of one network are looked at: names for the parts of its `View`."""

    network: nn.Module
    stages: tuple[str, ...] = ()
    preact: tuple[str, ...] = ()
    pooled: str = ""

    def __call__(self, images: Tensor, *, call: Callable[[Tensor], Outputs] | None = None) -> View:
        """One batch through the network. call: what runs it, if it is wrapped (DDP, mixed precision)."""
        names = (*self.stages, *self.preact, *filter(None, [self.pooled]))
        with feature_points.observe(self.network, names) as seen:
            out = (call or self.network)(images)
        stages, preact = (tuple(seen[name] for name in part) for part in (self.stages, self.preact))
        return View(out, stages, preact, feature_points.flat(seen[self.pooled]) if self.pooled else _last(out.features))

    def shapes(self, image_size: int) -> Shapes:
        """What its views look like, from one dry run."""
        with torch.no_grad(), feature_points.evaluating(self.network):
            view = self(torch.zeros(1, 3, image_size, image_size))
        maps = [tuple((t.shape[1], t.shape[2], t.shape[3]) for t in part) for part in (view.stages, view.preact)]
        return Shapes(maps[0], maps[1], 0 if view.pooled is None else view.pooled.shape[1], len(view.out.logits))


def viewer(network: nn.Module, needs: Collection[Need], named: Sequence[str], *, image_size: int) -> Viewer:
    """A viewer for what a method needs, at the points named or else the ends of the network's stages.

    Raises:
        ConfigError: a point that does not exist, never fires, or is no map (D, H, W).
    """
    stages = tuple(named)
    if not stages and {"stages", "preact"} & set(needs):
        stages = feature_points.stages(network, image_size=image_size)
    preact = feature_points.preactivations(network, stages, image_size=image_size) if "preact" in needs else ()
    own = hasattr(network, "exits")  # multi-exit networks return their pooled features
    name = feature_points.pooled(network, image_size=image_size) if "pooled" in needs and not own else ""
    return Viewer(network, stages if "stages" in needs or named else (), preact, name)


def _last(features: Sequence[Tensor]) -> Tensor | None:
    return features[-1] if features else None
