"""OpenVINO on the CPU: fp32, int8, and 16 bits as fp16 or bf16, whichever the CPU computes in."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import CpuBackend, ReadFile, backend_failure
from edgekd.backends.runner import StagedRunner
from edgekd.backends.staged import BoundStages, bound_staged_runner
from edgekd.errors import BackendError
from edgekd.host import cpu_flags, kept_from_vnni, visible_cores
from edgekd.types import Array

_LAYERS = ("Convolution", "FullyConnected", "MatMul")
_NAMES = {"f32": "fp32", "f16": "fp16", "i8": "int8", "u8": "int8"}


@dataclass(frozen=True)
class OpenVinoOptions:
    """The `[openvino]` table of a recipe.

    Attributes:
        static_batch_sizes: Batch sizes that each graph is compiled for; other sizes share one graph of any size.
    """

    static_batch_sizes: tuple[int, ...] = (1, 32)

    def __post_init__(self) -> None:
        if min(self.static_batch_sizes, default=1) < 1:
            raise ValueError("static_batch_sizes: at least 1 each")


class OpenVinoRunner:
    """A graph compiled for any batch size and, when first needed, for each static one.

    Every thread has its own infer requests; outputs are copied out of them.
    """

    def __init__(
        self, model: Any, compile_for: Callable[[Any, int | None], Any], static_batch_sizes: tuple[int, ...]
    ) -> None:
        import openvino

        self._tensor = openvino.Tensor
        self._compile_for = functools.partial(compile_for, model)
        self.row_shapes = _row_shape(model.inputs[0]), _row_shape(model.outputs[0])
        self.static = frozenset(static_batch_sizes)
        self._compiled: dict[int | None, Any] = {}
        self._lock = threading.Lock()
        self._own = _ThreadRequests()

    def __call__(self, *xs: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
        size = len(xs[0]) if len(xs[0]) in self.static else None
        request, outputs = self._request(size)
        # OpenVINO reads an array in place: it takes writeable, contiguous ones only, and keeps no reference to them.
        held = [x if x.flags.carray else x.copy() for x in xs]
        for i, x in enumerate(held):
            request.set_input_tensor(i, self._tensor(x, shared_memory=True))
        request.infer(share_outputs=True)
        return [request.get_output_tensor(i).data.copy() for i in outputs]

    def _request(self, size: int | None) -> tuple[Any, range]:
        requests = self._own.requests
        if size not in requests:
            requests[size] = self.request(size)
        return requests[size]

    def request(self, size: int | None) -> tuple[Any, range]:
        """Return a new infer request for a static batch size (None: any size) and the indices of its outputs."""
        with self._lock:
            if size not in self._compiled:
                self._compiled[size] = self._compile_for(size)
                if len(self._compiled) > len(self.static):  # nothing is left to compile, so the network may go
                    del self._compile_for
        compiled = self._compiled[size]
        return compiled.create_infer_request(), range(len(compiled.outputs))


class _ThreadRequests(threading.local):
    """Each thread's own infer requests, and the indices of their outputs."""

    def __init__(self) -> None:
        self.requests: dict[int | None, tuple[Any, range]] = {}


class OpenVinoBackend(CpuBackend[OpenVinoRunner]):
    """OpenVINO's CPU plugin."""

    name = "openvino"
    extra = "cpu"
    packages = ("openvino",)
    suffix = ".xml"
    supported_precisions = frozenset({"fp32", "fp16", "int8"})
    options = OpenVinoOptions
    pads_batches = True
    int8_saturates = True
    no_vnni_note = "without VNNI, weights keep to 7 bits, or 8-bit sums would saturate"

    def version(self) -> str | None:
        try:
            import openvino
        except ImportError:
            return None
        return str(openvino.__version__)

    def build(
        self, graph: onnx.ModelProto, path: Path, *, recipe: Recipe, progress: Callable[[float], None] | None = None
    ) -> None:
        """Write OpenVINO's own format: `path` (.xml) and the weights beside it (.bin).

        Raises:
            BackendError: fp16 on a CPU that computes in neither fp16 nor bf16, or a layer that OpenVINO lacks.
        """
        import openvino

        _precision_hint(recipe)
        try:
            model = openvino.Core().read_model(graph.SerializeToString())
            openvino.save_model(model, path, compress_to_fp16=False)
        except RuntimeError as error:
            raise backend_failure(f"openvino cannot write {path}", error) from error

    def suffixes(self, recipe: Recipe) -> tuple[str, ...]:
        return (self.suffix, ".bin")

    def load(self, path: Path, *, recipe: Recipe, threads: int, read: ReadFile = Path.read_bytes) -> OpenVinoRunner:
        """Read the graph; it is compiled for a batch size when one is first run.

        Raises:
            BackendError: OpenVINO refuses it.
        """

        def compile_for(model: Any, size: int | None) -> Any:
            return _compile(model, path, recipe=recipe, threads=threads, size=size)

        return OpenVinoRunner(_read(path, read), compile_for, self.parse_options(recipe).static_batch_sizes)

    def precisions(self, path: Path, *, recipe: Recipe) -> Counter[str]:
        """Count precisions among the layers of the compiled graph."""
        found = []
        compiled = _compile(_read(path), path, recipe=recipe, threads=1, size=1)
        for layer in compiled.get_runtime_model().get_ordered_ops():
            info = layer.get_rt_info()
            kind, precision = (str(getattr(info[k], "value", info[k])) for k in ("layerType", "runtimePrecision"))
            if kind.startswith(_LAYERS):
                found.append(_NAMES.get(precision, precision))
        return Counter(found)

    def staged_runner(self, stages: Sequence[OpenVinoRunner]) -> StagedRunner:
        """Return a staged runner whose infer requests are bound to each other for static batch sizes."""

        def bind(images: Array) -> BoundStages:
            requests = [stage.request(len(images)) for stage in stages]
            for (before, outputs), (after, _) in itertools.pairwise(requests):
                for i in outputs[1:]:
                    after.set_input_tensor(i - 1, before.get_output_tensor(i))
            first, *others = (request for request, _ in requests)
            return BoundStages(
                start=functools.partial(np.copyto, first.get_input_tensor(0).data),
                inputs=[[r.get_input_tensor(i).data for i in range(len(r.model_inputs))] for r in others],
                run=[functools.partial(request.infer, share_outputs=True) for request, _ in requests],
                logits=[request.get_output_tensor(0).data for request, _ in requests],
            )

        return bound_staged_runner(stages, bind, stages[0].static.__contains__)


def _row_shape(value: Any) -> tuple[int, ...]:
    return tuple(d.get_length() if d.is_static else -1 for d in list(value.partial_shape)[1:])


def _read(path: Path, read: ReadFile = Path.read_bytes) -> Any:
    """Return the network, which holds a copy of its weights."""
    import openvino

    weights = np.frombuffer(read(path.with_suffix(".bin")), np.uint8)
    try:
        return openvino.Core().read_model(read(path), openvino.Tensor(weights))
    except RuntimeError as error:
        raise backend_failure(f"openvino cannot load {path}", error) from error


def _compile(model: Any, name: Path, *, recipe: Recipe, threads: int, size: int | None) -> Any:
    import openvino

    if kept_from_vnni() and "avx512f" in cpu_flags():
        what = "with ONEDNN_MAX_CPU_ISA, OpenVINO ends in a segmentation fault at LayerNormalization on this CPU"
        raise BackendError(what, fix="unset ONEDNN_MAX_CPU_ISA, or use --backend onnxruntime")
    model = model.clone()
    try:
        if size is not None:
            model.reshape({i: [size, *list(x.partial_shape)[1:]] for i, x in enumerate(model.inputs)})
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": _precision_hint(recipe),
            # One thread pool for all stages on all cores; switching between pools of their own is slow.
            "EXCLUSIVE_ASYNC_REQUESTS": threads >= visible_cores(),
        }
        with own_signal_stack():
            return openvino.Core().compile_model(model, "CPU", options)
    except RuntimeError as error:
        raise backend_failure(f"openvino cannot load {name}", error) from error


@contextlib.contextmanager
def own_signal_stack() -> Iterator[None]:
    """Restore the calling thread's alternate signal stack when the block ends.

    OpenVINO replaces it when it compiles and may unmap it later; Python's handlers run on it, so Ctrl-C or the end of a
    child would then be a segmentation fault.
    """
    if not hasattr(libc := ctypes.CDLL(None), "sigaltstack"):
        yield
        return
    kept = ctypes.create_string_buffer(64)  # a stack_t, which has 24 bytes
    libc.sigaltstack(None, kept)
    try:
        yield
    finally:
        libc.sigaltstack(kept, None)


def _precision_hint(recipe: Recipe) -> str:
    """Return OpenVINO's name for the precision of layers that are not quantised."""
    import openvino

    if not recipe.uses_fp16:
        return "f32"
    able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "FP16" in able or "BF16" in able:
        return "f16" if "FP16" in able else "bf16"
    raise BackendError("this CPU computes in neither fp16 nor bf16", fix="use --recipe int8 or fp32")
