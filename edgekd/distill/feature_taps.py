"""Collecting the features that distillation methods need while a network runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from edgekd.distill.base import FeatureShapes, Need, NetworkOutput
from edgekd.models import feature_points
from edgekd.models.base import MultiExitNetwork, Outputs


@dataclass(frozen=True)
class FeatureTaps:
    """The feature points of one network that are collected into its `NetworkOutput`.

    Attributes:
        network: The network.
        shapes: Shapes of what is collected.
        stages: Names of the feature points for `NetworkOutput.stages`.
        preactivations: Names of the feature points for `NetworkOutput.preactivations`.
        pooled: Name of the feature point for `NetworkOutput.pooled`; empty if the network returns that feature itself.
    """

    network: MultiExitNetwork
    shapes: FeatureShapes
    stages: tuple[str, ...] = ()
    preactivations: tuple[str, ...] = ()
    pooled: str = ""

    def __call__(self, images: Tensor, *, call: Callable[[Tensor], Outputs] | None = None) -> NetworkOutput:
        """Run the network on one batch and collect its features.

        Args:
            images: (B, 3, H, W).
            call: Called in place of the network, if it is wrapped (DDP, mixed precision).
        """
        names = (*self.stages, *self.preactivations, *filter(None, [self.pooled]))
        with feature_points.observe(self.network, names) as seen:
            outputs: Outputs = (call or self.network)(images)
        stages, preactivations = (tuple(seen[n] for n in part) for part in (self.stages, self.preactivations))
        if self.pooled:
            return NetworkOutput(outputs, stages, preactivations, feature_points.flat(seen[self.pooled]))
        return NetworkOutput(outputs, stages, preactivations, outputs.features[-1] if outputs.features else None)


def tap_features(
    network: MultiExitNetwork, needs: Collection[Need], points: Sequence[str], *, image_size: int
) -> FeatureTaps:
    """Find the feature points that the methods need, in one dry run of the network.

    Args:
        network: The network, on the CPU.
        needs: Features that the methods need.
        points: Names of the stages' feature points; the ends of the network's stages if empty.
        image_size: Side of the images in pixels.

    Raises:
        ConfigError: A point that does not exist, is never reached, or does not return a map (D, H, W).
    """
    trace = feature_points.trace(network, image_size=image_size)
    stages = tuple(points)
    if not stages and {"stages", "preactivations"} & set(needs):
        stages = trace.stages()
    preactivations = trace.preactivations(stages) if "preactivations" in needs else ()
    features = trace.outputs.features  # multi-exit networks return their pooled features
    pooled = trace.pooled() if "pooled" in needs and not features else ""
    stages = stages if "stages" in needs or points else ()
    width = trace.flat(pooled).shape[1] if pooled else features[-1].shape[1] if features else 0
    shapes = FeatureShapes(
        stages=tuple(map(trace.map_shape, stages)),
        preactivations=tuple(map(trace.map_shape, preactivations)),
        pooled=width,
        exits=len(trace.outputs.logits),
    )
    return FeatureTaps(network, shapes, stages, preactivations, pooled)
