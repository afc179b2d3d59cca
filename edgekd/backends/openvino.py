"""OpenVINO on the CPU: fp32, int8, and 16 bits as fp16 or bf16, whichever the CPU computes in."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import Read, StagedRunner, refused, shares
from edgekd.backends.staged import BoundStages, bound_staged_runner
from edgekd.errors import BackendError
from edgekd.host import cpu_flags, kept_from_vnni, visible_cores
from edgekd.types import Array

SUFFIX = ".xml"
EXTRA = "cpu"
TARGET = "cpu"
ANY_BATCH = True
SATURATES = True
WITHOUT_VNNI = "without VNNI, weights keep to 7 bits, or 8-bit sums would saturate"
_LAYERS = ("Convolution", "FullyConnected", "MatMul")
_NAMES = {"f32": "fp32", "f16": "fp16", "i8": "int8", "u8": "int8"}


def version() -> str | None:
    """The installed version; None if it is not installed."""
    try:
        import openvino
    except ImportError:
        return None
    return str(openvino.__version__)


def build(
    graph: onnx.ModelProto, path: Path, *, recipe: Recipe, progress: Callable[[float], None] | None = None
) -> None:
    """Write OpenVINO's own form: `path` (.xml) and the weights beside it (.bin).

    Raises:
        BackendError: fp16, and the CPU computes in neither fp16 nor bf16; or a layer that OpenVINO does not know.
    """
    import openvino

    _hint(recipe)
    try:
        model = openvino.Core().read_model(graph.SerializeToString())
        openvino.save_model(model, path, compress_to_fp16=False)
    except RuntimeError as error:
        raise refused(f"openvino cannot write {path}", error) from error


class _Own(threading.local):
    """Each thread's own infer requests, and the indices of their outputs."""

    def __init__(self) -> None:
        self.requests: dict[int | None, tuple[Any, range]] = {}


class _Runner:
    """A compiled graph for any batch size and, made when first needed, one for each of `static`.

    Every thread has its own infer requests; outputs are copied out of them.
    """

    def __init__(self, model: Any, name: Path, recipe: Recipe, threads: int) -> None:
        import openvino

        self._tensor = openvino.Tensor
        self._compile_for = functools.partial(_compile, model, name, recipe=recipe, threads=threads)
        self.ends = _row(model.inputs[0]), _row(model.outputs[0])
        self.static = frozenset(recipe.static_batch_sizes)
        self._compiled: dict[int | None, Any] = {}
        self._lock = threading.Lock()
        self._own = _Own()

    def __call__(self, *xs: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
        size = len(xs[0]) if len(xs[0]) in self.static else None
        request, outputs = self._request(size)
        # OpenVINO reads an array where it lies: it takes writeable, contiguous ones only, and keeps no hold on them.
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
        """A new infer request and the indices of its outputs."""
        with self._lock:
            if size not in self._compiled:
                self._compiled[size] = self._compile_for(size=size)
                if len(self._compiled) > len(self.static):  # nothing is left to compile, so the network may go
                    del self._compile_for
        compiled = self._compiled[size]
        return compiled.create_infer_request(), range(len(compiled.outputs))


def staged_runner(stages: Sequence[_Runner]) -> StagedRunner:
    """Links the stages for static batch sizes."""

    def link(images: Array) -> BoundStages:
        requests = [stage.request(len(images)) for stage in stages]
        for (before, outputs), (after, _) in itertools.pairwise(requests):
            for i in outputs[1:]:
                after.set_input_tensor(i - 1, before.get_output_tensor(i))
        first, *others = (request for request, _ in requests)
        return BoundStages(
            start=functools.partial(np.copyto, first.get_input_tensor(0).data),
            read=[[r.get_input_tensor(i).data for i in range(len(r.model_inputs))] for r in others],
            run=[functools.partial(request.infer, share_outputs=True) for request, _ in requests],
            logits=[request.get_output_tensor(0).data for request, _ in requests],
        )

    return bound_staged_runner(stages, link, stages[0].static.__contains__)


def suffixes(recipe: Recipe) -> tuple[str, ...]:
    """The files that `build` writes for each graph."""
    return (SUFFIX, ".bin")


def load(path: Path, *, recipe: Recipe, threads: int, read: Read = Path.read_bytes) -> _Runner:
    """Compile for this machine; static batch sizes when they are first met."""
    return _Runner(_read(path, read), path, recipe, threads)


def precisions(path: Path, *, recipe: Recipe) -> dict[str, float]:
    """Shares of fp32, fp16, bf16 and int8 among the layers that really run."""
    found = []
    for layer in _compile(_read(path), path, recipe=recipe, threads=1, size=1).get_runtime_model().get_ordered_ops():
        info = layer.get_rt_info()
        kind, precision = (str(getattr(info[k], "value", info[k])) for k in ("layerType", "runtimePrecision"))
        if kind.startswith(_LAYERS):
            found.append(_NAMES.get(precision, precision))
    return shares(found)


def _row(end: Any) -> tuple[int, ...]:
    return tuple(d.get_length() if d.is_static else -1 for d in list(end.partial_shape)[1:])


def _read(path: Path, read: Read = Path.read_bytes) -> Any:
    """The network, which holds a copy of its weights."""
    import openvino

    weights = np.frombuffer(read(path.with_suffix(".bin")), np.uint8)
    try:
        return openvino.Core().read_model(read(path), openvino.Tensor(weights))
    except RuntimeError as error:
        raise refused(f"openvino cannot load {path}", error) from error


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
            "INFERENCE_PRECISION_HINT": _hint(recipe),
            # One pool of threads for all stages. It has all cores; threads are slow to move between pools of their own.
            "EXCLUSIVE_ASYNC_REQUESTS": threads >= visible_cores(),
        }
        with own_signal_stack():
            return openvino.Core().compile_model(model, "CPU", options)
    except RuntimeError as error:
        raise refused(f"openvino cannot load {name}", error) from error


@contextlib.contextmanager
def own_signal_stack() -> Iterator[None]:
    """Put back the calling thread's alternate signal stack when the block ends.

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


def _hint(recipe: Recipe) -> str:
    """OpenVINO's word for the precision of what is not quantised."""
    import openvino

    if not recipe.halves:
        return "f32"
    able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "FP16" in able or "BF16" in able:
        return "f16" if "FP16" in able else "bf16"
    raise BackendError("this CPU computes in neither fp16 nor bf16", fix="use --recipe int8 or fp32")
