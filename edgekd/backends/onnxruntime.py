"""ONNX Runtime on the CPU: fp32 and int8. Loading optimises, so the files stay portable ONNX."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgekd.artifacts import onnx_checks
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import Read, StagedRunner, refused, shares
from edgekd.backends.staged import Arrays, BoundStages, bound_staged_runner
from edgekd.errors import ArtifactError, BackendError
from edgekd.files import temporary_folder
from edgekd.host import exact_int8
from edgekd.types import Array

SUFFIX = ".onnx"
EXTRA = "cpu"
TARGET = "cpu"
ANY_BATCH = True
SATURATES = False
WITHOUT_VNNI = "without VNNI, exact 8-bit sums take about 1.4 times as long as those of 7-bit weights"
_FLOAT = {"Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}
_INT8 = {"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"}


def version() -> str | None:
    """The installed version; None if it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    return str(onnxruntime.__version__)


def build(
    graph: onnx.ModelProto, path: Path, *, recipe: Recipe, progress: Callable[[float], None] | None = None
) -> None:
    """Write the graph.

    Raises:
        BackendError: fp16, for which there are no CPU kernels.
    """
    if recipe.halves:
        raise BackendError("onnxruntime has no fp16 kernels on CPUs", fix="use --backend openvino, or --recipe int8")
    onnx.save(graph, str(path))


class _Runner:
    def __init__(self, session: Any) -> None:
        self._session = session
        self._inputs = [i.name for i in session.get_inputs()]
        self._rows = [_row(o) for o in session.get_outputs()]
        self.ends = _row(session.get_inputs()[0]), self._rows[0]

    def __call__(self, *xs: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
        try:
            outputs: list[npt.NDArray[np.generic]] = self._session.run(None, dict(zip(self._inputs, xs)))
        except Exception as error:  # ONNX Runtime's errors have no base but this
            raise refused("onnxruntime cannot run the network", error) from error
        for found, row in zip(outputs, self._rows):  # declared shapes do not bind ONNX Runtime
            if found.shape[:1] != xs[0].shape[:1] or (found.shape[1:] != row and -1 not in row):
                raise BackendError(f"the network gives {found.shape} for {xs[0].shape}", fix="export it again")
        return outputs

    def bound(self, read: Arrays, written: Arrays) -> tuple[Callable[[Array], object], Callable[[], object]]:
        """How to give it another first input, and a call that reads from and writes to these arrays.

        The arrays have to stay where they are.
        """
        from onnxruntime import OrtValue

        binding = self._session.io_binding()
        for name, x in zip(self._inputs, read):
            binding.bind_cpu_input(name, x)
        for output, x in zip(self._session.get_outputs(), written):
            binding.bind_ortvalue_output(output.name, OrtValue.ortvalue_from_numpy(x))
        give = functools.partial(binding.bind_cpu_input, self._inputs[0])
        return give, functools.partial(self._session.run_with_iobinding, binding)


def _row(end: Any) -> tuple[int, ...]:
    return tuple(d if isinstance(d, int) else -1 for d in end.shape[1:])


def staged_runner(stages: Sequence[Any]) -> StagedRunner:
    """Links the stages for one image at a time."""

    def link(images: Array) -> BoundStages:
        read: list[Arrays] = [[images]]
        bound, found = [], []
        for stage in stages:
            logits, *boundary = stage(*read[-1])
            bound.append(stage.bound(read[-1], [logits, *boundary]))
            found.append(logits)
            read.append(boundary)
        return BoundStages(bound[0][0], read[1:], [run for _, run in bound], found)

    return bound_staged_runner(stages, link, lambda size: size == 1)


def suffixes(recipe: Recipe) -> tuple[str, ...]:
    """The files that `build` writes for each graph."""
    return (SUFFIX,)


def load(path: Path | bytes, *, recipe: Recipe, threads: int, read: Read = Path.read_bytes) -> _Runner:
    """A session from a file, or from a serialised graph; the recipe does not matter, the graph says it all.

    Raises:
        BackendError: ONNX Runtime refuses it. ArtifactError: a file with what no graph of ours has.
    """
    if isinstance(path, bytes):
        return _Runner(_session(path, threads=threads))
    data = read(path)
    if b"location" in data:  # where the data of a tensor would be in another file; parsing all graphs takes memory
        try:
            onnx_checks.parsed(data)
        except ValueError as error:
            raise ArtifactError(f"{path} is no graph of ours: {error}", fix="compile again") from None
    return _Runner(_session(data, threads=threads, name=str(path)))


def precisions(path: Path, *, recipe: Recipe) -> dict[str, float]:
    """Shares of fp32 and int8 among the layers of the optimised graph."""
    with temporary_folder("optimised") as folder:
        optimised = folder / "optimised.onnx"
        _session(path, threads=1, optimised=optimised, name=path)
        types = [node.op_type for node in onnx.load(str(optimised)).graph.node]
    return shares(["int8" if t in _INT8 else "fp32" for t in types if t in _INT8 | _FLOAT])


def _session(
    model: Path | bytes, *, threads: int, optimised: Path | None = None, name: str | Path = "the network"
) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its exceptions say it
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Each stage has its own threads: those of the last stage must not spin while the next one works.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not exact_int8():  # int8 weights become uint8, whose kernels do not saturate; float graphs stay as they are
        options.add_session_config_entry("session.x64quantprecision", "1")
    if optimised:
        options.optimized_model_filepath = str(optimised)
    source = model if isinstance(model, bytes) else str(model)
    try:
        providers = ["CPUExecutionProvider"]  # there is nothing to fall back to, which ONNX Runtime would print
        session = onnxruntime.InferenceSession(source, options, providers=providers, enable_fallback=0)
    except Exception as error:
        raise refused(f"onnxruntime cannot load {name}", error) from error
    session._model_bytes = None  # kept to open the model again with other providers, which nobody asks for
    return session
