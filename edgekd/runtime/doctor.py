"""What is installed, and whether the backends really work here."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import BACKENDS, find_backend
from edgekd.backends.report import describe_host
from edgekd.errors import BackendError
from edgekd.extras import extras
from edgekd.files import temporary_folder
from edgekd.host import installed_version


def report() -> tuple[list[str], bool]:
    """Lines for `edgekd doctor`, and whether every installed backend works."""
    lines = [str(describe_host())]
    for extra, packages in extras().items():
        lines.append(f"[{extra}] " + ", ".join(f"{p} {installed_version(p) or 'missing'}" for p in packages))
    tried = {name: _try(name) for name in BACKENDS}
    lines += [f"{name}: {said}" for name, (said, _) in tried.items()]
    return lines, all(works for _, works in tried.values())


def _try(name: str) -> tuple[str, bool]:
    """Build and run a convolution whose answer is known."""
    try:
        backend = find_backend(name)
    except BackendError as error:
        return error.what, True
    with temporary_folder("doctor") as folder:
        path, recipe = (
            folder / f"stage_0{backend.SUFFIX}",
            Recipe("fp32", batch_sizes=(1,), static_batch_sizes=(1,)),
        )
        try:
            backend.build(_convolution(), path, recipe=recipe)
            answer = backend.load(path, recipe=recipe, threads=1)(np.ones((1, 3, 8, 8), np.float32))[0]
        except BackendError as error:
            return error.what, False
    works = np.allclose(answer, 3.0)
    here = f" on {backend.here()['gpu']}" if hasattr(backend, "here") else ""
    return f"{backend.version()} {'works' if works else 'answers wrongly'}{here}", works


def _convolution() -> onnx.ModelProto:
    """Sums the three channels: ones in, threes out."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 8, 8])
    answer = helper.make_tensor_value_info("exit_0", TensorProto.FLOAT, ["n", 1, 8, 8])
    weight = numpy_helper.from_array(np.ones((1, 3, 1, 1), np.float32), "weight")
    node = helper.make_node("Conv", ["images", "weight"], ["exit_0"])
    graph = helper.make_graph([node], "doctor", [images], [answer], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
