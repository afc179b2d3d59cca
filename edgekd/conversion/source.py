"""Reading of a trained classifier from any framework's ONNX file, brought to edgekd's interface."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnx.external_data_helper import _get_all_tensors, load_external_data_for_model, uses_external_data

from edgekd.artifacts import onnx_checks
from edgekd.conversion import graph_rewriting as rewriting
from edgekd.conversion.class_names import class_names, read_class_names
from edgekd.conversion.preprocessing import PRESETS, PreprocessOptions
from edgekd.data.images import Source, load_batch
from edgekd.data.preprocess import Preprocess
from edgekd.errors import ArtifactError, ConfigError, nearest
from edgekd.serialization import read_bytes
from edgekd.types import Array

Layout: TypeAlias = Literal["nchw", "nhwc"]
OPSET = 17
"""Older networks are converted to this opset, the one that `export` writes."""
COMPARED = 6
"""Number of images on which the network is compared with the original."""
TOLERANCE = 1e-4
"""Largest difference of logits between batch sizes: relative to the largest logit, or absolute where it is below 1."""
LEAST = 1e-30
"""Least probability whose logarithm is taken."""
HALF_TOLERANCE = 0.1
"""The same between a float16 network and its float32 form."""
_INPUT_TYPES = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.UINT8: np.uint8}
_NEUTRAL = {"Identity", "Dropout", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze"}
"""Operators after which a probability is still one."""


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier with edgekd's interface, and the answers of the original.

    Attributes:
        model: Maps `images`, float32 (n, 3, S, S), to `logits`, float32 (n, C), for any n; float32 weights, no external
            data, functions or control flow.
        classes: Names of the classes.
        preprocess: Preprocessing of the images.
        name: Name of the network: that of its file.
        difference: Largest absolute difference of logits from the original in ONNX Runtime, on the compared images.
        notes: What was assumed and changed, one remark a line.
        provenance: Facts of the source: file, SHA-256, producer, opset.
    """

    model: ModelProto
    classes: tuple[str, ...]
    preprocess: Preprocess
    name: str
    difference: float
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def image_size(self) -> int:
        return self.preprocess.image_size

    @cached_property
    def _session(self) -> Any:
        return rewriting.session(self.model)

    def logits(self, images: Array) -> Array:
        """Compute logits (n, C) of preprocessed images (n, 3, S, S)."""
        found: Array = self._session.run(None, {"images": images})[0]
        return found


def read_classifier(
    path: Path,
    *,
    classes: Path | Sequence[str] | None = None,
    preprocess: PreprocessOptions | None = None,
    output: str | None = None,
    layout: Layout | None = None,
    pictures: Sequence[Source] = (),
) -> TrainedClassifier:
    """Read an ONNX image classifier of any framework.

    The network keeps its answers: only the interface and what follows from constants are rewritten, a final softmax is
    removed, and the result is compared with the original in ONNX Runtime.

    Args:
        path: The ONNX file; external data lies in its folder.
        classes: Names of the classes, or a file with them; see `class_names`.
        preprocess: Preprocessing; default: `none` for networks that take uint8, `ultralytics` for those of Ultralytics,
            else `imagenet`. Settings that are not given are those of the default.
        output: Name of the tensor with logits or probabilities, where the network has several outputs.
        layout: Order of the input's dimensions, where it cannot be told.
        pictures: Images to compare both networks on; default: random pixels.

    Raises:
        ArtifactError: The file is missing, damaged, not an ONNX network, or lacks its external data.
        ConfigError: The network is not an image classifier that edgekd can run, or the options do not fit it.
    """
    model, digest = _load(path)
    provenance = {
        "source": path.name,
        "source_sha256": digest,
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "source_opset": _opset(model),
    }
    reader = _Reader(path, model)
    reader.take_input()
    reader.take_output(output)
    options = reader.options(preprocess)
    reader.take_size(options, layout)
    settings = reader.with_channels(options).preprocess(reader.size)
    reader.check_pixels(settings)
    images = _images(settings, pictures)
    reference = reader.reference(images)
    count = reader.count(reference, classes)
    names, remarks = class_names(model, count, classes)
    made = reader.normalised(images, count)
    difference = reader.compare(made, images, reference)
    notes = (*reader.notes, *remarks)
    return TrainedClassifier(made, names, settings, path.stem, difference, notes, provenance)


def _load(path: Path) -> tuple[ModelProto, str]:
    data = read_bytes(path, what="ONNX file", fix="give the ONNX file of a trained classifier")
    try:
        model = onnx.load_model_from_string(data)
    except Exception:  # protobuf's DecodeError, which has no types
        model = ModelProto()
    if not model.graph.node:
        raise ArtifactError(f"{path} is not a complete ONNX file", fix="export the network again")
    newest = onnx.defs.onnx_opset_version()
    if _opset(model) > newest:
        raise ConfigError(
            f"{path} has opset {_opset(model)}, the installed onnx {onnx.__version__} knows up to {newest}",
            fix="update onnx and onnxruntime, or export with an older opset",
        )
    _load_external(model, path)
    return model, hashlib.sha256(data).hexdigest()


def _opset(model: ModelProto) -> int:
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def _load_external(model: ModelProto, path: Path) -> None:
    """Read the data that the file keeps in others, which must be in its folder."""
    folder = path.resolve().parent
    external = [tensor for tensor in _get_all_tensors(model) if uses_external_data(tensor)]
    for location in sorted({entry.value for t in external for entry in t.external_data if entry.key == "location"}):
        file = (folder / location).resolve()
        if not file.is_relative_to(folder):
            raise ArtifactError(f"{path} refers to data outside its folder: {location}", fix="export the network again")
        if not file.is_file():
            raise ArtifactError(
                f"{path} keeps its weights in {location}, which is missing", fix=f"put {location} beside {path.name}"
            )
    try:
        load_external_data_for_model(model, str(folder))
    except Exception as error:  # onnx raises several kinds
        raise ArtifactError(f"{path}: its external data cannot be read ({error})", fix="export it again") from None
    if model.ByteSize() >= 1 << 31:
        raise ConfigError(f"{path} is larger than 2 GiB", fix="use a smaller network; ONNX holds no larger file")


class _Reader:
    """Steps of `read_classifier`, in their order.

    Attributes:
        notes: Remarks for the user.
        size: Side of the input, if the network fixes it.
    """

    def __init__(self, path: Path, model: ModelProto) -> None:
        self.path = path
        self.notes: list[str] = []
        self.size: int | None = None
        self.layout: Layout = "nchw"
        properties = {p.key: p.value for p in model.metadata_props}
        self._exported_size = _imgsz(properties.get("imgsz", ""))
        self._producer = f"{model.producer_name} " + " ".join(p.value for p in model.metadata_props)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        rewriting.require_plain(model, str(path))
        self.original = model
        weights = {i.name for i in model.graph.initializer}
        rewriting.replace(model.graph.input, [i for i in model.graph.input if i.name not in weights])
        used = {n.domain for n in rewriting.all_nodes(model.graph)} | {""}
        rewriting.replace(model.opset_import, [o for o in model.opset_import if o.domain in used | {"ai.onnx"}])

    # the interface -----------------------------------------------------------------------------------------------

    def take_input(self) -> None:
        """Find the one image input."""
        inputs = list(self.original.graph.input)
        described = ", ".join(f"{i.name} {_describe(i)}" for i in inputs)
        if len(inputs) != 1:
            raise ConfigError(
                f"{self.path} has {len(inputs)} inputs: {described}", fix="give a network with one input, the image"
            )
        tensor = inputs[0].type.tensor_type
        if not inputs[0].type.HasField("tensor_type") or len(tensor.shape.dim) != 4:
            what = "text (tokens), not images" if tensor.elem_type in (TensorProto.INT64, TensorProto.STRING) else ""
            raise ConfigError(
                f"{self.path} takes {what or 'no image'}: its input is {described}",
                fix="give a classifier of images (n, 3, height, width) or (n, height, width, 3)",
            )
        if tensor.elem_type not in _INPUT_TYPES:
            raise ConfigError(
                f"{self.path}: its input is {described}", fix="export it with an input of float32, float16 or uint8"
            )
        self.input = inputs[0]
        self.input_type = _INPUT_TYPES[tensor.elem_type]

    def take_output(self, name: str | None) -> None:
        """Find the logits: the output, or what its softmax reads."""
        graph = self.original.graph
        outputs = {o.name: o for o in graph.output}
        if name is None and len(outputs) > 1:
            listed = ", ".join(f"{o.name} {_describe(o)}" for o in graph.output)
            raise ConfigError(
                f"{self.path} has {len(outputs)} outputs: {listed}",
                fix="name the one with a logit or probability for each class with --output; a detector has none",
            )
        made = {n: node for node in graph.node for n in node.output}
        name = name or next(iter(outputs))
        if name not in made:
            raise ConfigError(f"{self.path} has no tensor '{name}'", fix=nearest(name, [*outputs, *made]))
        if name in outputs and not outputs[name].type.HasField("tensor_type"):
            raise ConfigError(
                f"{self.path}: its output {name} is {_describe(outputs[name])}, not a tensor",
                fix="export it with a tensor of logits or probabilities (scikit-learn: the option zipmap=False)",
            )
        self.output = name
        self.kind, self.logits = _final_activation(made, name)
        try:
            self._session = rewriting.session(self.original, outputs=[self.logits])
        except Exception as error:  # ONNX Runtime's errors have no base but this
            raise ConfigError(
                f"{self.path} cannot be run by ONNX Runtime: {_reason(error)}",
                fix="export the network with a supported opset and standard operators",
            ) from None
        if self.kind:
            self.notes.append(f"the final {self.kind} is removed: the answers are the logits before it")

    def options(self, given: PreprocessOptions | None) -> PreprocessOptions:
        """Complete the preprocessing by the default for this network."""
        name = "imagenet"
        if self.input_type is np.uint8:
            name = "none"
        elif "Ultralytics" in self._producer:
            name = "ultralytics"
        if given is None or given.mean is None:
            self.notes.append(f"no preprocessing is given: the preset '{name}' is assumed (--preprocess)")
        return PRESETS[name] if given is None else given.over(PRESETS[name]) if given.mean is None else given

    def take_size(self, options: PreprocessOptions, layout: Layout | None) -> None:
        """Find layout, channels and size of the input."""
        dims = [d.dim_value for d in self.input.type.tensor_type.shape.dim]  # 0 where it is dynamic
        self.batch = dims[0]
        fits: dict[Layout, bool] = {"nchw": dims[1] in (0, 1, 3), "nhwc": dims[3] in (0, 1, 3)}
        if not any(fits.values()):
            raise ConfigError(
                f"{self.path}: its input {_describe(self.input)} has neither 1 nor 3 channels",
                fix="give a classifier of colour or grey images",
            )
        candidates: list[Layout] = [layout] if layout else [k for k in fits if fits[k]]
        if len(candidates) > 1 and (known := [k for k in candidates if dims[1 if k == "nchw" else 3]]):
            candidates = known
        side = options.image_size or self._exported_size
        fixed: dict[Layout, list[int]] = {"nchw": dims[2:], "nhwc": dims[1:3]}
        for one in candidates:
            height, width = fixed[one]
            size = height or width or side
            if not (height or width or options.image_size) and side:
                self.notes.append(f"the network takes images of any size: {side} pixels, as its metadata state")
            if size is None:
                raise ConfigError(
                    f"{self.path} takes images of any size", fix="give the size in pixels with --image-size"
                )
            if {height, width} - {0, size}:
                raise ConfigError(
                    f"{self.path} takes images of {height} x {width} pixels", fix="give a network with a square input"
                )
            for channels in [dims[1 if one == "nchw" else 3]] if dims[1 if one == "nchw" else 3] else [3, 1]:
                if len(candidates) == 1 and dims[1 if one == "nchw" else 3]:
                    self.layout, self.channels, self.size = one, channels, size
                    return
                shape = (self.batch or 1, channels, size, size)
                images = np.zeros(shape if one == "nchw" else np.take(shape, (0, 2, 3, 1)), self.input_type)
                try:
                    self._session.run(None, {self.input.name: images})
                except Exception:  # not its layout
                    continue
                self.layout, self.channels, self.size = one, channels, size
                return
        raise ConfigError(
            f"{self.path}: ONNX Runtime cannot run it on images of {side or self.size} pixels",
            fix="give --image-size, and --layout nchw or nhwc, as the network was trained",
        )

    def with_channels(self, options: PreprocessOptions) -> PreprocessOptions:
        """Return the options with the order of the planes that the network takes."""
        if (self.channels == 1) == (options.channels == "grey"):
            return options
        if options.channels is not None:
            raise ConfigError(
                f"{self.path} takes {self.channels} planes, the preprocessing gives {options.channels}",
                fix="omit --channels, or give the order of the network's planes",
            )
        self.notes.append("the network takes grey images: the luminance, with the first mean and standard deviation")
        return dataclasses.replace(options, channels="grey")

    def check_pixels(self, preprocess: Preprocess) -> None:
        """Check that the preprocessing gives what the input can hold."""
        if self.input_type is np.uint8 and (preprocess.scale, preprocess.mean, preprocess.std) != (
            1.0,
            (0.0,) * 3,
            (1.0,) * 3,
        ):
            raise ConfigError(
                f"{self.path} takes pixels 0..255 (uint8), which the preprocessing would scale",
                fix="use --preprocess none",
            )

    # what the original answers -----------------------------------------------------------------------------------

    def reference(self, images: Array) -> npt.NDArray[Any]:
        """Compute the tensor of logits with the network as it is, one batch of its own size at a time."""
        try:
            rows = self._answers(self._session, images)
        except Exception as error:
            raise ConfigError(
                f"{self.path} cannot be run on images of {self.size} pixels: {_reason(error)}",
                fix="give --image-size as the network was trained",
            ) from None
        found, batch = rows[0], self.batch or 1
        if not isinstance(found, np.ndarray) or found.ndim < 2 or found.shape[0] != batch:
            shape = getattr(found, "shape", type(found).__name__)
            raise ConfigError(
                f"{self.path}: {self.logits} is {shape} for {batch} images, not a row for each image",
                fix="name the tensor (n, classes) with --output",
            )
        return np.concatenate(rows)[: len(images)]

    def _answers(self, runner: Any, images: Array) -> list[npt.NDArray[Any]]:
        batch = self.batch or 1
        chunks = [images[np.arange(i, i + batch) % len(images)] for i in range(0, len(images), batch)]
        return [runner.run([self.logits], {self.input.name: self._native(chunk)})[0] for chunk in chunks]

    def _native(self, images: Array) -> npt.NDArray[Any]:
        native = images[:, : self.channels]
        return np.ascontiguousarray(native.transpose(0, 2, 3, 1) if self.layout == "nhwc" else native).astype(
            self.input_type
        )

    def count(self, reference: npt.NDArray[Any], classes: Path | Sequence[str] | None) -> int:
        """Return the number of classes after checking that the network is a classifier."""
        shape = reference.shape[1:]
        row = [d for d in shape if d != 1]
        if len(row) > 1:
            kind = "a detector" if len(shape) == 2 else "segmentation, or one from image to image"
            raise ConfigError(
                f"{self.path} gives {('n', *shape)} for n images: it looks like {kind}, not a classifier",
                fix="give a classifier, or name the tensor (n, classes) with --output",
            )
        if reference.dtype not in (np.float32, np.float16, np.float64):
            raise ConfigError(
                f"{self.path}: {self.logits} is {reference.dtype}: decisions, not confidences",
                fix="name the tensor of logits or probabilities with --output",
            )
        if not np.isfinite(reference).all():
            raise ConfigError(f"{self.path} gives values that are not finite", fix="check the export and preprocessing")
        if row and self.kind == "Sigmoid":
            raise ConfigError(
                f"{self.path} ends in a sigmoid for each of {row[0]} classes: several may apply to an image",
                fix=f"if only one does, take the logits with --output {self.logits}",
            )
        given = read_class_names(classes) if isinstance(classes, Path) else classes or ()
        if not row and self.kind != "Sigmoid" and len(given) != 2:
            raise ConfigError(
                f"{self.path} has one output: a regression, or the logit of one of two classes",
                fix="if it is a logit, give two class names with --classes, the one that it speaks for last",
            )
        self.binary = not row
        flat = reference.reshape(len(reference), -1).astype(np.float64)
        self.probabilities = not self.kind and not self.binary and bool((flat >= 0).all())
        self.probabilities &= bool(np.allclose(flat.sum(axis=1), 1, atol=1e-3))
        return row[0] if row else 2

    # the rewriting -----------------------------------------------------------------------------------------------

    def normalised(self, images: Array, count: int) -> ModelProto:
        """Return the network with edgekd's interface."""
        half = any(t.data_type == TensorProto.FLOAT16 for t in _get_all_tensors(self.original))
        self.half = half or self.input_type is np.float16
        made = ModelProto()
        made.CopyFrom(self.original)
        graph = made.graph
        rewriting.replace(graph.output, [ValueInfoProto(name=self.logits)])
        rewriting.drop_unused(graph)
        del graph.value_info[:]
        if self.half:
            rewriting.to_float32(graph)
            self.notes.append("float16 weights are converted to float32")
        self._rewrite_input(made)
        self._rewrite_output(graph)
        self._free_batch(made, images)
        made = self._upgraded(made)
        _finish(made, self.size or 0, count)
        self._check(made)
        return made

    def _rewrite_input(self, model: ModelProto) -> None:
        graph = model.graph
        rewriting.free_name(graph, "images")
        name = graph.input[0].name
        front: list[NodeProto] = []
        source = "images"
        if self.channels == 1:
            ends = [
                rewriting.add_constant(graph, f"images_{k}", np.array([v], np.int64)) for k, v in (("0", 0), ("1", 1))
            ]
            front.append(helper.make_node("Slice", [source, *ends, ends[1]], ["images_grey"], name="images_grey"))
            source = "images_grey"
        if self.input_type is np.uint8:
            source = self._rewrite_pixels(graph, front, source, name)
        if self.layout == "nhwc":
            readers = [n for n in graph.node if name in rewriting.reads(n)]
            back = [n for n in readers if n.op_type == "Transpose" and _perm(n) == [0, 3, 1, 2]]
            for node in back:  # it only undoes the order that this input does not have
                node.op_type = "Identity"
                del node.attribute[:]
                node.input[0] = source
            if len(back) < len(readers):
                front.append(helper.make_node("Transpose", [source], [name], perm=[0, 2, 3, 1], name="images_nhwc"))
        else:
            rewriting.rename(graph, {name: source})
        nodes = list(graph.node)
        rewriting.replace(graph.node, [*front, *nodes])
        rewriting.replace(graph.input, [_value("images", [self.batch or "n", 3, self.size, self.size])])

    def _rewrite_pixels(self, graph: GraphProto, front: list[NodeProto], source: str, name: str) -> str:
        """Feed pixels as float, without a conversion to uint8 and back where the network only casts them."""
        follow, casts = [name], []
        for tensor in follow:
            for node in graph.node:
                if tensor not in rewriting.reads(node):
                    continue
                if node.op_type == "Cast" and _to(node) == TensorProto.FLOAT:
                    casts.append(node)
                elif node.op_type in ("Transpose", "Identity"):
                    follow.append(node.output[0])
                else:
                    front.append(
                        helper.make_node("Cast", [source], ["images_uint8"], to=TensorProto.UINT8, name="images_uint8")
                    )
                    return "images_uint8"
        for node in casts:
            node.op_type = "Identity"
            del node.attribute[:]
        return source

    def _rewrite_output(self, graph: GraphProto) -> None:
        rewriting.free_name(graph, "logits")
        name = graph.output[0].name
        added = [helper.make_node("Flatten", [name], ["logits_flat"], axis=1, name="logits_flat")]
        if self.binary:
            at = rewriting.add_constant(graph, "logits_pads", np.array([0, 1, 0, 0], np.int64))
            added.append(helper.make_node("Pad", ["logits_flat", at], ["logits"], name="logits"))
            self.notes.append("the one logit z becomes two, 0 and z, whose softmax is the sigmoid of z")
        elif self.probabilities:
            least = rewriting.add_constant(graph, "logits_least", np.float32(LEAST))
            added.append(helper.make_node("Max", ["logits_flat", least], ["logits_clipped"], name="logits_clipped"))
            added.append(helper.make_node("Log", ["logits_clipped"], ["logits"], name="logits"))
            self.notes.append("the outputs are probabilities: their logarithm is taken, whose softmax they are")
        else:
            added[0].output[0] = "logits"
        graph.node.extend(added)
        rewriting.replace(graph.output, [ValueInfoProto(name="logits")])

    def _free_batch(self, model: ModelProto, images: Array) -> None:
        """Fold constants and make the network take any number of images."""
        batch = self.batch or 1
        dim = model.graph.input[0].type.tensor_type.shape.dim[0]
        dim.ClearField("dim_value")
        dim.dim_param = "n"
        before = ModelProto()
        before.CopyFrom(model)
        try:
            rewriting.fold_constants(model, [images[:1], images[:3]])
            runner = rewriting.session(model)
            if not np.allclose(_in_batches(runner, images[:3], 3), _in_batches(runner, images[:3], 1), 1e-3, 1e-3):
                raise ValueError("images in a batch influence each other")
        except Exception:  # made for one batch size, whatever its input says
            model.CopyFrom(before)
            try:
                rewriting.fold_constants(model, [images[np.arange(batch) % len(images)]])
                if nodes := rewriting.free_batch(model, batch):
                    self.notes.append(f"{len(nodes)} operators that held the batch size {batch} take any")
            except Exception as error:
                raise self._only_one_batch(error) from None

    def _only_one_batch(self, error: Exception) -> ConfigError:
        node = re.search(r"[Nn]ame:'([^']+)'", str(error))
        at = f" (at {node.group(1)})" if node else ""
        return ConfigError(
            f"{self.path} works for {self.batch or 1} image at a time only{at}: {_reason(error)}",
            fix="export it with a dynamic batch dimension",
        )

    def _upgraded(self, model: ModelProto) -> ModelProto:
        found = _opset(model)
        if found >= OPSET:
            return model
        converted = rewriting.to_opset(model, OPSET)
        if converted is None:
            self.notes.append(f"the network keeps opset {found}: onnx cannot convert it to {OPSET}")
            return model
        return converted

    def _check(self, model: ModelProto) -> None:
        try:
            onnx_checks.parse(model.SerializeToString())
            onnx.checker.check_model(model, full_check=True)
        except Exception as error:  # the checker raises many kinds
            raise ConfigError(
                f"{self.path} cannot be brought to edgekd's form: {_reason(error)}",
                fix="export the network without control flow, at a fixed image size",
            ) from None

    # the comparison ----------------------------------------------------------------------------------------------

    def compare(self, model: ModelProto, images: Array, reference: npt.NDArray[Any]) -> float:
        """Return the largest difference from the original's logits; check that any batch size gives the same."""
        runner = rewriting.session(model)
        found = _in_batches(runner, images, self.batch or 1)
        try:
            others = [_in_batches(runner, images, size) for size in (1, 3)]
        except Exception as error:
            raise self._only_one_batch(error) from None
        limit = TOLERANCE * max(1.0, float(np.abs(found).max()))
        if not (apart := max(float(np.abs(other - found).max()) for other in others)) <= limit:
            raise ConfigError(
                f"{self.path} gives other answers to three images at once than to each: logits differ by {apart:.2e}",
                fix="export it with a dynamic batch dimension",
            )
        difference = self._difference(found, reference)
        limit = HALF_TOLERANCE * max(1.0, float(np.abs(reference).max())) if self.half else limit
        if not difference <= limit:
            raise ConfigError(
                f"{self.path} changes its answers when it is rewritten: logits differ by {difference:.2e}",
                fix="please report this network",
            )
        self.notes.append(self._remark(model, images, difference))
        return difference

    def _difference(self, found: Array, reference: npt.NDArray[Any]) -> float:
        expected = reference.reshape(len(found), -1)
        if self.probabilities:
            expected = np.log(np.maximum(expected, LEAST))
        return float(np.abs(found[:, -expected.shape[1] :] - expected).max())

    def _remark(self, model: ModelProto, images: Array, difference: float) -> str:
        """Describe how close the answers are; without ONNX Runtime's fusions, which depend on the form of a graph."""
        on = f"on {len(images)} images"
        if difference == 0:
            return f"the logits are the original's to the bit {on}"
        if self.half:
            return f"logits in float32 differ by up to {difference:.1e} from those in float16 {on}"
        plain = rewriting.session(self.original, outputs=[self.logits], optimise=False)
        reference = np.concatenate(self._answers(plain, images))[: len(images)]
        found = _in_batches(rewriting.session(model, optimise=False), images, self.batch or 1)
        if (exact := self._difference(found, reference)) == 0:
            return (
                f"operator by operator the logits are the original's to the bit {on}; "
                f"with ONNX Runtime's fusions they differ by up to {difference:.1e}"
            )
        return f"logits differ by up to {difference:.1e} from the original {on}, {exact:.1e} operator by operator"


def _in_batches(runner: Any, images: Array, size: int) -> Array:
    rows = [runner.run(None, {"images": images[i : i + size]})[0] for i in range(0, len(images), size)]
    return np.concatenate(rows)


def _final_activation(made: dict[str, NodeProto], name: str) -> tuple[str, str]:
    """Return the final activation (Softmax, LogSoftmax, Sigmoid or empty) and the tensor of logits before it."""
    at = name
    while (node := made.get(at)) is not None:
        if node.op_type in ("Softmax", "LogSoftmax", "Sigmoid"):
            return node.op_type, str(node.input[0])
        if node.op_type not in _NEUTRAL:
            break
        at = node.input[0]
    return "", name


def _images(preprocess: Preprocess, pictures: Sequence[Source]) -> Array:
    """Return images (n, 3, S, S) to compare on, at least three: the pictures, or random pixels."""
    if pictures:
        found = load_batch(list(pictures[:COMPARED]), preprocess)
        return found[np.arange(max(3, len(found))) % len(found)]
    side = preprocess.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    if preprocess.channels == "grey":
        pixels[:] = pixels[..., :1]
    return preprocess.normalised(pixels)


def _finish(model: ModelProto, size: int, count: int) -> None:
    """Describe the interface, and remove what only the exporter needed."""
    graph = model.graph
    rewriting.constants_to_initializers(graph)
    rewriting.drop_unused(graph)
    del graph.value_info[:]
    rewriting.replace(graph.input, [_value("images", ["n", 3, size, size])])
    rewriting.replace(graph.output, [_value("logits", ["n", count])])
    for node in graph.node:
        node.doc_string = ""
        if hasattr(node, "metadata_props"):
            del node.metadata_props[:]
    del model.metadata_props[:]
    model.doc_string = graph.doc_string = ""
    model.ir_version = max(model.ir_version, 8)


def _value(name: str, shape: Sequence[Any]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _imgsz(text: str) -> int | None:
    """Return the side that Ultralytics writes into the metadata, such as `[64, 64]`; None if it is not square."""
    sides = {int(side) for side in re.findall(r"\d+", text)}
    return sides.pop() if len(sides) == 1 else None


def _perm(node: NodeProto) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == "perm"), [])


def _to(node: NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "to"), 0)


def _describe(value: ValueInfoProto) -> str:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return str(kind or "of unknown type").removesuffix("_type")
    tensor = value.type.tensor_type
    dims = ", ".join(d.dim_param or str(d.dim_value or "?") for d in tensor.shape.dim)
    return f"{TensorProto.DataType.Name(tensor.elem_type).lower()} ({dims})"


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:600]
