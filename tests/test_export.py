"""Export: every student on real cells, what is cut where, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from edgekd.artifacts.metadata import Exit, ModelMetadata, read_onnx
from edgekd.artifacts.partition import graph, with_shapes
from edgekd.data.preprocess import Preprocess
from edgekd.errors import ArtifactError, ConfigError, GateError
from edgekd.export import check_parity, export, model_metadata, to_onnx
from edgekd.models.base import MultiExitNetwork, Outputs, exits_of
from edgekd.runtime.engine import open_engine

PLAIN = [
    "resnet18",
    "mixnet_s",
    "shufflenet_v2_x1_0",
    "ghostnet_100",
    "squeezenet1_1",
    "mobilenet_v2",
    "tf_mobilenetv3_small_100",
    "densenet121",
]
EXITS = [*(f"multi-exit-{name}" for name in PLAIN[:6]), "scan-resnet18", "msdnet"]
LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet50", "multi-exit-resnet50")]


@pytest.mark.parametrize("name", [*PLAIN, *EXITS, *LARGE])
def test_every_student(name: str, exported: Callable[[str], Any]) -> None:
    path, difference, cells = exported(name)
    model, metadata = read_onnx(path)
    assert model.opset_import[0].version == 17
    assert [o.name for o in model.graph.output] == metadata.outputs == [f"exit_{k}" for k in range(len(metadata.exits))]
    assert (len(metadata.exits) == 1) == (name in PLAIN or name == "resnet50")
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "n"
    assert not {"Shape", "Gather", "Identity", "If", "Cast"} & {node.op_type for node in model.graph.node}
    engine = open_engine(path, threads=1)
    together = engine.logits(cells[:6])
    scale = float(np.abs(together).max(axis=(1, 2)).min())
    assert difference <= 1e-4 * max(1.0, scale)
    for batch in (1, 3):
        whole = engine.logits(cells[:6], batch_size=batch)
        assert np.allclose(engine.staged_logits(cells[:6], batch_size=batch), whole, rtol=0, atol=1e-5 * scale)
        assert np.allclose(whole, together, rtol=0, atol=1e-4 * scale)


def test_boundaries_of_one_and_of_several_tensors(two_maps_onnx: Path) -> None:
    model, metadata = read_onnx(two_maps_onnx)
    assert metadata.exits == (Exit("exit_0", ("stage_0_0", "stage_0_1")), Exit("exit_1", ("stage_1",)))
    last = graph(with_shapes(model), metadata, name="stage_1").graph
    assert [i.name for i in last.input] == ["stage_0_0", "stage_0_1"]
    assert Counter(node.op_type for node in last.node)["Conv"] == 2  # of four


class Around(MultiExitNetwork):
    """Its first exit is inside a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)
        self.exit_at = ("block.inner", "block")

    def forward(self, x: Tensor) -> Outputs:
        x = self.first(x).relu()
        inner = self.inner(x).relu()
        maps = (inner, (x + inner).relu())
        return Outputs(tuple(self.fc(m.mean((2, 3))) for m in maps), (), maps)


def metadata_of(network: MultiExitNetwork) -> ModelMetadata:
    return model_metadata("small", tuple("abcde"), Preprocess(16), network.eval()(torch.zeros(1, 3, 16, 16)))


def test_an_exit_that_something_bypasses_is_named(tmp_path: Path) -> None:
    network = Around()
    wrong = r"cut at exit_0 at block\.inner: exit_1 cannot be computed from stage_0 alone"
    with pytest.raises(ConfigError, match=wrong):
        export(
            network,
            metadata_of(network),
            out=tmp_path / "s.onnx",
            images=np.zeros((1, 3, 16, 16), np.float32),
            names=["a"],
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("maps", [(), (torch.zeros(1, 4, 8, 8),), (torch.zeros(1, 4, 8, 8), ())])
def test_several_exits_need_a_map_each(maps: tuple[Any, ...]) -> None:
    logits = (torch.zeros(1, 5),) * 2
    with pytest.raises(ConfigError, match=rf"2 exits and returns {len(maps)} maps"):
        exits_of(Outputs(logits, (), maps))
    assert exits_of(Outputs(logits[:1], (), ())) == (Exit("exit_0", ()),)


def test_metadata_without_boundaries_is_refused(two_maps_onnx: Path, tmp_path: Path) -> None:
    model, _ = read_onnx(two_maps_onnx)
    prop = next(p for p in model.metadata_props if p.key == "edgekd")
    prop.value = prop.value.replace('"stage_1"', "")
    onnx.save(model, str(tmp_path / "s.onnx"))
    with pytest.raises(ArtifactError, match="each needs a boundary"):
        read_onnx(tmp_path / "s.onnx")


class Scaled(MultiExitNetwork):
    """Logits of some size, which are `off` by a factor."""

    def __init__(self, size: float, off: float = 1.0) -> None:
        super().__init__()
        self.size, self.off = size, off

    def forward(self, x: Tensor) -> Outputs:
        return Outputs((x.mean((2, 3)) * (self.size * self.off),), (), ())


@pytest.mark.parametrize(
    ("size", "off", "passes"), [(1, 1 + 5e-5, True), (1, 1.001, False), (50, 1 + 5e-5, True), (50, 1.001, False)]
)
def test_parity_counts_in_parts_of_the_largest_logit(size: float, off: float, passes: bool) -> None:
    images = np.ones((3, 3, 8, 8), np.float32)
    images[1] *= -1
    model = to_onnx(Scaled(size), image_size=8).SerializeToString()
    names = ["first", "second", "third"]
    if passes:
        assert check_parity(Scaled(size, off), model, images, names=names) == pytest.approx(size * (off - 1), rel=0.1)
        return
    with pytest.raises(GateError, match=r"exit_0 differs from torch by .* on first"):
        check_parity(Scaled(size, off), model, images, names=names)
