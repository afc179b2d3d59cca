"""A backend, a confidence measure and a data layout for edgekd; without PyTorch, like edgekd's own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import CpuBackend, ReadFile, backend_failure
from edgekd.confidence import ConfidenceMeasure
from edgekd.data.layouts import DataLayout, Source


class ReferenceRunner:
    """A graph in ONNX's reference evaluator."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._evaluator = ReferenceEvaluator(model)
        ends = model.graph.input[0], model.graph.output[0]
        self.row_shapes = tuple(tuple(d.dim_value or -1 for d in end.type.tensor_type.shape.dim[1:]) for end in ends)

    def __call__(self, *xs: np.ndarray) -> list[np.ndarray]:
        return self._evaluator.run(None, dict(zip(self._evaluator.input_names, xs)))


class ReferenceBackend(CpuBackend[ReferenceRunner]):
    """ONNX's reference evaluator: slow, and correct by definition."""

    name = "reference"
    packages = ("onnx",)
    suffix = ".reference"

    def version(self) -> str:
        return onnx.__version__

    def build(
        self, graph: onnx.ModelProto, path: Path, *, recipe: Recipe, progress: Callable[[float], None] | None = None
    ) -> None:
        path.write_bytes(graph.SerializeToString())

    def load(self, path: Path, *, recipe: Recipe, threads: int, read: ReadFile = Path.read_bytes) -> ReferenceRunner:
        try:
            return ReferenceRunner(onnx.load_from_string(read(path)))
        except Exception as error:  # whatever a damaged file causes
            raise backend_failure(f"{path} cannot be loaded", error) from error

    def precisions(self, path: Path, *, recipe: Recipe) -> dict[str, int]:
        return {"fp32": 1}


def _gini(probabilities: np.ndarray) -> np.ndarray:
    """Rescale 1 - the Gini impurity, the sum of p^2 from 1 / C to 1, to 0..1."""
    classes = probabilities.shape[-1]
    return ((probabilities**2).sum(axis=-1) - 1 / classes) / (1 - 1 / classes)


GINI = ConfidenceMeasure("gini", _gini)


def _plate_folder(folder: Path) -> tuple[str, Path] | None:
    images = folder / "images"
    return (folder.name.removeprefix("plate-"), images) if folder.name.startswith("plate-") else None


def _source() -> Source | None:
    """The archive that the environment names: a published set would have a fixed address and checksum."""
    archive: Any = os.environ.get("CYTOKIT_ARCHIVE")
    return archive and Source(Path(archive).as_uri(), hashlib.md5(Path(archive).read_bytes()).hexdigest())


PLATES = DataLayout(
    "plates", class_folder=_plate_folder, group_pattern=r"well(\d+)", group_name="well", source=_source()
)
