"""A real builder: TensorRT-RTX, which parses and builds where there is no GPU, as NVIDIA documents.

Its wheels (180 MB) are downloaded with pip into the user's cache folder, under NVIDIA's licence, which they bring
along. Nothing of them is passed on. Opening and running engines needs a GPU, so that is not tried.
"""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.bindings import NotHere, download

from edgekd.artifacts.metadata import ModelMetadata, read_onnx
from edgekd.artifacts.partition import graphs
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.tensorrt.builder import Plan, build_plan
from edgekd.backends.tensorrt.library import TENSORRT_RTX
from edgekd.backends.tensorrt.options import Target, TensorRTOptions
from edgekd.quantization import quantize

WHEELS = (("tensorrt-rtx-cu12-bindings", "1.7.1.116"), ("onnxruntime-ep-nv-tensorrt-rtx-cu12", "0.5.0"))
"""The bindings, and a plugin that holds the libraries of the same version."""
RECIPES = {
    "fp32": Recipe("fp32", batch_sizes=(1,)),
    "fp16": Recipe("fp16", batch_sizes=(1,)),
    "int8": Recipe("int8", batch_sizes=(1,)),
    "int8-fp16": Recipe("int8", "fp16", batch_sizes=(1, 8)),
}
Subject = tuple[onnx.ModelProto, ModelMetadata]


def wheels() -> Path:
    """The folder with both wheels unpacked.

    Raises:
        NotHere: No package registry, or no wheel for this Python or platform.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgekd-tests"
    folder = base / f"tensorrt-rtx-{WHEELS[0][1]}-{sys.implementation.cache_tag}"
    if (folder / "ready").exists():
        return folder
    work = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        for package, version in WHEELS:
            wheel = download(package, version, work, python=f"{sys.version_info.major}.{sys.version_info.minor}")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(work)
            wheel.unlink()
        (work / "ready").touch()
        shutil.rmtree(folder, ignore_errors=True)
        work.replace(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


@pytest.fixture
def real_builder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes TENSORRT_RTX the real library. It stays loaded: a process cannot load it twice."""
    try:
        monkeypatch.syspath_prepend(wheels())
    except NotHere as error:
        pytest.skip(f"TensorRT-RTX, NVIDIA's builder that needs no GPU: {error}")
    vars(TENSORRT_RTX).clear()
    yield
    vars(TENSORRT_RTX).clear()


def exported(name: str, folder: Path, *, size: int = 32) -> Path:
    """A network with seeded random weights, exported."""
    import torch

    from edgekd.data.preprocess import Preprocess
    from edgekd.export import export
    from edgekd.models.base import exits_of
    from edgekd.models.networks import build
    from edgekd.policy import Policy

    torch.manual_seed(0)
    network = build(name, classes=5, image_size=size, stem="small" if name == "msdnet" else "imagenet").eval()
    images = np.random.default_rng(0).normal(size=(4, 3, size, size)).astype(np.float32)
    exits = exits_of(network(torch.from_numpy(images)))
    metadata = ModelMetadata(name, tuple("abcde"), Preprocess(size), exits, Policy((1.0,) * len(exits)))
    path = folder / f"{name}.onnx"
    export(network, metadata, out=path, images=images, names=[f"image {i}" for i in range(4)])
    return path


def target(recipe: Recipe) -> Target:
    """For a GPU of the Ampere generation."""
    return Target(TENSORRT_RTX, recipe, TensorRTOptions(timing_cache=False), ("SM86",))


def quantised(path: Path, recipe: Recipe, *, target: str = "tensorrt") -> Subject:
    """A student as a recipe asks for it; ranges are those of a few images of noise."""
    model, metadata = read_onnx(path)
    if recipe.precision != "int8":
        return model, metadata
    size = metadata.preprocess.image_size
    noise = np.random.default_rng(0).normal(size=(4, 3, size, size)).astype(np.float32)
    return quantize(model, metadata, noise, target=target, heads=True), metadata


def builds(subject: Subject, recipe: Recipe, *, progress: Callable[[float], None] | None = None) -> dict[str, Plan]:
    """Every graph of an engine, built."""
    return {
        name: build_plan(graph, name=name, target=target(recipe), progress=progress)
        for name, graph in graphs(*subject).items()
    }


def int8_nodes(graph: onnx.ModelProto) -> set[str]:
    """Convolutions and matrix products whose weights and input come out of Q/DQ pairs."""
    makers = {name: node.op_type for node in graph.graph.node for name in node.output}
    return {
        node.name
        for node in graph.graph.node
        if node.op_type in ("Conv", "Gemm") and [makers.get(n) for n in node.input[:2]] == ["DequantizeLinear"] * 2
    }
