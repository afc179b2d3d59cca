"""Backends by name. Each is a module of this package with the functions of `Backend`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import onnx

from edgekd.artifacts.recipe import Recipe
from edgekd.errors import BackendError, nearest

BACKENDS = {
    "onnxruntime": "edgekd.backends.onnxruntime",
    "openvino": "edgekd.backends.openvino",
    "tensorrt": "edgekd.backends.tensorrt.backend",
}


Read: TypeAlias = Callable[[Path], bytes]
"""How a backend gets a file's content; an engine's checks it against the manifest."""


class Runner(Protocol):
    """One compiled graph; may be called from several threads at once."""

    def __call__(self, *xs: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
        """The inputs to the outputs, both in graph order; the outputs belong to the caller."""


class Loaded(Runner, Protocol):
    """A runner as a backend gives it. ends: shapes of a row of its first input and of its first output, -1 for any."""

    ends: tuple[tuple[int, ...], tuple[int, ...]]


class StagedRun(Protocol):
    """One batch on its way through the stages; what the next stage reads lies wherever the backend likes it."""

    def run_stage(self) -> npt.NDArray[np.float32]:
        """Run the next stage: its exit's logits (B, C)."""

    def compact(self, indices: npt.NDArray[np.int64], size: int) -> None:
        """Go on with these rows, which rise, as the first of a batch of `size`; the rows behind them are anything."""


StagedRunner: TypeAlias = Callable[[npt.NDArray[np.float32]], AbstractContextManager[StagedRun]]
"""Starts images (N, 3, H, W) on their way."""
Decider: TypeAlias = Callable[[npt.NDArray[np.float32]], tuple[npt.NDArray[np.float32], float, int]]
"""One image (1, 3, H, W) to its probabilities (C,), confidence and exit."""


class Backend(Protocol):
    """What every backend module has. `TARGET` is the kind of quantised graph that it runs well; `ANY_BATCH` whether it
    runs batches larger than the recipe's; `SATURATES` whether its sums of 8-bit products do on CPUs without VNNI.

    Some have more: `walker(stages) -> Walker` keeps what lies between stages to itself, `decider(stages, policy) ->
    Decider` also the decision to leave, `here() -> dict` is what of this machine an engine depends on besides the
    host, `refusal(manifest) -> str` why one cannot run here, and `WITHOUT_VNNI` what int8 costs on such CPUs.
    """

    SUFFIX: str
    EXTRA: str
    TARGET: str
    ANY_BATCH: bool
    SATURATES: bool

    def version(self) -> str | None:
        """The installed version; None if it is not installed."""

    def build(
        self, graph: onnx.ModelProto, path: Path, *, recipe: Recipe, progress: Callable[[float], None] | None = None
    ) -> None:
        """Write one graph to `path` (and files beside it with the same stem).

        progress: called with the share that is done, by backends that take long.

        Raises:
            BackendError: this machine cannot run the recipe's precision.
        """

    def load(self, path: Path, *, recipe: Recipe, threads: int, read: Read = Path.read_bytes) -> Loaded:
        """Compile a written graph for this machine; its files are read once, by `read`, and not looked at again."""

    def suffixes(self, recipe: Recipe) -> tuple[str, ...]:
        """The files that `build` writes for each graph."""

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
