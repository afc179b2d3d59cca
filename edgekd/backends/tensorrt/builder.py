"""Building a TensorRT engine from a graph."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from edgekd.backends.cuda.device import device
from edgekd.backends.tensorrt.graph_passes import is_boundary, to_fp16, without_new_operators, without_qdq
from edgekd.backends.tensorrt.layers import Layer, from_log
from edgekd.backends.tensorrt.library import Library, parse_version
from edgekd.backends.tensorrt.options import Target, TensorRTOptions
from edgekd.errors import BackendError
from edgekd.files import atomic_write, cache_folder, locked
from edgekd.signals import deferred

log = logging.getLogger(__name__)


NEWEST_OPSET = {8: 17}
"""Major version to the newest opset that its parser understands. It reads newer ones as well, but wrongly: the axes of
opset 18's ReduceMean, for one, are an input, which it ignores."""


@dataclass(frozen=True)
class Plan:
    """A built engine.

    Attributes:
        data: The serialised engine.
        graph: The graph that TensorRT parsed.
        listing: The builder's list of its layers for all batch sizes, from TensorRT-RTX; else empty.
    """

    data: bytes
    graph: onnx.ModelProto
    listing: str

    @property
    def layers(self) -> list[Layer]:
        """The layers of `listing`."""
        return from_log(self.listing)


def build_plan(
    graph: onnx.ModelProto, *, name: str, target: Target, progress: Callable[[float], None] | None = None
) -> Plan:
    """Build an engine; where the library needs a GPU, the calling thread must hold it.

    Args:
        graph: The graph.
        name: Its name in errors.
        target: What it is built for.
        progress: Called with the fraction done, which TensorRT reports from 10 on, and at the end with 1.

    Raises:
        BackendError: The GPU or this TensorRT does not support what the recipe requests, or building fails; with
            TensorRT's own messages.
    """
    library = target.library
    trt = library.trt
    builder = library.make(trt.Builder)
    _check_able(builder, target)
    graph, ranges = _ready(graph, target)
    network = builder.create_network(_creation_flags(library))
    parser = library.make(trt.OnnxParser, network)  # owns the weights, so it must outlive the build
    _parse(parser, graph, name=name, target=target)
    _set_linear(network, library)
    if not library.strongly_typed:
        _set_boundaries_fp16(network, target)
        _set_ranges(network, ranges)
    config = builder.create_builder_config()
    _configure(config, target)
    _set_batches(builder, network, config, target)
    with timing_cache(config, target), deferred() as received:
        monitor = _monitor(progress, library, received) if hasattr(config, "progress_monitor") else None
        if monitor:
            config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if monitor and monitor.error:
        raise monitor.error
    if plan is None:
        raise library.failed(f"{library.name} cannot build {name} as {target.recipe.name}")
    listing = library.logger.listing
    library.forget_messages()
    if progress:
        progress(1.0)
    return Plan(bytes(plan), graph, listing)


def _check_able(builder: Any, target: Target) -> None:
    """Check what flags below 11 ignore silently; from 11 on every supported GPU has both precisions."""
    recipe, core = target.recipe, target.options.dla_core
    if recipe.precision == "int8" and hasattr(builder, "platform_has_fast_int8") and not builder.platform_has_fast_int8:
        raise BackendError(f"{_gpu()} has no fast int8", fix="use --recipe fp16")
    if recipe.uses_fp16 and hasattr(builder, "platform_has_fast_fp16") and not builder.platform_has_fast_fp16:
        raise BackendError(f"{_gpu()} has no fast fp16", fix="use --recipe int8 or fp32")
    if core is not None and core >= builder.num_DLA_cores:
        version = target.library.trt.__version__
        what = f"this machine has no DLA core {core}: TensorRT {version} finds {builder.num_DLA_cores}"
        raise BackendError(what, fix="use --recipe int8-fp16, which runs on the GPU")


def _gpu() -> str:
    return f"{device().name} (SM {device().sm})"


def _ready(graph: onnx.ModelProto, target: Target) -> tuple[onnx.ModelProto, dict[str, float]]:
    """Return the graph as this TensorRT takes it, and activation ranges that it takes separately."""
    if target.library.needs_gpu and parse_version(target.library.trt.__version__) < (8, 6):
        graph = without_new_operators(graph)
    if target.options.dla_core is not None and target.recipe.precision == "int8" and not target.library.strongly_typed:
        return without_qdq(graph)
    return (to_fp16(graph) if target.recipe.uses_fp16 and target.library.strongly_typed else graph), {}


def _creation_flags(library: Library) -> int:
    trt = library.trt
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH"):
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    if library.strongly_typed:
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return flags


def _parse(parser: Any, graph: onnx.ModelProto, *, name: str, target: Target) -> None:
    trt = target.library.trt
    opset = next(o.version for o in graph.opset_import if o.domain in ("", "ai.onnx"))
    newest = NEWEST_OPSET.get(parse_version(trt.__version__)[0]) if target.library.needs_gpu else None
    if newest and opset > newest:
        what = f"{target.library.name} {trt.__version__} understands opset {newest}; {name} has opset {opset}"
        raise BackendError(what, fix=f"export the network with opset {newest}, or use a newer TensorRT")
    has_flags = hasattr(trt, "OnnxParserFlag")  # from 8.6 on
    if target.options.dla_core is not None and has_flags and hasattr(trt.OnnxParserFlag, "ADJUST_FOR_DLA"):
        parser.set_flag(trt.OnnxParserFlag.ADJUST_FOR_DLA)
    if parser.parse(graph.SerializeToString()):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    lines = [f"  {_node(error, graph)}: {error.desc()}" for error in errors]
    raise target.library.failed(
        "\n".join([f"{target.library.name} {trt.__version__} cannot read {name} (opset {opset}):", *lines]),
        fix="use another --backend for this network, or a newer TensorRT",
    )


def _node(error: Any, graph: onnx.ModelProto) -> str:
    """Describe the node that a parser's error is about, by name and operator."""
    index = error.node()
    if 0 <= index < len(graph.graph.node):
        node = graph.graph.node[index]
        return f"node '{node.name or ', '.join(node.output)}' ({node.op_type})"
    return "the graph"


def _set_linear(network: Any, library: Library) -> None:
    """Allow no memory layout but NCHW for inputs and outputs: by default TensorRT may choose any."""
    linear = 1 << int(library.trt.TensorFormat.LINEAR)
    for i in range(network.num_inputs):
        network.get_input(i).allowed_formats = linear
    for i in range(network.num_outputs):
        network.get_output(i).allowed_formats = linear


def _set_boundaries_fp16(network: Any, target: Target) -> None:
    """Set boundary tensors to fp16; strongly typed graphs have their types already."""
    trt = target.library.trt
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    for tensor in tensors:
        if target.recipe.uses_fp16 and is_boundary(tensor.name) and tensor.dtype == trt.DataType.FLOAT:
            tensor.dtype = trt.DataType.HALF


def _set_ranges(network: Any, ranges: dict[str, float]) -> None:
    """Set the dynamic range of each tensor, by name, for implicit quantisation."""
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    for i in range(network.num_layers if ranges else 0):
        layer = network.get_layer(i)
        tensors += [layer.get_output(k) for k in range(layer.num_outputs)]
    for tensor in tensors:
        if tensor.name in ranges:
            tensor.set_dynamic_range(-ranges[tensor.name], ranges[tensor.name])


def _configure(config: Any, target: Target) -> None:
    trt, requested = target.library.trt, target.options
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the precision cannot be read back
    if target.library.needs_gpu:
        workspace = int(requested.workspace_share * device().free_bytes())
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if target.compute_capabilities:
        _set_compute_capabilities(config, target)
    if target.recipe.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # keeps 10 bits of 23
    if not target.library.strongly_typed:
        if target.recipe.precision == "int8":
            config.set_flag(trt.BuilderFlag.INT8)
        if target.recipe.uses_fp16:
            config.set_flag(trt.BuilderFlag.FP16)
    if requested.optimization_level != TensorRTOptions.optimization_level:
        _need(hasattr(config, "builder_optimization_level"), "optimization_level", target, since="8.6")
        config.builder_optimization_level = requested.optimization_level
    if requested.version_compatible:
        _need(hasattr(trt.BuilderFlag, "VERSION_COMPATIBLE"), "version_compatible", target, since="8.6")
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if requested.hardware_compatible:
        _need(hasattr(config, "hardware_compatibility_level"), "hardware_compatible", target, since="8.6")
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if requested.strip_weights:
        _need(hasattr(trt.BuilderFlag, "STRIP_PLAN"), "strip_weights", target, since="10.0")
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if requested.dla_core is not None:
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = requested.dla_core
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    if not requested.library_tactics and hasattr(trt.TacticSource, "CUBLAS"):
        libraries = (trt.TacticSource.CUBLAS, trt.TacticSource.CUBLAS_LT, trt.TacticSource.CUDNN)
        config.set_tactic_sources(config.get_tactic_sources() & ~sum(1 << int(source) for source in libraries))


def _set_compute_capabilities(config: Any, target: Target) -> None:
    trt = target.library.trt
    config.num_compute_capabilities = len(target.compute_capabilities)
    for i, name in enumerate(target.compute_capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), i)


def _need(there: bool, key: str, target: Target, *, since: str) -> None:
    if not there:
        what = f"TensorRT {target.library.trt.__version__} lacks {key}: {since} is the first with it"
        raise BackendError(what, fix=f"remove tensorrt.{key} from the recipe")


def _set_batches(builder: Any, network: Any, config: Any, target: Target) -> None:
    """Add an optimisation profile for each batch size, so that kernels are chosen for it; a DLA takes one size."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if target.options.dla_core is not None:
        for tensor in inputs:
            tensor.shape = (target.recipe.batch_sizes[0], *tuple(tensor.shape)[1:])
        return
    for size in sorted(set(target.recipe.batch_sizes)):
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            shape = (size, *tuple(tensor.shape)[1:])
            profile.set_shape(tensor.name, shape, shape, shape)
        if config.add_optimization_profile(profile) < 0:
            raise target.library.failed(f"{target.library.name} refuses batches of {size}")


def _monitor(progress: Callable[[float], None] | None, library: Library, received: Sequence[int]) -> Any:
    """Return a monitor that reports the fraction done, and ends the build when a signal was received.

    TensorRT may call it from several threads, and swallows exceptions. What it reports need not add up: a step of a
    phase may be over before the phases in it are.
    """
    trt = library.trt

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined]  # TensorRT has no types
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.error: BaseException | None = None
            self._lock = threading.Lock()
            self._phases: dict[str, tuple[str | None, int]] = {}  # name to the phase around it and its number of steps
            self._done: dict[str, int] = {}
            self._share = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases[phase_name] = (parent_phase, max(num_steps, 1))
                self._done[phase_name] = 0

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                self._done[phase_name] = step + 1
                share = min(self._fraction(phase_name), 1.0)
                if progress and share > self._share and not self.error:
                    self._share = share
                    try:
                        progress(share)
                    except BaseException as error:  # it ends the build, and is raised behind it
                        self.error = error
                return not (self.error or received)

        def _fraction(self, phase: str) -> float:
            share, seen = 0.0, set[str]()
            around: str | None = phase
            while around in self._phases and around not in seen:
                seen.add(around)
                share = (self._done[around] + share) / self._phases[around][1]
                around = self._phases[around][0]
            return share

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases.pop(phase_name, None)

    return Monitor()


@contextlib.contextmanager
def timing_cache(config: Any, target: Target) -> Iterator[None]:
    """Use the kernels measured by earlier builds, and afterwards merge those of this build into the file."""
    if not target.options.timing_cache:
        yield
        return
    path = timing_cache_path(target.library)
    cache = config.create_timing_cache(_read(path))
    if not cache or not config.set_timing_cache(cache, False):
        log.warning("%s is damaged, or from another TensorRT: starting a new one", path)
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    yield
    try:
        with locked(path, wait=True):
            others = config.create_timing_cache(_read(path))
            if others:
                cache.combine(others, False)
            atomic_write(path, bytes(cache.serialize()))
    except OSError as error:
        log.warning("%s cannot be written (%s): the next build measures again", path, error.strerror)


def timing_cache_path(library: Library) -> Path:
    """Return the cache file of this GPU and TensorRT, in `$XDG_CACHE_HOME/edgekd/tensorrt` (default `~/.cache`)."""
    gpu = device()
    name = f"{gpu.name}-sm{gpu.sm}-{library.trt.__version__}.timing".replace(" ", "-").replace("/", "-")
    return cache_folder("tensorrt") / name


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
