"""ONNX Runtime on the CPU: fp32 and int8. Loading optimises, so the files stay portable ONNX."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx

from edgekd.artifacts import onnx_checks
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import CpuBackend, ReadFile, backend_failure
from edgekd.backends.runner import StagedRunner
from edgekd.backends.staged import Arrays, BoundStages, bound_staged_runner
from edgekd.errors import ArtifactError, BackendError
from edgekd.files import temporary_folder
from edgekd.host import exact_int8
from edgekd.types import Array

_FLOAT = {"Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}
_INT8 = {"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"}


class OnnxRuntimeRunner:
    """A session, with the shapes of its inputs and outputs."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._inputs = [i.name for i in session.get_inputs()]
        self._rows = [_row_shape(o) for o in session.get_outputs()]
        self.row_shapes = _row_shape(session.get_inputs()[0]), self._rows[0]

    def __call__(self, *xs: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
        try:
            outputs: list[npt.NDArray[np.generic]] = self._session.run(None, dict(zip(self._inputs, xs)))
        except Exception as error:  # ONNX Runtime's errors have no base but this
            raise backend_failure("onnxruntime cannot run the network", error) from error
        for found, row in zip(outputs, self._rows):  # declared shapes do not bind ONNX Runtime
            if found.shape[:1] != xs[0].shape[:1] or (found.shape[1:] != row and -1 not in row):
                raise BackendError(f"the network gives {found.shape} for {xs[0].shape}", fix="export it again")
        return outputs

    def bound(self, inputs: Arrays, outputs: Arrays) -> tuple[Callable[[Array], object], Callable[[], object]]:
        """Bind the session to arrays, which must stay where they are.

        Args:
            inputs: Arrays that it reads.
            outputs: Arrays that it writes.

        Returns:
            A function that replaces the first input, and one that runs the session.
        """
        from onnxruntime import OrtValue

        binding = self._session.io_binding()
        for name, x in zip(self._inputs, inputs):
            binding.bind_cpu_input(name, x)
        for output, x in zip(self._session.get_outputs(), outputs):
            binding.bind_ortvalue_output(output.name, OrtValue.ortvalue_from_numpy(x))
        set_input = functools.partial(binding.bind_cpu_input, self._inputs[0])
        return set_input, functools.partial(self._session.run_with_iobinding, binding)


class OnnxRuntimeBackend(CpuBackend[OnnxRuntimeRunner]):
    """ONNX Runtime's CPU provider."""

    name = "onnxruntime"
    extra = "cpu"
    packages = ("onnxruntime",)
    suffix = ".onnx"
    supported_precisions = frozenset({"fp32", "int8"})
    works_after_fork = True
    no_vnni_note = "without VNNI, exact 8-bit sums take about 1.4 times as long as those of 7-bit weights"

    def version(self) -> str | None:
        try:
            import onnxruntime
        except ImportError:
            return None
        return str(onnxruntime.__version__)

    def build(
        self, graph: onnx.ModelProto, path: Path, *, recipe: Recipe, progress: Callable[[float], None] | None = None
    ) -> None:
        """Write the graph as it is."""
        onnx.save(graph, str(path))

    def load(self, path: Path, *, recipe: Recipe, threads: int, read: ReadFile = Path.read_bytes) -> OnnxRuntimeRunner:
        """Create a session of the graph, which already implements the recipe.

        Raises:
            BackendError: ONNX Runtime refuses it.
            ArtifactError: The file refers to data in another file.
        """
        data = read(path)
        if b"location" in data:  # where the data of a tensor would be in another file; parsing all graphs takes memory
            try:
                onnx_checks.parse(data)
            except ValueError as error:
                raise ArtifactError(f"{path} is not a graph built by edgekd: {error}", fix="compile again") from None
        return open_graph(data, threads=threads, name=str(path))

    def precisions(self, path: Path, *, recipe: Recipe) -> Counter[str]:
        """Count fp32 and int8 among the layers of the optimised graph."""
        with temporary_folder("optimised") as folder:
            optimised = folder / "optimised.onnx"
            _session(path, threads=1, optimised=optimised, name=str(path))
            types = [node.op_type for node in onnx.load(str(optimised)).graph.node]
        return Counter(["int8" if t in _INT8 else "fp32" for t in types if t in _INT8 | _FLOAT])

    def staged_runner(self, stages: Sequence[OnnxRuntimeRunner]) -> StagedRunner:
        """Return a staged runner whose sessions are bound to each other for single images."""

        def bind(images: Array) -> BoundStages:
            inputs: list[Arrays] = [[images]]
            bound = []
            logits: list[Array] = []
            for stage in stages:
                outputs = stage(*inputs[-1])
                bound.append(stage.bound(inputs[-1], outputs))
                logits.append(cast(Array, outputs[0]))
                inputs.append(outputs[1:])
            return BoundStages(bound[0][0], inputs[1:], [run for _, run in bound], logits)

        return bound_staged_runner(stages, bind, lambda size: size == 1)


def open_graph(graph: bytes, *, threads: int, name: str = "the network") -> OnnxRuntimeRunner:
    """Load a serialised ONNX graph.

    Args:
        graph: Serialised `ModelProto`.
        threads: CPU threads to use.
        name: Its name in errors.

    Raises:
        BackendError: ONNX Runtime refuses it.
    """
    return OnnxRuntimeRunner(_session(graph, threads=threads, name=name))


def _row_shape(value: Any) -> tuple[int, ...]:
    return tuple(d if isinstance(d, int) else -1 for d in value.shape[1:])


def _session(model: Path | bytes, *, threads: int, optimised: Path | None = None, name: str = "the network") -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its exceptions contain the message
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
        providers = ["CPUExecutionProvider"]  # no fallback exists, and ONNX Runtime would print that
        keep_float = ["WeightBiasQuantization"]  # it would quantise, per tensor, a layer left in float between others
        session = onnxruntime.InferenceSession(
            source, options, providers=providers, enable_fallback=0, disabled_optimizers=keep_float
        )
    except Exception as error:
        raise backend_failure(f"onnxruntime cannot load {name}", error) from error
    session._model_bytes = None  # kept only to open the model again with other providers
    return session
