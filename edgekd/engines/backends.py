"""Backends by name. Each is a module of this package with the functions of `Backend`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
import onnx

from edgekd.engines.recipe import Recipe
from edgekd.errors import BackendError, nearest

BACKENDS = {"onnxruntime": "edgekd.engines.onnxruntime", "openvino": "edgekd.engines.openvino"}


class Runner(Protocol):
    """One compiled graph; may be called from several threads at once."""

    def __call__(self, x: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
        """One input to the outputs in graph order; the outputs belong to the caller."""


class Backend(Protocol):
    """What every backend module has. `TARGET` is the kind of quantised graph that it runs well."""

    SUFFIX: str
    EXTRA: str
    TARGET: str

    def version(self) -> str | None:
        """The installed version; None if it is not installed."""

    def build(self, graph: onnx.ModelProto, path: Path, *, recipe: Recipe) -> None:
        """Write one graph to `path` (and files beside it with the same stem).

        Raises:
            BackendError: this machine cannot run the recipe's precision.
        """

    def load(self, path: Path, *, recipe: Recipe, threads: int) -> Runner:
        """Compile a written graph for this machine."""

    def precisions(self, path: Path, *, recipe: Recipe) -> dict[str, float]:
        """Read back what runs: fp32, fp16, bf16 or int8 to its share of convolution and matrix layers."""


def find_backend(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        BackendError: no such backend, or it is not installed.
    """
    if name not in BACKENDS:
        raise BackendError(f"no backend '{name}'", fix=nearest(name, BACKENDS))
    module = cast(Backend, importlib.import_module(BACKENDS[name]))
    if module.version() is None:
        raise BackendError(f"{name} is not installed", fix=f"pip install 'edgekd[{module.EXTRA}]'")
    return module


def installed() -> list[str]:
    """The backends that can be used here."""
    return [n for n, path in BACKENDS.items() if cast(Backend, importlib.import_module(path)).version() is not None]


def shares(layers: list[str]) -> dict[str, float]:
    """How much of a list each name takes: ["int8", "int8", "fp32", "int8"] -> {"int8": 0.75, "fp32": 0.25}."""
    return {name: layers.count(name) / len(layers) for name in sorted(set(layers), key=layers.count, reverse=True)}


def refused(what: str, error: Exception) -> BackendError:
    """What to raise when a backend refuses a graph: they raise many kinds."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return BackendError(f"{what}: {reason}", fix="try another --backend, or compile again on this machine")
