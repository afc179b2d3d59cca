"""Measure what an input of bytes, standardised inside the graph, costs and saves beside float32 input on CPUs.

    python benchmarks/uint8_input.py student.onnx --out benchmarks/results/uint8-input.md

The reference is what edgekd does: `Preprocess.normalised` in NumPy, then the graph of all exits. It takes turns with
the other forms on the same pixels, in processor time, so the ratios hold on a busy machine; decoding and resizing are
the same for all and left out. The forms:

- `cast`: uint8 (N, 3, H, W), Cast, then Mul and Add for each channel, then the graph as it is.
- `folded`: uint8, Cast, Pad with the colour that becomes 0, then the first convolution, whose weights hold the scale
  and whose bias holds the mean. Not for int8 graphs, whose first convolution reads quantised floats.

The bytes are brought from (N, H, W, 3) to (N, 3, H, W) by a copy in NumPy, which is timed as well.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekd.artifacts.metadata import ModelMetadata, read_onnx
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import find_backend
from edgekd.data.preprocess import Preprocess
from edgekd.files import temporary_folder
from edgekd.host import cpu_model
from edgekd.quantization import quantize


def cast_form(model: onnx.ModelProto, preprocess: Preprocess) -> onnx.ModelProto:
    """Return the graph with an input of bytes that is scaled and shifted, channel by channel, before its first node."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    graph = found.graph
    std = np.asarray(preprocess.std, np.float32).reshape(1, 3, 1, 1)
    factor = np.float32(preprocess.scale) / std
    shift = -np.asarray(preprocess.mean, np.float32).reshape(1, 3, 1, 1) / std
    _bytes_in(graph)
    graph.initializer.extend(numpy_helper.from_array(x, n) for x, n in ((factor, "factor"), (shift, "shift")))
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "factor"], ["scaled"]),
        helper.make_node("Add", ["scaled", "shift"], ["standardised"]),
    ]
    _put_first(graph, nodes, "standardised")
    return found


def folded_form(model: onnx.ModelProto, preprocess: Preprocess) -> onnx.ModelProto | None:
    """Return the graph with scale and mean in its first convolution; None if it has no such convolution."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    graph = found.graph
    readers = [node for node in graph.node if "images" in node.input]
    weights = {i.name: i for i in graph.initializer}
    if len(readers) != 1 or readers[0].op_type != "Conv" or readers[0].input[1] not in weights:
        return None
    conv = readers[0]
    attributes = {a.name: helper.get_attribute_value(a) for a in conv.attribute}
    pads = list(attributes.get("pads", [0, 0, 0, 0]))
    w = numpy_helper.to_array(weights[conv.input[1]])
    if attributes.get("group", 1) != 1 or w.shape[1] != 3:
        return None
    mean, std = (np.asarray(x, np.float64) for x in (preprocess.mean, preprocess.std))
    factor = (preprocess.scale / std).reshape(1, 3, 1, 1)
    bias = numpy_helper.to_array(weights[conv.input[2]]) if len(conv.input) > 2 else np.zeros(len(w), np.float32)
    zero = mean / preprocess.scale  # the level that becomes 0, a fraction
    moved = bias - (w * factor * zero.reshape(1, 3, 1, 1)).sum(axis=(1, 2, 3))
    for name, value in (("w_bytes", w * factor), ("b_bytes", moved)):
        graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    # Pad takes one value; centring by it first would be `cast`. So each channel is padded by its own.
    _bytes_in(graph)
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Split", ["floats"], ["plane_0", "plane_1", "plane_2"], axis=1),
    ]
    graph.initializer.append(numpy_helper.from_array(np.array([0, 0, *pads[:2], 0, 0, *pads[2:]], np.int64), "margins"))
    for k, level in enumerate(zero):
        graph.initializer.append(numpy_helper.from_array(np.float32(level), f"level_{k}"))
        nodes.append(helper.make_node("Pad", [f"plane_{k}", "margins", f"level_{k}"], [f"padded_{k}"]))
    nodes.append(helper.make_node("Concat", ["padded_0", "padded_1", "padded_2"], ["padded"], axis=1))
    kept = [a for a in conv.attribute if a.name not in ("pads", "auto_pad")]
    del conv.attribute[:]
    conv.attribute.extend([*kept, helper.make_attribute("pads", [0, 0, 0, 0])])
    conv.input[:] = ["images", "w_bytes", "b_bytes"]
    _put_first(graph, nodes, "padded")
    return found


def _bytes_in(graph: onnx.GraphProto) -> None:
    graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8


def _put_first(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], last: str) -> None:
    for node in graph.node:
        node.input[:] = [last if name == "images" else name for name in node.input]
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])


def forms(
    model: onnx.ModelProto, metadata: ModelMetadata, calibration: np.ndarray, precision: str, backend: Any
) -> dict[str, onnx.ModelProto]:
    """Return the graphs of each form; int8 graphs are quantised first, as float graphs."""
    preprocess = metadata.preprocess
    if precision == "int8":
        model = quantize(model, metadata, calibration, target="cpu", heads=True, reduce_range=backend.reduces_range())
    found = {"float32": model, "cast": cast_form(model, preprocess)}
    if folded := folded_form(model, preprocess):
        found["folded"] = folded
    return found


def measure(
    runners: dict[str, Callable[[np.ndarray], list[np.ndarray]]], batches: list[np.ndarray], *, seconds: float
) -> dict[str, list[float]]:
    """Return the milliseconds of processor time of every form for each batch, in turns whose order alternates."""
    samples: dict[str, list[float]] = {name: [] for name in runners}
    for run in runners.values():
        run(batches[0])
    end, turn = time.perf_counter() + seconds, 0
    while turn < 10 or time.perf_counter() < end:
        pixels = batches[turn % len(batches)]
        for name in list(runners)[:: 1 if turn % 2 else -1]:
            start = time.process_time()
            runners[name](pixels)
            samples[name].append(1e3 * (time.process_time() - start))
        turn += 1
    return samples


def main() -> None:
    """Measure every backend, precision and batch size, and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    args = parser.parse_args()
    lines = [
        f"# Bytes in: uint8 input beside float32, {cpu_model()}, one thread",
        "",
        "Median milliseconds (processor time) of standardising and inference, and the median ratio to float32",
        "input, in turns on the same pixels. Largest difference of logits from float32 input in brackets.",
        "",
        "| network | side | backend | precision | batch | standardise (NumPy) | float32, whole | cast | folded |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for path in args.students:
        model, metadata = read_onnx(path)
        side, rng = metadata.preprocess.image_size, np.random.default_rng(0)
        pixels = rng.integers(0, 256, (64, side, side, 3), np.uint8)
        calibration = metadata.preprocess.normalised(pixels[:16])
        for name in ("onnxruntime", "openvino"):
            for precision in ("fp32", "int8"):
                lines += _rows(path, model, metadata, pixels, calibration, name, precision, args)
                print(*lines[-len(args.batch_sizes) :], sep="\n", flush=True)
    if args.out:
        args.out.write_text("\n".join([*lines, ""]))


def _rows(
    path: Path,
    model: onnx.ModelProto,
    metadata: ModelMetadata,
    pixels: np.ndarray,
    calibration: np.ndarray,
    name: str,
    precision: str,
    args: argparse.Namespace,
) -> list[str]:
    backend, preprocess = find_backend(name), metadata.preprocess
    recipe, found = Recipe(precision), []  # type: ignore[arg-type]
    with temporary_folder("uint8") as folder:
        graphs = {}
        for form, graph in forms(model, metadata, calibration, precision, backend).items():
            part = folder / f"{form}{backend.suffix}"
            backend.build(graph, part, recipe=recipe)
            graphs[form] = backend.load(part, recipe=recipe, threads=1)
        runners: dict[str, Any] = {"float32": lambda x, run=graphs["float32"]: run(preprocess.normalised(x))}
        for form in [f for f in graphs if f != "float32"]:
            runners[form] = lambda x, run=graphs[form]: run(np.ascontiguousarray(np.moveaxis(x, -1, -3)))
        reference = np.stack(runners["float32"](pixels))
        off = {form: float(np.abs(np.stack(run(pixels)) - reference).max()) for form, run in runners.items()}
        for size in args.batch_sizes:
            batches = [pixels[i : i + size] for i in range(0, 64, size)]
            alone = measure({"n": lambda x: [preprocess.normalised(x)]}, batches, seconds=args.seconds / 8)["n"]
            samples = measure(runners, batches, seconds=args.seconds)
            cells = []
            for form in ("cast", "folded"):
                if form in samples:
                    ratio = statistics.median(a / b for a, b in zip(samples[form], samples["float32"]))
                    cells.append(f"{ratio:.3f} ({off[form]:.1e})")
                else:
                    cells.append("–")
            whole, standardise = (statistics.median(x) for x in (samples["float32"], alone))
            found.append(
                f"| {metadata.network} | {preprocess.image_size} | {name} | {precision} | {size} | "
                f"{standardise:.3f} | {whole:.2f} | {' | '.join(cells)} |"
            )
    return found


if __name__ == "__main__":
    main()
