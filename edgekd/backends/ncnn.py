"""ncnn on the CPU: fp32, and 16 bits as fp16 or bf16, whichever the CPU has kernels for.

pnnx converts graphs when an engine is built; running one needs ncnn alone. Neither opens a connection.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

from edgekd.artifacts.manifest import Manifest
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import CpuBackend, ReadFile, backend_failure
from edgekd.errors import BackendError
from edgekd.files import atomic_write, temporary_folder

Shape: TypeAlias = tuple[int, ...]

CONVERSION_S = 600
"""Seconds after which a conversion is stopped; the longest measured took 2."""
_GROUPED = "ConvolutionDepthWise"
"""ncnn's layer for every convolution with groups."""
_WEIGHTED = {
    *("Convolution", _GROUPED, "Convolution1D", "ConvolutionDepthWise1D", "Deconvolution"),
    *("DeconvolutionDepthWise", "InnerProduct", "Gemm", "MatMul", "MultiHeadAttention", "SDPA"),
}
_SHAPE_HINTS = "-23330"
"""ncnn's key for the shapes of a layer's outputs, each as dims, w, h, c."""
_OTHER_NETWORK = "use another --backend, and please report this network"


class NcnnRunner:
    """A loaded net, which has no batch axis: the rows of a batch run one by one. Each run has its own extractor."""

    def __init__(self, net: Any, path: Path) -> None:
        self._net = net
        self._path = path
        self._inputs: list[str] = net.input_names()
        # output_names() is in no order, and lists blobs that nothing reads, too
        self._outputs = [f"out{k}" for k in range(sum(name.startswith("out") for name in net.output_names()))]
        self._input_shapes = [_shape_hint(net, name) for name in self._inputs]
        self._output_shapes = [_shape_hint(net, name) for name in self._outputs]
        self.row_shapes = self._input_shapes[0], self._output_shapes[0]

    def __call__(self, *xs: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
        found = [x.shape[1:] for x in xs]
        if found != self._input_shapes:  # ncnn would read beyond the end
            what = f"{self._path} takes rows of {self._input_shapes}, not {found}"
            raise BackendError(what, fix="give images of the size that the network was exported for")
        rows = [self._run_row(row) for row in zip(*xs)]
        return [np.stack(column) for column in zip(*rows)]

    def _run_row(self, xs: tuple[npt.NDArray[np.generic], ...]) -> list[npt.NDArray[np.generic]]:
        with self._net.create_extractor() as extractor:
            _set_inputs(extractor, dict(zip(self._inputs, xs)), self._path)
            outputs = [_extract(extractor, name, self._path).numpy() for name in self._outputs]
        if (found := [x.shape for x in outputs]) != self._output_shapes:
            what = f"{self._path}: ncnn gives {found}, not {self._output_shapes}"
            raise BackendError(what, fix="compile again")
        return outputs


class NcnnBackend(CpuBackend[NcnnRunner]):
    """ncnn's CPU kernels."""

    name = "ncnn"
    extra = "ncnn"
    packages = ("ncnn", "pnnx")
    suffix = ".param"
    supported_precisions = frozenset({"fp32", "fp16"})

    def version(self) -> str | None:
        try:
            return str(_library().__version__)
        except ImportError:
            return None

    def build(
        self, graph: onnx.ModelProto, path: Path, *, recipe: Recipe, progress: Callable[[float], None] | None = None
    ) -> None:
        """Write ncnn's own format: `path` (.param) with the layers, and the weights beside it (.bin).

        The weights of an fp16 engine are stored as fp16. The graph is run once, on noise.

        Raises:
            BackendError: pnnx is not installed or cannot convert the graph; a layer that ncnn lacks, or that this CPU
                has no correct 16-bit kernel for; outputs of other shapes, or not finite.
        """
        if _storage(recipe) == "bf16":
            _check_grouped_convolutions(graph)
        with temporary_folder("ncnn") as folder:
            param, weights = _converted(_with_batch_of_one(graph), folder, fp16=recipe.uses_fp16)
        if missing := [layer for layer in _layers(param) if _library().layer_to_index(layer.type) < 0]:
            raise _missing_layers(graph, missing)
        net = _net(param, weights, path, recipe=recipe, threads=1)
        inputs = {f"in{k}": _row_shape(value) for k, value in enumerate(graph.graph.input)}
        blobs = {name: mat.numpy() for name, mat in _run_on_noise(net, path, inputs).items()}
        _check_outputs(graph, [blobs[f"out{k}"] for k in range(len(graph.graph.output))], recipe)
        atomic_write(path, _with_shape_hints(param, {name: x.shape for name, x in blobs.items()}).encode())
        atomic_write(path.with_suffix(".bin"), weights)

    def suffixes(self, recipe: Recipe) -> tuple[str, ...]:
        return (self.suffix, ".bin")

    def load(self, path: Path, *, recipe: Recipe, threads: int, read: ReadFile = Path.read_bytes) -> NcnnRunner:
        """Load a net from memory.

        Raises:
            BackendError: ncnn refuses it, or the recipe's precision on this CPU.
        """
        return NcnnRunner(_read(path, read, recipe=recipe, threads=threads), path)

    def precisions(self, path: Path, *, recipe: Recipe) -> Counter[str]:
        """Count the types in which the layers that multiply by weights store their outputs."""
        net = _read(path, Path.read_bytes, recipe=recipe, threads=1)
        stored = _run_on_noise(net, path, {name: _shape_hint(net, name) for name in net.input_names()}, as_stored=True)
        names, blobs = {32: "fp32", 16: _sixteen_bit_float()}, net.blobs()
        layers = [layer for layer in net.layers() if layer.type in _WEIGHTED]
        return Counter([names[stored[blobs[layer.tops[0]].name].elembits()] for layer in layers])

    def incompatibility(self, manifest: Manifest) -> str:
        if reason := super().incompatibility(manifest):
            return reason
        here = _sixteen_bit_float()
        if manifest.recipe.uses_fp16 and here not in manifest.precision:  # its accuracy was checked in the other one
            return f"runs in {', '.join(manifest.precision)}; for 16 bits, ncnn on this CPU has {here or 'no kernels'}"
        return ""


class _Layer(NamedTuple):
    type: str
    name: str
    tops: list[str]


@functools.cache
def _library() -> Any:
    """Import ncnn so that its threads sleep while they wait: spinning beside other processes took 25 times as long.

    OpenMP reads the variable once, when it is loaded; ncnn has a copy of its own.
    """
    user_set = "OMP_WAIT_POLICY" in os.environ
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import ncnn
    finally:
        if not user_set:
            os.environ.pop("OMP_WAIT_POLICY", None)
    return ncnn


def _storage(recipe: Recipe) -> str:
    """Return the type in which a recipe's tensors are stored on this CPU: fp32, fp16 or bf16.

    Raises:
        BackendError: The recipe requests 16 bits, and there are no kernels for them.
    """
    storage = _sixteen_bit_float() if recipe.uses_fp16 else "fp32"
    if not storage:
        raise BackendError("this ncnn has no 16-bit kernels for this CPU", fix="use --recipe fp32")
    return storage


def _sixteen_bit_float() -> str:
    """Return the 16-bit float of this CPU's kernels: fp16 from ARMv8.2 on, else bf16; empty if there are none."""
    if _library().cpu_support_arm_asimdhp():
        return "fp16"
    return "bf16" if _library().create_layer("Convolution").support_bf16_storage else ""


def _check_grouped_convolutions(graph: onnx.ModelProto) -> None:
    """Refuse grouped convolutions that are wrong in bf16.

    On x86 (1.0.20261020) ncnn has no bf16 for convolutions with groups. It makes them of plain ones, which do have it
    and read beyond the end of their fp32 inputs. Most depthwise ones have kernels of their own.

    Raises:
        BackendError: There is such a convolution; it is named.
    """
    if _library().create_layer(_GROUPED).support_bf16_storage:
        return
    shapes = {i.name: tuple(i.dims) for i in graph.graph.initializer}
    for node in graph.graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        groups = attributes.get("group", 1)
        if node.op_type != "Conv" or groups == 1:
            continue
        kernel = shapes.get(node.input[1], ())
        strides, dilations = (tuple(attributes.get(name, (1, 1))) for name in ("strides", "dilations"))
        is_3x3 = kernel[2:] == (3, 3) and dilations == (1, 1) and strides in ((1, 1), (2, 2))
        if kernel[:2] != (groups, 1) or not (groups % 4 == 0 or is_3x3):
            what = f"ncnn's 16-bit kernels are wrong on this CPU for grouped convolutions such as {node.name}"
            raise BackendError(what, fix="use --recipe fp32, or another --backend")


def _with_batch_of_one(graph: onnx.ModelProto) -> onnx.ModelProto:
    fixed = onnx.ModelProto()
    fixed.CopyFrom(graph)
    for value in (*fixed.graph.input, *fixed.graph.output):
        for batch in value.type.tensor_type.shape.dim[:1]:
            batch.dim_value = 1
    return fixed


def _row_shape(value: onnx.ValueInfoProto) -> Shape:
    dims = value.type.tensor_type.shape.dim[1:]
    return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)


def _converted(graph: onnx.ModelProto, folder: Path, *, fp16: bool) -> tuple[str, bytes]:
    """Convert a graph by pnnx, which leaves many files in `folder`.

    Returns:
        The layers (.param) and the weights (.bin).

    Raises:
        BackendError: pnnx is not installed, fails, crashes, or takes too long.
    """
    spec = importlib.util.find_spec("pnnx")  # importing it would import torch, which its program does not need
    if spec is None or spec.origin is None:
        raise BackendError("pnnx, which converts graphs for ncnn, is not installed", fix="pip install 'edgekd[ncnn]'")
    program = Path(spec.origin).with_name("pnnx.exe" if os.name == "nt" else "pnnx")
    onnx.save(graph, str(folder / "graph.onnx"))
    shapes = ",".join(f"[{','.join(map(str, (1, *_row_shape(value))))}]f32" for value in graph.graph.input)
    command = [str(program), "graph.onnx", f"inputshape={shapes}", f"fp16={int(fp16)}"]
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=CONVERSION_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise backend_failure("pnnx cannot convert the network", error) from error
    param, weights = folder / "graph.ncnn.param", folder / "graph.ncnn.bin"
    if done.returncode or not (param.is_file() and weights.is_file()):
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        what = f"pnnx cannot convert the network (exit status {done.returncode}): {''.join(last)}"
        raise BackendError(what, fix=_OTHER_NETWORK)
    return param.read_text(encoding="ascii"), weights.read_bytes()


def _layers(param: str) -> Iterator[_Layer]:
    """Parse a .param: two lines of header, then a layer a line as type, name, numbers of inputs and outputs, …"""
    for line in param.splitlines()[2:]:
        kind, name, bottoms, tops, *blobs = line.split()
        yield _Layer(kind, name, blobs[int(bottoms) : int(bottoms) + int(tops)])


def _missing_layers(graph: onnx.ModelProto, missing: list[_Layer]) -> BackendError:
    """Name the layers that ncnn lacks by their ONNX nodes if only one is of that type, else by pnnx's names.

    pnnx copies an operator that it does not know into the .param, and succeeds.
    """
    named = []
    for layer in missing:
        op = layer.type.rpartition(".")[2].lower()
        nodes = [node.name for node in graph.graph.node if node.op_type.lower() == op and node.name]
        named.append(f"{layer.type} ({nodes[0] if len(nodes) == 1 else layer.name})")
    what = f"ncnn has no layer for {', '.join(named[:3])}{', …' if len(named) > 3 else ''}"
    return BackendError(what, fix="use another --backend, or a network without it")


def _check_outputs(graph: onnx.ModelProto, outputs: list[npt.NDArray[np.generic]], recipe: Recipe) -> None:
    """Check outputs of one row against the graph.

    Raises:
        BackendError: Another shape than the graph declares, or values that are not finite.
    """
    for value, output in zip(graph.graph.output, outputs):
        declared = _row_shape(value)
        if -1 not in declared and declared != output.shape:
            what = f"ncnn gives {value.name} the shape {output.shape}, the network {declared}"
            raise BackendError(what, fix=_OTHER_NETWORK)
        if not np.isfinite(output).all():
            what = f"ncnn in {recipe.name} gives values of {value.name} that are not finite"
            raise BackendError(what, fix="use --recipe fp32, or another --backend")


def _with_shape_hints(param: str, shapes: dict[str, Shape]) -> str:
    """Add the shapes of inputs and outputs to a .param; pnnx omits them, and `_shape_hint` reads them."""
    head, lines = param.splitlines()[:2], param.splitlines()[2:]
    for i, layer in enumerate(_layers(param)):
        if layer.type == "Input" or any(top.startswith("out") for top in layer.tops):
            values = [n for top in layer.tops for n in _encoded(shapes[top])]
            lines[i] += f" {_SHAPE_HINTS}={len(values)},{','.join(map(str, values))}"
    return "\n".join([*head, *lines, ""])


def _encoded(shape: Shape) -> tuple[int, ...]:
    if not 1 <= len(shape) <= 3:
        raise BackendError(f"ncnn has no tensors of the shape {shape}", fix="use another --backend")
    return (len(shape), *reversed(shape), *[1] * (3 - len(shape)))


def _shape_hint(net: Any, name: str) -> Shape:
    """Return the shape of a row of an input or output."""
    shape = next(blob.shape for blob in net.blobs() if blob.name == name)
    return (shape.c, shape.h, shape.w)[3 - shape.dims :]


def _read(path: Path, read: ReadFile, *, recipe: Recipe, threads: int) -> Any:
    try:
        param = read(path).decode("ascii")
    except UnicodeDecodeError as error:
        raise backend_failure(f"ncnn cannot load {path}", error) from error
    return _net(param, read(path.with_suffix(".bin")), path, recipe=recipe, threads=threads)


def _net(param: str, weights: bytes, path: Path, *, recipe: Recipe, threads: int) -> Any:
    """Make a net from memory.

    Raises:
        BackendError: ncnn refuses the layers, or does not need exactly these weights.
    """
    net, storage = _library().Net(), _storage(recipe)
    options = net.opt
    options.num_threads = threads
    options.use_vulkan_compute = False
    options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = storage == "fp16"
    options.use_bf16_packed = options.use_bf16_storage = storage == "bf16"
    reader = _reader(weights)
    if net.load_param_mem(param) or net.load_model(reader) or reader.at != len(weights):
        raise BackendError(f"ncnn cannot load {path}", fix="compile again")
    return net


def _reader(data: bytes) -> Any:
    """Return a reader of weights that stops at their end; ncnn's `Net.load_model_mem` does not."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.argtypes, pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p

    class Reader(_library().DataReader):  # type: ignore[misc]
        at = 0

        def read(self, target: object, size: int) -> int:
            part = data[self.at : self.at + size]
            if len(part) < size:
                return 0
            ctypes.memmove(pointer(target, None), part, size)
            self.at += size
            return size

    return Reader()


def _run_on_noise(net: Any, path: Path, inputs: dict[str, Shape], *, as_stored: bool = False) -> dict[str, Any]:
    """Return every blob of a run on noise; `as_stored`: in the type and packing that it has in memory."""
    with net.create_extractor() as extractor:
        extractor.set_light_mode(False)  # which frees blobs once they are read
        rng = np.random.default_rng(0)
        _set_inputs(extractor, {name: rng.normal(size=shape) for name, shape in inputs.items()}, path)
        names = [blob.name for blob in net.blobs()]
        return {name: _extract(extractor, name, path, as_stored=as_stored) for name in names}


def _set_inputs(extractor: Any, inputs: dict[str, npt.NDArray[Any]], path: Path) -> None:
    """Set inputs to copies: a Mat of an array neither keeps it nor knows its strides, and layers may write to it."""
    mat = _library().Mat
    for name, x in inputs.items():
        contiguous = np.ascontiguousarray(x, np.float32)
        if extractor.input(name, mat(contiguous).clone()):
            raise BackendError(f"{path}: ncnn has no input {name}", fix="compile again")


def _extract(extractor: Any, name: str, path: Path, *, as_stored: bool = False) -> Any:
    status, mat = extractor.extract(name, int(as_stored))
    if status or mat.empty():
        raise BackendError(f"{path}: ncnn cannot compute {name} (status {status})", fix=_OTHER_NETWORK)
    return mat
