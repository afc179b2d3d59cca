"""Report of what is installed, and a test run of every backend."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import AnyBackend, all_backends
from edgekd.backends.report import describe_host
from edgekd.errors import BackendError
from edgekd.extras import extras
from edgekd.files import temporary_folder
from edgekd.host import installed_version


def report() -> tuple[list[str], bool]:
    """Report on this machine and its packages, and run a small graph with every backend.

    Returns:
        The lines of `edgekd doctor`, and True if every installed backend works.
    """
    lines = [str(describe_host())]
    groups = extras()
    groups |= {backend.name: backend.packages for backend in all_backends() if backend.extra not in groups}
    for group, packages in groups.items():
        lines.append(f"[{group}] " + ", ".join(f"{p} {installed_version(p) or 'missing'}" for p in packages))
    results = {backend.name: _try(backend) for backend in all_backends()}
    lines += [f"{name}: {result}" for name, (result, _) in results.items()]
    return lines, all(works for _, works in results.values())


def _try(backend: AnyBackend) -> tuple[str, bool]:
    """Build and run a convolution whose result is known.

    Returns:
        A line about it, and False if the backend is installed and does not work.
    """
    if backend.version() is None:
        return f"not installed ({backend.install_command})", True
    recipe = Recipe("fp32", batch_sizes=(1,))
    with temporary_folder("doctor") as folder:
        path = folder / f"stage_0{backend.suffix}"
        try:
            backend.build(_convolution(), path, recipe=recipe)
            if reason := backend.cannot_run(recipe):
                return f"{backend.version()} builds ahead of time; none of its engines can run here: {reason}", True
            output = backend.load(path, recipe=recipe, threads=1)(np.ones((1, 3, 8, 8), np.float32))[0]
            facts = backend.host_facts()
        except BackendError as error:
            return error.what, False
    works = np.allclose(output, 3.0)
    on = f" on {', '.join(f'{key} {value}' for key, value in facts.items())}" if facts else ""
    return f"{backend.version()} {'works' if works else 'gives wrong results'}{on}", works


def _convolution() -> onnx.ModelProto:
    """Return a graph that sums the three channels: ones in, threes out."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 8, 8])
    sums = helper.make_tensor_value_info("exit_0", TensorProto.FLOAT, ["n", 1, 8, 8])
    weight = numpy_helper.from_array(np.ones((1, 3, 1, 1), np.float32), "weight")
    node = helper.make_node("Conv", ["images", "weight"], ["exit_0"])
    graph = helper.make_graph([node], "doctor", [images], [sums], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
