"""The layers of an engine and the precision of each, from the engine inspector or from the builder's log."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_WEIGHTED = r"conv|correlation|gemm|matrixmultiply|matmul|fullyconnected|dla"
"""Types of layers that multiply by weights, in the various spellings of TensorRT's compilers."""
_NODE = r"(?:^|[/_.])(?:Conv|ConvTranspose|Gemm|MatMul)(?:_\d+)?$"
"""Names that exporters give to ONNX nodes that multiply by weights."""
_TYPES = {"int8": "int8|i8", "bf16": "bf16|bfloat", "fp8": "fp8|e4m3", "fp16": "fp16|half|f16", "fp32": "float|fp?32"}
LISTING = "Layers:"
"""Start of the builder's message that lists the layers of the engine (severity VERBOSE)."""
_ROW = re.compile(
    r"Name: (?P<Name>.*), LayerType: (?P<LayerType>\w+), Inputs: \[(?P<Inputs>.*?)\], "
    r"(?:Constants: \[(?P<Constants>.*)\], )?Outputs: \[(?P<Outputs>.*)\], TacticName: (?P<TacticName>.*?), "
    r"StreamId: \d+.*?(?:, Metadata: (?P<Metadata>.*))?"
)
_TENSOR = re.compile(
    r"\{ Name: (?P<Name>.*?), Dimensions: (?P<Dimensions>\[[^\]]*\]), .*?Datatype: (?P<Datatype>\S+), "
    r"Format: (?P<Format>.*?) \}"
)


@dataclass(frozen=True)
class Tensor:
    """A tensor that a layer reads or writes.

    Attributes:
        name: Name of the tensor.
        shape: Its dimensions.
        precision: fp32, fp16, bf16, fp8 or int8, or else TensorRT's own word.
        format: Memory layout, in TensorRT's words.
    """

    name: str
    shape: tuple[int, ...]
    precision: str
    format: str


@dataclass(frozen=True)
class Layer:
    """A layer of an engine: one kernel, or one that the compiler generates for several operators.

    Attributes:
        name: Name of the layer.
        kind: Its type, such as CaskConvolution, correlation, kgen or Reformat.
        parameters: What it computes, such as Convolution; empty if not reported.
        inputs, constants, outputs: Its tensors.
        weights: Precision of its weights, where reported.
        tactic: Name of the kernel.
        nodes: Names of the ONNX nodes that it computes or takes part in, where reported.
    """

    name: str
    kind: str
    parameters: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    weights: str | None
    tactic: str
    nodes: tuple[str, ...]

    @property
    def multiplies(self) -> bool:
        """True if its type says that it multiplies by weights."""
        return re.search(_WEIGHTED, f"{self.kind} {self.parameters}", re.IGNORECASE) is not None

    @property
    def generated_product(self) -> str | None:
        """The type of the weights (of two dimensions or more) that a layer of generated code reads; else None."""
        weights = [] if self.multiplies else [c for c in self.constants if sum(n > 1 for n in c.shape) > 1]
        return weights[0].precision if weights else None

    @property
    def precision(self) -> str | None:
        """The type of its weights, else of its first input, else as in its kernel's name; None if nothing tells."""
        told = [tensor.precision for tensor in self.inputs if tensor.precision in _TYPES]
        return self.weights or self.generated_product or next(iter(told), None) or _precision(self.tactic)


def from_inspector(report: str) -> list[Layer]:
    """Read the JSON of the engine inspector; below TensorRT 10, it lists the layers of all profiles.

    Raises:
        ValueError: It is no list of layers.
    """
    try:  # names are joined by control characters, which strict JSON forbids
        rows = json.loads(report, strict=False)["Layers"]
        return [_layer(row) for row in rows if isinstance(row, dict)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no layers: {error}") from error


def from_log(message: str) -> list[Layer]:
    """Read the layers of all profiles from what the builder logs where the engine cannot be opened.

    Args:
        message: A message that begins with `LISTING`.
    """
    found = []
    for line in message.splitlines():
        if match := _ROW.fullmatch(line.strip()):
            row: dict[str, Any] = match.groupdict()
            row |= {key: _tensors(row[key] or "") for key in ("Inputs", "Constants", "Outputs")}
            found.append(_layer(row))
    return found


def _tensors(text: str) -> list[dict[str, Any]]:
    return [{**match.groupdict(), "Dimensions": json.loads(match["Dimensions"])} for match in _TENSOR.finditer(text)]


def _layer(row: Mapping[str, Any]) -> Layer:
    weights = row.get("Weights")
    inputs, constants, outputs = (tuple(map(_tensor, row.get(key) or ())) for key in ("Inputs", "Constants", "Outputs"))
    return Layer(
        str(row.get("Name", "")),
        str(row.get("LayerType", "")),
        str(row.get("ParameterType") or ""),
        inputs,
        constants,
        outputs,
        _precision(str(weights.get("Type"))) if isinstance(weights, dict) else None,
        str(row.get("TacticName") or ""),
        tuple(re.findall(r"\[ONNX Layer: (.*?)\](?=\[|\s|\x1e|\x1f|$)", str(row.get("Metadata") or ""))),
    )


def _tensor(row: Mapping[str, Any]) -> Tensor:
    kind, layout = str(row.get("Datatype") or ""), str(row.get("Format") or row.get("Format/Datatype") or "")
    shape = row.get("Dimensions")
    return Tensor(
        str(row.get("Name", "")),
        tuple(shape) if isinstance(shape, list) else (),
        _precision(kind or layout) or kind or layout,
        layout,
    )


def _precision(text: str) -> str | None:
    return next((name for name, pattern in _TYPES.items() if re.search(pattern, text, re.IGNORECASE)), None)


def precisions(layers: Sequence[Layer]) -> list[str | None]:
    """Return the precision of each multiplication by weights; None for one that cannot be told.

    These are the layers whose type says so and, in layers that the compiler generates with weights of two dimensions or
    more, the ONNX nodes which no other layer names and which exporters call a convolution or matrix product.
    """
    found = [layer.precision for layer in layers if layer.multiplies]
    told = {node for layer in layers if layer.multiplies for node in layer.nodes}
    for layer in layers:
        for node in layer.nodes if layer.generated_product else ():
            if node not in told and re.search(_NODE, node):
                told.add(node)
                found.append(layer.generated_product)
    return found


def precision_of_nodes(layers: Sequence[Layer], nodes: Iterable[str]) -> dict[str, str | None]:
    """Return the precision in which the layer runs that multiplies for each of these ONNX nodes.

    Args:
        layers: Layers whose `nodes` are known.
        nodes: Names of ONNX nodes; those that no layer names are left out.
    """
    wanted, found = set(nodes), dict[str, str | None]()
    for layer in sorted(layers, key=lambda layer: not layer.multiplies):  # these decide; other layers add a bias
        for node in layer.nodes:
            if node in wanted:
                found.setdefault(node, layer.precision)
    return found
