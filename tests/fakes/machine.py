"""A machine with a fake GPU and a fake TensorRT, and a small student for it."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.bindings import cuda_driver, cuda_python, pycuda
from fakes.cuda import Cuda
from fakes.tensorrt import Trouble, make

from edgekd import testing
from edgekd.artifacts.manifest import Manifest
from edgekd.artifacts.metadata import read_student
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.cuda.device import find
from edgekd.backends.tensorrt.library import TENSORRT, TENSORRT_RTX
from edgekd.backends.tensorrt.runner import warn_once
from edgekd.compiler.build import compile_engine
from edgekd.policy import Policy
from edgekd.runtime.engine import Engine, open_engine
from edgekd.types import Array

RNG = np.random.default_rng(5)
IMAGES = RNG.normal(size=(20, 3, 16, 16)).astype(np.float32)
BUCKETS = (1, 2, 4, 8)
RTX = "tensorrt_rtx_bindings"


class Finder:
    """Offers a module for import, and notes whether that was asked for."""

    def __init__(self, modules: dict[str, Callable[[], types.ModuleType]]) -> None:
        self._modules = modules
        self.imported: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self._modules:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> types.ModuleType:
        self.imported.append(spec.name)
        return self._modules[spec.name]()

    def exec_module(self, module: types.ModuleType) -> None: ...


class Box:
    """The machine. built: network and config of every build."""

    def __init__(self, finder: Finder, cuda: Cuda, trouble: Trouble) -> None:
        self.finder, self.cuda, self.trouble = finder, cuda, trouble

    @property
    def trt(self) -> Any:
        return sys.modules["tensorrt"]


def _package() -> types.ModuleType:
    return types.ModuleType("package")


def forget() -> None:
    """As if nothing had been imported."""
    for cached in (find, warn_once):
        cached.cache_clear()
    vars(TENSORRT).clear()
    vars(TENSORRT_RTX).clear()
    for name in [n for n in sys.modules if n.split(".")[0] in ("tensorrt", RTX, "cuda", "pycuda")]:
        del sys.modules[name]


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Box]]:
    """Makes the machine: box("8.6", bindings=("pycuda",), dla_cores=1)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("edgekd.compiler.gate.TIMING_S", 0.0)
    monkeypatch.setattr("edgekd.compiler.gate.WARM_UP", 1)
    cudas = []

    def start(
        family: str,
        *,
        cuda: Cuda | None = None,
        bindings: tuple[str, ...] = ("cuda-python",),
        kernel: Callable[..., None] = print,
        **trouble: Any,
    ) -> Box:
        forget()
        cuda, found = cuda or Cuda(), Trouble(**trouble)
        cudas.append(cuda)
        library = RTX if found.rtx else "tensorrt"
        modules: dict[str, Callable[[], Any]] = {library: lambda: make(family, cuda, found)}
        if "cuda-python" in bindings:
            modules |= {"cuda": _package, "cuda.bindings": _package}
            modules["cuda.bindings.runtime"] = lambda: cuda_python(cuda)
            modules["cuda.bindings.driver"] = lambda: cuda_driver(cuda, kernel)
        if "pycuda" in bindings:
            modules |= {"pycuda": _package, "pycuda.driver": lambda: pycuda(cuda)}
        for name in {"tensorrt", "tensorrt_rtx", RTX, "cuda", "pycuda"} - modules.keys():
            sys.modules[name] = None  # type: ignore[assignment]  # as if not installed, whatever is
        finder = Finder(modules)
        monkeypatch.setattr(sys, "meta_path", [finder, *(f for f in sys.meta_path if not isinstance(f, Finder))])
        return Box(finder, cuda, found)

    yield start
    forget()
    assert not any(cuda.queue for cuda in cudas), "work was enqueued that nobody waited for"


@pytest.fixture(scope="session")
def small_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three exits, a residual, and a second boundary of two tensors."""
    return testing.small_student(tmp_path_factory.mktemp("student") / "student.onnx")


def recipe(name: str = "fp32", **keys: Any) -> Recipe:
    precision, _, floats = name.partition("-")
    loose = {"max_accuracy_drop": 100.0, "batch_sizes": BUCKETS, "float_layers": floats or "fp32"}
    return Recipe(precision, **{**loose, **keys})  # type: ignore[arg-type]


def compiled(student: Path, out: Path, asked: Recipe, **keys: Any) -> Manifest:
    labels = open_engine(student, threads=1).logits(IMAGES)[-1].argmax(axis=1)
    settings = {"backend": "tensorrt", "calibration": IMAGES, "validation": (IMAGES, labels), **keys}
    return compile_engine(read_student(student), out, recipe=asked, **settings)[0]


def engine_of(student: Path, folder: Path, asked: Recipe | None = None) -> Engine:
    compiled(student, folder / "student.engine", asked or recipe())
    return open_engine(folder / "student.engine")


def surest(logits: Array) -> Array:
    """Largest probability of each row."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray((powers / powers.sum(axis=-1, keepdims=True)).max(axis=-1))


def policies(logits: Array) -> list[Policy]:
    """Everybody leaves at once, nobody does, and about half do at each exit."""
    some = tuple(float(np.median(surest(exit))) for exit in logits[:2])
    return [Policy((1.0,) * 3, (0.0, 0.0)), Policy((1.0,) * 3, (2.0, 2.0)), Policy((1.0,) * 3, some, average="mean")]
