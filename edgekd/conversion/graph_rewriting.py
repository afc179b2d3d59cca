"""Rewriting of ONNX graphs without a change of what they compute: constants, batch size, precision, names."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

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
        extended.graph.output.extend(ValueInfoProto(name=name) for name in outputs if name not in own)
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
        reshapes = [n for n in graph.node if n.op_type == "Reshape" and n.input[1] in names]
        gathers = [n for n in graph.node if n.op_type == "Gather" and not _attribute(n, "axis", 0)]
        gathers = [n for n in gathers if n.input[1] in {*names, *(i.name for i in graph.initializer)}]
        shapes_of = [*(n.output[0] for n in reshapes), *(n.input[0] for n in gathers)]
        found = [_run(model, names, shapes_of, x) for x in images] if names or gathers else []
        constants = {i.name: i for i in graph.initializer}
        for node in gathers:
            fixed = [numpy_helper.to_array(constants[node.input[1]])] * len(found) if node.input[1] in constants else []
            _gather_to_reshape(
                graph,
                node,
                indices=fixed or [f[node.input[1]] for f in found],
                shapes=[tuple(f[f"shape of {node.input[0]}"]) for f in found],
            )
        for name in names:
            values = [f[name] for f in found]
            if all(np.array_equal(v, values[0]) and v.dtype == values[0].dtype for v in values):
                _set_constant(graph, name, values[0])
        for node in reshapes:
            _free_reshape(graph, node, np.stack([f[f"shape of {node.output[0]}"] for f in found]))
        inlined = _inline_conditions(graph)
        drop_unused(graph)
        if not inlined:
            return


def _run(model: ModelProto, names: list[str], shapes_of: list[str], images: Values) -> dict[str, Values]:
    """Compute inner tensors, and as "shape of NAME" the shapes of others; no further than needed."""
    shortened = ModelProto()
    shortened.CopyFrom(model)
    shapes = [f"shape of {name}" for name in shapes_of]
    shortened.graph.node.extend(helper.make_node("Shape", [name], [to]) for name, to in zip(shapes_of, shapes))
    replace(shortened.graph.output, [ValueInfoProto(name=name) for name in (*names, *shapes)])
    drop_unused(shortened.graph)
    runner = session(shortened, optimise=False)
    feed = {i.name: images for i in runner.get_inputs()}
    return dict(zip((*names, *shapes), runner.run(None, feed)))


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


def _free_reshape(graph: GraphProto, node: NodeProto, shapes: Values) -> None:
    """Give a Reshape whose shape depends on the batch size at one place a constant shape with -1 there.

    Args:
        graph: Its graph.
        node: The node.
        shapes: Shapes (batch sizes, dimensions) of its output.
    """
    differing = np.flatnonzero((shapes != shapes[0]).any(axis=0))
    if len(differing) == 1 and node.input[1] not in {i.name for i in graph.initializer}:
        shape = shapes[0].copy()
        shape[differing] = -1
        node.input[1] = add_constant(graph, f"{node.output[0]}_any_batch", shape)


def _gather_to_reshape(
    graph: GraphProto, node: NodeProto, *, indices: list[Values], shapes: list[tuple[int, ...]]
) -> None:
    """Turn a Gather that takes all elements of a vector in their order, as torch's as_strided, into a Reshape."""
    for found, shape in zip(indices, shapes):
        if shape != (found.size,) or not np.array_equal(found.ravel(), np.arange(found.size)):
            return
    target = np.array(indices[0].shape, np.int64)
    differing = np.flatnonzero((np.array([i.shape for i in indices]) != target).any(axis=0))
    if len(differing) > 1:
        return
    target[differing] = -1
    node.op_type = "Reshape"
    del node.attribute[:]
    node.input[1] = add_constant(graph, f"{node.output[0]}_any_batch", target)


def add_constant(graph: GraphProto, name: str, value: Values) -> str:
    """Add an initializer of this name, or of one derived from it that is free, and return the name."""
    free_name(graph, name)
    graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
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

    Shapes for a larger batch are inferred node by node and compared with those for `batch`. In memory the batch lies
    after the product of the dimensions before it, which a Reshape must split at the same place; where two places do,
    the last dimension, that of features, is left alone.

    Args:
        model: The network, changed in place; its input has a fixed image size.
        batch: The batch size that it was exported for.

    Returns:
        Names of the rewritten nodes.
    """
    graph = model.graph
    types = _types(model, batch)
    small = {name: shape for name, (_, shape) in types.items()}
    large = {i.name: tuple(i.dims) for i in graph.initializer}
    large[graph.input[0].name] = (LARGER * batch, *small[graph.input[0].name][1:])
    constants = {i.name: i for i in graph.initializer if math.prod(i.dims) <= SMALL}
    rewritten, nodes = [], []
    for node in graph.node:
        added: list[NodeProto] = []
        if node.op_type == "Reshape" and node.input[1] in constants:
            changed = _rewrite_reshape(graph, node, constants, small, large, batch)
        else:
            added = _rewrite_concat(graph, node, small, large) if node.op_type == "Concat" else []
            changed = bool(added)
            large |= _inferred(model, node, types, large, constants)
        nodes += [*added, node]
        if changed:
            rewritten.append(node.name or f"{node.op_type} of {node.output[0]}")
    replace(graph.node, nodes)
    return rewritten


LARGER = 7
"""Factor between the two batch sizes: a prime that no dimension is likely to have."""
Shapes = dict[str, tuple[int, ...]]


def _types(model: ModelProto, batch: int) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Infer element types and shapes, where these are known completely, without the values of large weights."""
    skeleton = ModelProto()
    skeleton.CopyFrom(model)
    graph = skeleton.graph
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    large = [i for i in graph.initializer if math.prod(i.dims) > SMALL]
    replace(graph.initializer, [i for i in graph.initializer if math.prod(i.dims) <= SMALL])
    graph.input.extend(helper.make_tensor_value_info(i.name, i.data_type, list(i.dims)) for i in large)
    inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    types = {i.name: (i.data_type, tuple(i.dims)) for i in model.graph.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            types[value.name] = tensor.elem_type, tuple(d.dim_value for d in tensor.shape.dim)
    return types


def _inferred(
    model: ModelProto,
    node: NodeProto,
    types: dict[str, tuple[int, tuple[int, ...]]],
    large: Shapes,
    constants: dict[str, TensorProto],
) -> Shapes:
    """Infer the shapes of a node's outputs from those of its inputs; nothing where that is impossible."""
    names = [name for name in node.input if name]
    if not all(name in types and name in large for name in names):
        return {}
    opsets = {o.domain: o.version for o in model.opset_import}
    schema = onnx.defs.get_schema(node.op_type, max(opsets.values()), "")
    given = {name: helper.make_tensor_type_proto(types[name][0], large[name]) for name in names}
    known = {name: constants[name] for name in names if name in constants}
    try:
        found = onnx.shape_inference.infer_node_outputs(schema, node, given, known, opset_imports=model.opset_import)
    except Exception:  # shapes that do not fit: running it names the node
        return {}
    shapes = {name: kind.tensor_type.shape.dim for name, kind in found.items() if kind.HasField("tensor_type")}
    complete = {name: dims for name, dims in shapes.items() if all(d.HasField("dim_value") for d in dims)}
    return {name: tuple(d.dim_value for d in dims) for name, dims in complete.items()}


def _rewrite_reshape(
    graph: GraphProto, node: NodeProto, constants: dict[str, TensorProto], small: Shapes, large: Shapes, batch: int
) -> bool:
    """Put the batch where the images are in memory; the shape of the output is added to `large`."""
    before, more, after = small.get(node.input[0]), large.get(node.input[0]), small.get(node.output[0])
    if before is None or more is None or after is None:
        return False
    if before == more:
        large[node.output[0]] = after
        return False
    place = next(i for i, (a, b) in enumerate(zip(before, more)) if a != b)
    outer = math.prod(before[:place])
    at = [q for q in range(len(after)) if math.prod(after[:q]) == outer and after[q] % batch == 0]
    if at and at[0] == len(after) - 1 > 0:  # the batch is merged with the dimensions before it
        at = [q for q in range(len(after)) if math.prod(after[: q + 1]) == outer * batch]
    if not at:
        return False
    expected = large[node.output[0]] = tuple(LARGER * n if q == at[0] else n for q, n in enumerate(after))
    target = numpy_helper.to_array(constants[node.input[1]])
    fixed = [more[i] if n == 0 and not _attribute(node, "allowzero", 0) else int(n) for i, n in enumerate(target)]
    rest = math.prod(more) // max(1, math.prod(n for n in fixed if n != -1))
    if expected == tuple(rest if n == -1 else n for n in fixed):
        return False
    any_batch = np.array([-1 if q == at[0] else n for q, n in enumerate(after)], np.int64)
    node.input[1] = add_constant(graph, f"{node.output[0]}_any_batch", any_batch)
    return True


def _rewrite_concat(graph: GraphProto, node: NodeProto, small: Shapes, large: Shapes) -> list[NodeProto]:
    """Repeat a constant, such as a class token, for each of the images that it is concatenated with.

    Returns:
        Nodes to be put before the Concat; the shape of its output is added to `large`.
    """
    if not all(name in small and name in large for name in node.input):
        return []
    given = list(node.input)
    grown = [name for name in node.input if small[name] != large[name]]
    fixed = [name for name in node.input if small[name] == large[name]]
    axis = _attribute(node, "axis", 0) % len(small[node.input[0]])
    if not grown or not fixed:
        return []
    place = next(i for i, (a, b) in enumerate(zip(small[grown[0]], large[grown[0]])) if a != b)
    if place == axis or any(small[name][place] != 1 for name in fixed):
        return []
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
    joined = [large[grown[0]][axis] if name in grown else small[name][axis] for name in given]
    large[node.output[0]] = (*large[grown[0]][:axis], sum(joined), *large[grown[0]][axis + 1 :])
    return added


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
    """Check that there are only operators of ONNX's own domain, and none that draws random numbers.

    Raises:
        ConfigError: There are others; some are named.
    """
    if random := sorted({n.op_type for n in all_nodes(model.graph) if n.op_type in _RANDOM}):
        raise ConfigError(
            f"{name} draws random numbers: {', '.join(random)}", fix="export the network in evaluation mode"
        )
    foreign = sorted({f"{n.op_type} ({n.domain})" for n in all_nodes(model.graph) if n.domain not in ("", "ai.onnx")})
    if foreign:
        raise ConfigError(
            f"{name} has operators that are not ONNX's own: {', '.join(foreign[:5])}",
            fix="export the network without them; files optimised by ONNX Runtime or for one device are not portable",
        )
