"""Rewriting of ONNX graphs without a change of what they compute: constants, batch size, precision, names."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgekd.errors import ConfigError

log = logging.getLogger(__name__)
Values = npt.NDArray[Any]
_RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
_KEPT = {"QuantizeLinear", "DequantizeLinear", "If", "Loop", "Scan"} | _RANDOM
"""Operators that are not folded, even if all of their inputs are constant."""
SMALL = 1024
"""Largest constant, in elements, that may tell a shape."""


def graphs_of(node: NodeProto) -> Iterator[GraphProto]:
    """Yield the subgraphs of a node."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Yield the nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for inner in graphs_of(node):
            yield from all_nodes(inner)


def reads(node: NodeProto) -> set[str]:
    """Return the tensors that a node reads, those of its subgraphs included."""
    names = {name for name in node.input if name}
    for inner in graphs_of(node):
        own = {i.name for i in inner.initializer} | {name for n in inner.node for name in n.output}
        names |= {name for n in inner.node for name in reads(n)} - own
        names |= {o.name for o in inner.output} - own
    return names


def rename(graph: GraphProto, names: dict[str, str]) -> None:
    """Rename tensors everywhere in a graph and its subgraphs."""
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for inner in graphs_of(node):
            rename(inner, names)


def free_name(graph: GraphProto, name: str) -> None:
    """Rename the tensor of this name, if there is one, so that another can have it."""
    used = {n for node in all_nodes(graph) for n in (*node.input, *node.output)}
    used |= {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    if name in used:
        rename(graph, {name: next(f"{name}_{i}" for i in range(1, len(used) + 2) if f"{name}_{i}" not in used)})


def drop_unused(graph: GraphProto) -> None:
    """Remove nodes and initializers that no output needs."""
    needed, kept = {o.name for o in graph.output}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed |= reads(node)
            kept.append(node)
    replace(graph.node, kept[::-1])
    replace(graph.initializer, [i for i in graph.initializer if i.name in needed])


def replace(field: Any, values: Sequence[Any]) -> None:
    """Replace the contents of a repeated field; the values may be its own."""
    copies = list(values)
    del field[:]
    field.extend(copies)


def session(model: ModelProto, *, outputs: Sequence[str] = (), optimise: bool = True) -> Any:
    """Open a network in ONNX Runtime on the CPU.

    Args:
        model: The network.
        outputs: Inner tensors to return after its own outputs.
        optimise: Let ONNX Runtime fuse and reorder operators.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its exceptions contain the message
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if outputs:
        own = {o.name for o in model.graph.output}
        extended = ModelProto()
        extended.CopyFrom(model)
        extended.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in own)
        model = extended
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
    )


def constants_to_initializers(graph: GraphProto) -> None:
    """Move the values of Constant nodes to the initializers, and remove Identity and Dropout."""
    kept = []
    outputs = {o.name for o in graph.output}
    for node in list(graph.node):
        if node.op_type == "Constant" and (value := _constant(node)) is not None:
            graph.initializer.append(value)
        elif node.op_type in ("Identity", "Dropout") and len([n for n in node.output if n]) == 1:
            if node.output[0] in outputs or any(reads_inside(n, node.output[0]) for n in graph.node):
                kept.append(node)
                continue
            for reader in (*graph.node, *kept):
                reader.input[:] = [node.input[0] if name == node.output[0] else name for name in reader.input]
        else:
            kept.append(node)
    replace(graph.node, kept)


def reads_inside(node: NodeProto, name: str) -> bool:
    """Return True if a subgraph of the node reads the tensor."""
    return any(True for _ in graphs_of(node)) and name in reads(node) - set(node.input)


def _constant(node: NodeProto) -> TensorProto | None:
    (attribute,) = node.attribute
    name = node.output[0]
    if attribute.name == "value":
        tensor = TensorProto()
        tensor.CopyFrom(attribute.t)
        tensor.name = name
        return tensor
    value = helper.get_attribute_value(attribute)
    kind = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    return numpy_helper.from_array(np.asarray(value, kind[attribute.name]), name) if attribute.name in kind else None


def fold_constants(model: ModelProto, images: Sequence[Values]) -> None:
    """Replace whatever does not depend on the images' values by constants, and conditions by the branch that is taken.

    What depends on the number of images alone stays; a Reshape by such a shape gets -1 in the place of the batch.

    Args:
        model: The network, changed in place; its input has a fixed image size.
        images: Inputs of different batch sizes.

    Raises:
        Exception: ONNX Runtime cannot run the network on these images.
    """
    graph = model.graph
    for _ in range(20):  # conditions may be nested
        constants_to_initializers(graph)
        names = _without_data(graph)
        if names:
            found = [_run(model, names, x) for x in images]
            for name in names:
                values = [f[name] for f in found]
                if all(np.array_equal(v, values[0]) and v.dtype == values[0].dtype for v in values):
                    _set_constant(graph, name, values[0])
                else:
                    _free_reshapes(graph, name, values)
        inlined = _inline_conditions(graph)
        drop_unused(graph)
        if not inlined:
            return


def _run(model: ModelProto, names: list[str], images: Values) -> dict[str, Values]:
    """Compute inner tensors, in the order of the graph and no further than needed."""
    shortened = ModelProto()
    shortened.CopyFrom(model)
    replace(shortened.graph.output, [onnx.ValueInfoProto(name=name) for name in names])
    drop_unused(shortened.graph)
    runner = session(shortened, optimise=False)
    feed = {i.name: images for i in runner.get_inputs()}
    return dict(zip(names, runner.run(names, feed)))


def _without_data(graph: GraphProto) -> list[str]:
    """Return the tensors that depend on shapes and constants alone and that other nodes, or conditions, read."""
    fixed = {i.name for i in graph.initializer}
    made: dict[str, bool] = {}
    for node in graph.node:
        inner = any(True for _ in graphs_of(node))
        free = node.op_type in ("Shape", "Size") or all(name in fixed for name in node.input if name)
        if free and node.op_type not in _KEPT and not inner:
            fixed |= set(node.output)
            made.update(dict.fromkeys(filter(None, node.output), True))
    read = {name for node in graph.node if not set(node.output) & made.keys() for name in reads(node)}
    return [name for name in made if name in read]


def _set_constant(graph: GraphProto, name: str, value: Values) -> None:
    for node in graph.node:
        if name in node.output:
            node.output[:] = ["" if o == name else o for o in node.output]
            if not any(node.output):
                graph.node.remove(node)
            break
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name))


def _free_reshapes(graph: GraphProto, name: str, values: list[Values]) -> None:
    """Give Reshape nodes whose shape depends on the batch size at one place a constant shape with -1 there."""
    if values[0].ndim != 1 or values[0].dtype != np.int64 or len({v.shape for v in values}) != 1:
        return
    differing = np.flatnonzero((np.stack(values) != values[0]).any(axis=0))
    if len(differing) != 1:
        return
    at, shape = int(differing[0]), values[0].copy()
    if -1 not in shape:
        shape[at] = -1
    elif at == 0:
        shape[at] = 0  # copies the input's first dimension, the batch
    else:
        return
    for node in graph.node:
        if node.op_type == "Reshape" and node.input[1] == name and not _attribute(node, "allowzero", 0):
            node.input[1] = add_constant(graph, f"{name}_any_batch", shape)


def add_constant(graph: GraphProto, name: str, value: Values) -> str:
    """Add an initializer, unless the graph has the name already, and return the name."""
    if name not in {i.name for i in graph.initializer}:
        graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _inline_conditions(graph: GraphProto) -> bool:
    """Replace each If with a constant condition by its branch; return True if there was one."""
    constants = {i.name: i for i in graph.initializer}
    nodes, found = [], False
    for node in graph.node:
        if node.op_type != "If" or node.input[0] not in constants:
            nodes.append(node)
            continue
        found = True
        taken = bool(numpy_helper.to_array(constants[node.input[0]]).item())
        branch = _attribute(node, "then_branch" if taken else "else_branch", None)
        graph.initializer.extend(branch.initializer)
        nodes += branch.node
        nodes += [helper.make_node("Identity", [o.name], [name]) for o, name in zip(branch.output, node.output) if name]
    replace(graph.node, nodes)
    return found


def free_batch(model: ModelProto, batch: int) -> list[str]:
    """Rewrite Reshape nodes whose constant shape holds the batch size, and widen constants joined with images.

    The batch is followed through the graph by shape inference with two batch sizes. In memory it lies after the product
    of the dimensions before it, which the target shape must split at the same place; where two places do, the last
    dimension, that of features, is left alone.

    Args:
        model: The network, changed in place; its input has a fixed image size.
        batch: The batch size that it was exported for.

    Returns:
        Names of the rewritten nodes.
    """
    rewritten: list[str] = []
    for _ in range(len(model.graph.node)):
        small, large = _shapes(model, batch), _shapes(model, 7 * batch)
        constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer if np.prod(i.dims) <= SMALL}
        changed = [
            node.name or f"{node.op_type} of {node.output[0]}"
            for node in list(model.graph.node)
            if _rewrite_reshape(model.graph, node, constants, small, large, batch)
            or _rewrite_concat(model.graph, node, small, large)
        ]
        if not changed:
            break
        rewritten += changed
    return rewritten


Shapes = dict[str, tuple[int, ...]]


def _shapes(model: ModelProto, batch: int) -> Shapes:
    """Infer the shapes that are known completely, without the values of large weights."""
    skeleton = ModelProto()
    skeleton.CopyFrom(model)
    graph = skeleton.graph
    del graph.value_info[:]
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    for output in graph.output:
        output.type.tensor_type.ClearField("shape")
    large = [i for i in graph.initializer if math.prod(i.dims) > SMALL]
    replace(graph.initializer, [i for i in graph.initializer if math.prod(i.dims) <= SMALL])
    graph.input.extend(helper.make_tensor_value_info(i.name, i.data_type, list(i.dims)) for i in large)
    inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    shapes = {i.name: tuple(i.dims) for i in model.graph.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            shapes[value.name] = tuple(d.dim_value for d in tensor.shape.dim)
    return shapes


def _rewrite_reshape(
    graph: GraphProto, node: NodeProto, constants: dict[str, Values], small: Shapes, large: Shapes, batch: int
) -> bool:
    if node.op_type != "Reshape" or node.input[1] not in constants:
        return False
    before, more = small.get(node.input[0]), large.get(node.input[0])
    target = [int(t) for t in constants[node.input[1]]]
    if before is None or more is None or before == more or target.count(-1) or 0 in target:
        return False
    if math.prod(target) != math.prod(before):
        return False
    place = next(i for i, (a, b) in enumerate(zip(before, more)) if a != b)
    outer = math.prod(before[:place])
    at = [q for q in range(len(target)) if math.prod(target[:q]) == outer and target[q] % batch == 0]
    if at and at[0] == len(target) - 1 > 0:  # the batch is merged with the dimensions before it
        at = [q for q in range(len(target)) if math.prod(target[: q + 1]) == outer * batch]
    if not at:
        return False
    target[at[0]] = -1
    node.input[1] = add_constant(graph, f"{node.output[0]}_any_batch", np.array(target, np.int64))
    return True


def _rewrite_concat(graph: GraphProto, node: NodeProto, small: Shapes, large: Shapes) -> bool:
    """Repeat a constant, such as a class token, for each of the images that it is concatenated with."""
    if node.op_type != "Concat" or not all(name in small and name in large for name in node.input):
        return False
    grown = [name for name in node.input if small[name] != large[name]]
    fixed = [name for name in node.input if small[name] == large[name]]
    axis = _attribute(node, "axis", 0) % len(small[node.input[0]])
    if not grown or not fixed:
        return False
    place = next(i for i, (a, b) in enumerate(zip(small[grown[0]], large[grown[0]])) if a != b)
    if place == axis or any(small[name][place] != 1 for name in fixed):
        return False
    at = list(graph.node).index(node)
    prefix = node.output[0]
    start, end = (
        add_constant(graph, f"{prefix}_{key}", np.array([v], np.int64))
        for key, v in (("batch_axis", place), ("batch_end", place + 1))
    )
    zero = add_constant(graph, f"{prefix}_zero", np.array([0], np.int64))
    added = [
        helper.make_node("Shape", [grown[0]], [f"{prefix}_shape"]),
        helper.make_node("Slice", [f"{prefix}_shape", start, end, zero], [f"{prefix}_batch"]),
    ]
    for k, name in enumerate(fixed):
        dims = list(small[name])
        parts = [
            add_constant(graph, f"{prefix}_{k}_before", np.array(dims[:place], np.int64)),
            f"{prefix}_batch",
            add_constant(graph, f"{prefix}_{k}_after", np.array(dims[place + 1 :], np.int64)),
        ]
        added.append(helper.make_node("Concat", parts, [f"{prefix}_{k}_target"], axis=0))
        added.append(helper.make_node("Expand", [name, f"{prefix}_{k}_target"], [f"{prefix}_{k}_expanded"]))
        node.input[:] = [f"{prefix}_{k}_expanded" if n == name else n for n in node.input]
    nodes = list(graph.node)
    replace(graph.node, [*nodes[:at], *added, *nodes[at:]])
    return True


def to_float32(graph: GraphProto) -> None:
    """Turn float16 weights, casts and fills to float32, in place."""
    for i, tensor in enumerate(list(graph.initializer)):
        if tensor.data_type == TensorProto.FLOAT16:
            wide = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
            graph.initializer[i].CopyFrom(wide)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT16:
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float32)))
            elif attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
        for inner in graphs_of(node):
            to_float32(inner)


def to_opset(model: ModelProto, opset: int) -> ModelProto | None:
    """Convert to a newer opset; None if onnx's converter cannot."""
    try:
        converted = onnx.version_converter.convert_version(model, opset)
        onnx.checker.check_model(converted, full_check=False)
    except Exception as error:  # the converter raises RuntimeError and others
        log.info("opset %d: %s", opset, error)
        return None
    return converted


def require_plain(model: ModelProto, name: str) -> None:
    """Check that only ONNX's own operators are left, and no subgraphs.

    Raises:
        ConfigError: Others; some are named.
    """
    foreign = sorted({f"{n.op_type} ({n.domain})" for n in all_nodes(model.graph) if n.domain not in ("", "ai.onnx")})
    if foreign:
        raise ConfigError(
            f"{name} has operators that are not ONNX's own: {', '.join(foreign[:5])}",
            fix="export the network without them; files optimised by ONNX Runtime or for one device are not portable",
        )
