"""Running TensorRT engines: boundary tensors stay on the GPU; a stage costs one launch and one synchronisation."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.backends.base import ReadFile
from edgekd.backends.cuda.base import Graph
from edgekd.backends.cuda.device import device
from edgekd.backends.cuda.device_tensor import Tensor
from edgekd.backends.tensorrt.graph_passes import is_boundary
from edgekd.backends.tensorrt.library import Library
from edgekd.backends.tensorrt.options import Target
from edgekd.errors import BackendError, DataError

log = logging.getLogger(__name__)


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning once per process."""
    log.warning("%s", text)


class TensorRTRunner:
    """A loaded engine file: a `Runner` for arrays in host memory, and a stage of a `StagedRun`.

    Attributes:
        library: The library that runs it.
        name: Name of the graph.
        sizes: Batch sizes that it was built for, ascending.
        inputs, outputs: Names of the tensors, in graph order.
        boundaries: Names of the outputs that are boundary tensors.
        logits: Names of the outputs that are logits.
        tensors: Tensors in device memory, by name.
        row_shapes: See `edgekd.backends.runner.CompiledGraph`.
    """

    def __init__(self, path: Path, target: Target, read: ReadFile = Path.read_bytes) -> None:
        self.library = target.library
        trt = self.library.trt
        self.name = path.stem
        self.sizes = sorted(set(target.recipe.batch_sizes))
        with device():
            self._runtime = self.library.make(trt.Runtime)
            self.engine = self._deserialised(path, target, read)
            names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
            self.inputs = [n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
            self.outputs = [n for n in names if n not in self.inputs]
            self._contexts: dict[int, Any] = {}
            self._batches: dict[int, Batch] = {}
            self._check_layout(path)
            self._scratch = device().scratch
            self._scratch.reserve(self, self._scratch_size())
            shapes = self.context(self.sizes[0])  # a first context has the first profile by default
            self.tensors = {
                n: Tensor(tuple(shapes.get_tensor_shape(n))[1:], self._dtype(n), self.sizes[-1]) for n in names
            }
        self.boundaries = [n for n in self.outputs if is_boundary(n)]
        self.logits = [n for n in self.outputs if not is_boundary(n)]
        self.row_shapes = self.tensors[self.inputs[0]].shape, self.tensors[self.logits[0]].shape

    def _deserialised(self, path: Path, target: Target, read: ReadFile) -> Any:
        if target.options.version_compatible and hasattr(self._runtime, "engine_host_code_allowed"):
            self._runtime.engine_host_code_allowed = True  # TensorRT 8.5 knows no such engines
        if target.options.dla_core is not None:
            self._runtime.DLA_core = target.options.dla_core
        engine = self._runtime.deserialize_cuda_engine(read(path))
        if engine is None:
            what = f"{self.library.name} cannot open {path}"
            raise self.library.failed(what, fix="compile it again on this machine with edgekd compile")
        if target.options.strip_weights:
            _refit(self.library, engine, path.with_suffix(".onnx"), read)
        self.library.forget_messages()
        return engine

    def _dtype(self, name: str) -> npt.DTypeLike:
        trt = self.library.trt
        known = {trt.DataType.FLOAT: np.float32, trt.DataType.HALF: np.float16, trt.DataType.INT8: np.int8}
        return known[self.engine.get_tensor_dtype(name)]

    def _check_layout(self, path: Path) -> None:
        """Check that all inputs and outputs are arrays without padding, as edgekd allocates and copies them.

        Raises:
            BackendError: One is not.
        """
        trt = self.library.trt
        for name in (*self.inputs, *self.outputs):
            if self.engine.get_tensor_format(name) != trt.TensorFormat.LINEAR:
                layout = self.engine.get_tensor_format_desc(name)
                what = f"{path}: {name} is laid out as '{layout}', not as a plain array"
                raise BackendError(what, fix="compile it again with edgekd compile")

    def _scratch_size(self) -> int:
        """Return the bytes of scratch memory that the batch size with the largest need takes."""
        new = hasattr(self.engine, "device_memory_size_v2")
        return int(self.engine.device_memory_size_v2 if new else self.engine.device_memory_size)

    def scratch_moved(self) -> None:
        """Make the batches anew when they are next used; see `edgekd.backends.cuda.scratch`."""
        self._batches.clear()

    def context(self, size: int) -> Any:
        """Return an execution context for batches of `size`, without scratch memory."""
        trt = self.library.trt
        if size not in self._contexts:
            if hasattr(trt, "ExecutionContextAllocationStrategy"):
                context = self.engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            else:
                context = self.engine.create_execution_context_without_device_memory()
            if context is None:
                raise self.library.failed(f"{self.library.name} cannot make a context for {self.name}")
            ready = context.set_optimization_profile_async(self.sizes.index(size), device().stream)
            device().synchronize()
            for name in self.inputs:
                shape = (size, *tuple(self.engine.get_tensor_shape(name))[1:])
                ready = ready and context.set_input_shape(name, shape)
            if not ready:
                raise self.library.failed(f"{self.library.name} refuses batches of {size} for {self.name}")
            self._contexts[size] = context
        return self._contexts[size]

    def prepared(self, size: int) -> Any:
        """Return the same context with scratch memory, reading and writing `tensors`."""
        context, scratch = self.context(size), self._scratch.memory
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(scratch.address, scratch.size)
        else:
            context.device_memory = scratch.address
        for name, tensor in self.tensors.items():
            if not context.set_tensor_address(name, tensor.address):
                raise self.library.failed(f"{self.library.name} refuses the memory of {name}")
        return context

    def read_from(self, before: TensorRTRunner) -> None:
        """Read the inputs from where the stage before writes them.

        Raises:
            BackendError: Shapes or types differ.
        """
        for name in self.inputs:
            mine, its = self.tensors[name], before.tensors[name]
            if (mine.shape, mine.dtype) != (its.shape, its.dtype):
                what = f"{self.name} reads {name} as {mine.dtype} {mine.shape}, {before.name} writes {its.dtype}"
                raise BackendError(f"{what} {its.shape}", fix="compile again")
            if mine is not its:
                self.tensors[name] = its
                self._batches.clear()  # they are bound to the old address

    def launch(self, count: int) -> None:
        """Enqueue the graph on the first `count` rows, and the copy of its logits to the host."""
        self.batch(count).launch()

    def batch(self, count: int) -> Batch:
        """Return the engine for the batch size that `count` rows take."""
        size = self.size_for(count)
        if size not in self._batches:
            self._batches[size] = Batch(self, size)
        return self._batches[size]

    def size_for(self, count: int) -> int:
        """Return the smallest batch size that holds `count` rows.

        Raises:
            BackendError: The engine was built for none.
        """
        for size in self.sizes:
            if size >= count:
                return size
        sizes = ", ".join(map(str, self.sizes))
        fix = f"compile with --set batch_sizes=[{sizes}, {count}]"
        raise BackendError(f"a batch of {count} is outside the profiles of {self.name}: {sizes}", fix=fix)

    def step(self, count: int) -> npt.NDArray[Any]:
        """Run on the first `count` rows and return the logits (count, C)."""
        self.launch(count)
        device().synchronize()
        logits: npt.NDArray[Any] = self.tensors[self.logits[0]].host[:count].copy()
        return logits

    def __call__(self, *xs: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
        """Run on arrays in host memory; larger batches are split at the largest size that the engine was built for.

        Raises:
            DataError: Rows of another shape or type.
        """
        largest = self.sizes[-1]
        with device():
            parts = [self._run([x[i : i + largest] for x in xs]) for i in range(0, len(xs[0]), largest)]
        return parts[0] if len(parts) == 1 else [np.concatenate(rows) for rows in zip(*parts)]

    def _run(self, xs: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        count = len(xs[0])
        for name, x in zip(self.inputs, xs):
            self.fits(name, x)
            self.tensors[name].put(x)
        self.launch(count)
        for name in self.boundaries:
            self.tensors[name].fetch(count)
        device().synchronize()
        return [self.tensors[name].host[:count].copy() for name in self.outputs]

    def fits(self, name: str, x: npt.NDArray[Any]) -> None:
        """Check that an input accepts rows like these.

        Raises:
            DataError: Their shape or type differs.
        """
        tensor = self.tensors[name]
        if (x.shape[1:], x.dtype) != (tensor.shape, tensor.dtype):
            shape = ", ".join(map(str, tensor.shape))
            what = f"{name} of {x.dtype} {x.shape} is outside the profiles of {self.name}"
            raise DataError(what, fix=f"give {tensor.dtype} (N, {shape})")


def enqueue(context: Any, *, library: Library, name: str) -> None:
    """Enqueue a run of a prepared context of the graph `name`."""
    if not context.execute_async_v3(device().stream):
        raise library.failed(f"{library.name} cannot run {name}")


def _refit(library: Library, engine: Any, path: Path, read: ReadFile) -> None:
    """Load the weights that the engine was built without."""
    trt = library.trt
    refitter = library.make(trt.Refitter, engine)
    parser = library.make(trt.OnnxParserRefitter, refitter)
    if not (parser.refit_from_bytes(read(path)) and refitter.refit_cuda_engine()):
        raise library.failed(f"the weights of {path} do not fit the engine beside it", fix="compile it again")


class Batch:
    """An engine for batches of one size: one launch of a CUDA graph where possible, else TensorRT's own launches."""

    def __init__(self, runner: TensorRTRunner, size: int) -> None:
        self._context = runner.prepared(size)
        self._library, self._name = runner.library, runner.name  # not the runner: a cycle would keep its memory
        self._logits = [runner.tensors[name] for name in runner.logits]
        self._size = size
        self.enqueue()  # TensorRT sets itself up on the first run, which cannot be captured
        device().synchronize()
        self._graph = self._captured()

    def enqueue(self) -> None:
        """Enqueue the run and the copy of its logits, without a graph."""
        enqueue(self._context, library=self._library, name=self._name)
        for tensor in self._logits:
            tensor.fetch(self._size)

    def _captured(self) -> Graph | None:
        if not device().can_capture:
            warn_once(f"{device().bindings} has no CUDA graphs: every stage is launched by TensorRT, which is slower")
            return None
        try:
            return device().capture(self.enqueue)
        except BackendError as error:
            warn_once(f"no CUDA graphs, stages are launched by TensorRT, which is slower: {error.what}")
            return None

    def launch(self) -> None:
        if self._graph:
            device().launch(self._graph)
        else:
            self.enqueue()


class StagedRun:
    """A staged run through stages that are linked by `read_from`; see `edgekd.backends.runner.StagedRun`."""

    def __init__(self, stages: Sequence[TensorRTRunner], images: npt.NDArray[np.float32]) -> None:
        self._remaining = iter(stages)
        self._count = len(images)
        first = stages[0]
        first.size_for(self._count)
        first.fits("images", images)
        self._boundary = [first.tensors["images"]]
        self._boundary[0].put(images)

    def run_stage(self) -> npt.NDArray[Any]:
        stage = next(self._remaining)
        self._boundary = [stage.tensors[name] for name in stage.boundaries]
        return stage.step(self._count)

    def compact(self, indices: npt.NDArray[np.int64], size: int) -> None:
        rows = indices.tolist()
        for tensor in self._boundary:
            tensor.compact(rows)
        self._count = size


def staged_runner(
    stages: Sequence[TensorRTRunner],
) -> Callable[[npt.NDArray[np.float32]], contextlib.AbstractContextManager[StagedRun]]:
    """Link the stages, and return a staged runner, which runs one batch at a time."""
    with device():
        for before, after in itertools.pairwise(stages):
            after.read_from(before)

    @contextlib.contextmanager
    def start(images: npt.NDArray[np.float32]) -> Iterator[StagedRun]:
        with device():
            yield StagedRun(stages, images)

    return start
