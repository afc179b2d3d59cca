"""A machine with a fake GPU and a fake TensorRT, and a small student for it."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fakes.bindings import cuda_driver, cuda_python, pycuda
from fakes.cuda import Cuda
from fakes.tensorrt import Trouble, make
from onnx import TensorProto, helper, numpy_helper

from edgekd.artifact import Card, Exit, Manifest, put_card
from edgekd.engines import Engine, Recipe, compile_engine, open_engine
from edgekd.engines.cuda import find
from edgekd.engines.trt_library import library, logger
from edgekd.engines.trt_run import say_once
from edgekd.runtime.policy import Array, Policy
from edgekd.runtime.preprocess import Preprocess

RNG = np.random.default_rng(5)
IMAGES = RNG.normal(size=(20, 3, 16, 16)).astype(np.float32)
BUCKETS = (1, 2, 4, 8)


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
    for cached in (find, library, logger, say_once):
        cached.cache_clear()
    for name in [n for n in sys.modules if n.split(".")[0] in ("tensorrt", "cuda", "pycuda")]:
        del sys.modules[name]


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Box]]:
    """Makes the machine: box("8.6", bindings=("pycuda",), dla_cores=1)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("edgekd.engines.check.TIMING_S", 0.0)
    monkeypatch.setattr("edgekd.engines.check.WARM_UP", 1)
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
        modules: dict[str, Callable[[], Any]] = {"tensorrt": lambda: make(family, cuda, found)}
        if "cuda-python" in bindings:
            modules |= {"cuda": _package, "cuda.bindings": _package}
            modules["cuda.bindings.runtime"] = lambda: cuda_python(cuda)
            modules["cuda.bindings.driver"] = lambda: cuda_driver(cuda, kernel)
        if "pycuda" in bindings:
            modules |= {"pycuda": _package, "pycuda.driver": lambda: pycuda(cuda)}
        for name in {"tensorrt", "cuda", "pycuda"} - modules.keys():
            sys.modules[name] = None  # type: ignore[assignment]  # as if not installed, whatever is
        finder = Finder(modules)
        monkeypatch.setattr(sys, "meta_path", [finder, *(f for f in sys.meta_path if not isinstance(f, Finder))])
        return Box(finder, cuda, found)

    yield start
    forget()
    assert not any(cuda.queue for cuda in cudas), "work was enqueued that nobody waited for"


def conv(name: str, x: str, y: str, weights: dict[str, Any], *, to: int, of: int, stride: int = 1) -> list[Any]:
    weights[f"{name}_w"] = RNG.normal(size=(to, of, 3, 3)).astype(np.float32) * (2 / (9 * of)) ** 0.5
    weights[f"{name}_b"] = RNG.normal(size=to).astype(np.float32) * 0.1
    kwargs = {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [stride] * 2}
    return [helper.make_node("Conv", [x, f"{name}_w", f"{name}_b"], [y], name=name, **kwargs)]


def head(k: int, x: str, weights: dict[str, Any], *, of: int) -> list[Any]:
    weights[f"fc{k}_w"] = RNG.normal(size=(5, of)).astype(np.float32)
    weights[f"fc{k}_b"] = np.zeros(5, np.float32)
    return [
        helper.make_node("GlobalAveragePool", [x], [f"pool{k}"], name=f"pool{k}"),
        helper.make_node("Flatten", [f"pool{k}"], [f"flat{k}"], name=f"flat{k}"),
        helper.make_node("Gemm", [f"flat{k}", f"fc{k}_w", f"fc{k}_b"], [f"exit_{k}"], name=f"fc{k}", transB=1),
    ]


@pytest.fixture(scope="session")
def small_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three exits, a residual, and a second boundary of two tensors."""
    w: dict[str, Any] = {}
    nodes = [
        *conv("stem", "images", "s", w, to=16, of=3, stride=2),
        helper.make_node("Relu", ["s"], ["stage_0"], name="relu0"),
        *head(0, "stage_0", w, of=16),
        *conv("left", "stage_0", "c", w, to=16, of=16),
        helper.make_node("Add", ["c", "stage_0"], ["d"], name="add"),
        helper.make_node("Relu", ["d"], ["stage_1_0"], name="relu1"),
        *conv("down", "stage_1_0", "e", w, to=32, of=16, stride=2),
        helper.make_node("Relu", ["e"], ["stage_1_1"], name="relu2"),
        *head(1, "stage_1_1", w, of=32),
        *conv("last", "stage_1_0", "f", w, to=32, of=16, stride=2),
        helper.make_node("Add", ["f", "stage_1_1"], ["g"], name="add2"),
        helper.make_node("Relu", ["g"], ["stage_2"], name="relu3"),
        *head(2, "stage_2", w, of=32),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info(f"exit_{k}", TensorProto.FLOAT, ["n", 5]) for k in range(3)],
        [numpy_helper.from_array(value, name) for name, value in w.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    exits = (
        Exit("exit_0", ("stage_0",)),
        Exit("exit_1", ("stage_1_0", "stage_1_1")),
        Exit("exit_2", ("stage_2",)),
    )
    put_card(model, Card("small", tuple("abcde"), Preprocess(16), exits, Policy((1.0,) * 3, (0.26, 0.3))))
    path = tmp_path_factory.mktemp("student") / "student.onnx"
    onnx.save(model, str(path))
    return path


def recipe(name: str = "fp32", **keys: Any) -> Recipe:
    precision, _, floats = name.partition("-")
    loose = {"max_accuracy_drop": 100.0, "batch_sizes": BUCKETS, "float_layers": floats or "fp32"}
    return Recipe(precision, **{**loose, **keys})  # type: ignore[arg-type]


def compiled(student: Path, out: Path, asked: Recipe, **keys: Any) -> Manifest:
    labels = open_engine(student, threads=1).logits(IMAGES)[-1].argmax(axis=1)
    settings = {"backend": "tensorrt", "calibration": IMAGES, "validation": (IMAGES, labels), **keys}
    return compile_engine(student, out, recipe=asked, **settings)[0]


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
