"""The half of the fake TensorRT that builds engines."""

from __future__ import annotations

import math
import pickle
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from fakes.cuda import RuleBroken
from fakes.names import QDQ, Named, shapes_of
from onnx import TensorProto, numpy_helper

if TYPE_CHECKING:
    from fakes.tensorrt import World

NO_IMPORTER = {"8.5": ("LayerNormalization", "HardSwish")}
"""Operators, of those that edgekd's networks have, that a parser does not know (operators.md of onnx-tensorrt)."""
ELEMENT = {"FLOAT": TensorProto.FLOAT, "HALF": TensorProto.FLOAT16, "INT8": TensorProto.INT8}


def opset(model: onnx.ModelProto) -> int:
    return next(o.version for o in model.opset_import if not o.domain)


def _of_profile(layer: dict[str, Any], index: int) -> dict[str, Any]:
    """The layer as it is named for a profile other than the first."""
    inputs = [{**tensor, "Name": f"{tensor['Name']} [profile {index}]"} for tensor in layer["Inputs"]]
    return {**layer, "Name": f"{layer['Name']} [profile {index}]", "Inputs": inputs}


def offer_builder(world: World) -> None:
    """Networks, parsers, configurations and builders."""
    trt, cuda, trouble, names, major, offer = (
        world.trt,
        world.cuda,
        world.trouble,
        world.names,
        world.major,
        world.offer,
    )
    flags, types_ = trt.BuilderFlag, trt.DataType

    @offer
    class ITensor(Named):
        def __init__(self, name: str, dtype: Any, shape: tuple[int, ...], *, strong: bool, owner: Any) -> None:
            self._name, self._dtype, self._shape, self._strong, self._owner = name, dtype, shape, strong, owner
            self._range: tuple[float, float] | None = None
            self.allowed_formats = (1 << 16) - 1

        name = property(lambda self: self._name)

        def _set_dtype(self, dtype: Any) -> None:
            if major >= 11:
                raise AttributeError("can't set attribute 'dtype'")
            if self._strong:
                raise RuleBroken("types of a strongly typed network cannot be set")
            self._dtype = dtype

        def _set_shape(self, shape: tuple[int, ...]) -> None:
            self._shape = tuple(shape)

        dtype = property(lambda self: self._dtype, _set_dtype)
        shape = property(lambda self: self._shape, _set_shape)

        def set_dynamic_range(self, low: float, high: float) -> bool:
            assert high == -low > 0
            self._range = (low, high)
            return True

    @offer
    class ILayer(Named):
        def __init__(self, outputs: list[Any]) -> None:
            self._outputs = outputs

        num_outputs = property(lambda self: len(self._outputs))

        def get_output(self, index: int) -> Any:
            return self._outputs[index]

    @offer
    class INetworkDefinition(Named):
        def __init__(self, flags_: int) -> None:
            bits: Any = trt.NetworkDefinitionCreationFlag
            known = {f: bool(flags_ >> int(f) & 1) for f in bits}
            if flags_ >= 1 << (max(map(int, bits)) + 1):
                raise RuleBroken("unknown creation flags")
            self._batch = major >= 10 or known[bits.EXPLICIT_BATCH]
            self._strong = major >= 11 or (hasattr(bits, "STRONGLY_TYPED") and known[bits.STRONGLY_TYPED])
            self._model: onnx.ModelProto | None = None
            self._parser: Any = lambda: None
            self._inputs: list[Any] = []
            self._outputs: list[Any] = []
            self._layers: list[Any] = []

        num_inputs = property(lambda self: len(self._inputs))
        num_outputs = property(lambda self: len(self._outputs))
        num_layers = property(lambda self: len(self._layers))

        def get_input(self, index: int) -> Any:
            return self._inputs[index]

        def get_output(self, index: int) -> Any:
            return self._outputs[index]

        def get_layer(self, index: int) -> Any:
            return self._layers[index]

        def _fill(self, model: onnx.ModelProto, parser: Any) -> None:
            self._model, self._parser = model, weakref.ref(parser)
            names_of = {number: name for name, number in ELEMENT.items()}
            shapes = shapes_of(model)

            def tensor(value: Any) -> Any:
                dtype = types_[names_of[value.type.tensor_type.elem_type]]
                return ITensor(value.name, dtype, shapes[value.name], strong=self._strong, owner=self)

            self._inputs = [tensor(v) for v in model.graph.input]
            self._outputs = [tensor(v) for v in model.graph.output]
            ends = {t._name: t for t in self._outputs}
            for node in model.graph.node:
                outputs = [
                    ends.get(n) or ITensor(n, types_.FLOAT, (), strong=self._strong, owner=self) for n in node.output
                ]
                self._layers.append(ILayer(outputs))

    @offer
    class ParserError(Named):
        def __init__(self, text: str, index: int) -> None:
            self._text, self._index = text, index

        def desc(self) -> str:
            return self._text

        def node(self) -> int:
            return self._index

    @offer
    class OnnxParser(Named):
        def __init__(self, network: Any, logger: Any) -> None:
            self._network, self._errors = network, list[Any]()
            self._logger = logger

        num_errors = property(lambda self: len(self._errors))

        def get_error(self, index: int) -> Any:
            return self._errors[index]

        def set_flag(self, flag: Any) -> None:
            assert flag in trt.OnnxParserFlag

        def parse(self, data: bytes) -> bool:
            model = onnx.load_from_string(data)
            self._errors = [ParserError(*found) for found in self._wrong(model)]
            if not self._errors:
                self._network._fill(model, self)
            return not self._errors

        def _wrong(self, model: onnx.ModelProto) -> Iterator[tuple[str, int]]:
            if not self._network._batch:
                yield (
                    "This version of the ONNX parser only supports TensorRT INetworkDefinitions with an explicit batch",
                    -1,
                )
            constants = {c.name: numpy_helper.to_array(c) for c in model.graph.initializer}
            for i, node in enumerate(model.graph.node):
                if node.op_type in (*trouble.operators, *NO_IMPORTER.get(world.family, ())):
                    yield f"No importer registered for op: {node.op_type}", i
                if node.op_type in QDQ:
                    scale, zero = constants[node.input[1]], constants[node.input[2]]
                    if zero.dtype != np.int8 or zero.any():
                        yield "Non-zero zero point is not supported", i
                    if scale.dtype == np.float16 and opset(model) < 19:
                        yield "FP16 scales need opset 19", i
                    if not (scale > 0).all():
                        yield "Scale coefficients must all be positive", i
            try:
                onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
            except onnx.shape_inference.InferenceError as error:
                yield f"types do not fit: {error}", -1

    @offer
    class IOptimizationProfile(Named):
        def __init__(self) -> None:
            self._shapes: dict[str, tuple[Any, Any, Any]] = {}

        def set_shape(self, name: str, low: Any, best: Any, high: Any) -> None:
            self._shapes[name] = (tuple(low), tuple(best), tuple(high))

    @offer
    class ITimingCache(Named):
        def __init__(self, kernels: set[str], version: str) -> None:
            self._kernels, self._version = kernels, version

        def combine(self, other: Any, ignore_mismatch: bool) -> bool:
            self._kernels |= other._kernels
            return True

        def serialize(self) -> bytes:
            return pickle.dumps((sorted(self._kernels), self._version))

    @offer
    class IBuilderConfig(Named):
        def __init__(self) -> None:
            self._flags = {flags.TF32}
            self._cache: Any = None
            self._pools: dict[Any, int] = {}
            self._profiles: list[Any] = []
            self.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY
            self.default_device_type = trt.DeviceType.GPU
            self.DLA_core = -1
            if major > 8 or world.minor > 5:
                self.builder_optimization_level = 3
                self.hardware_compatibility_level = trt.HardwareCompatibilityLevel.NONE
            if "IBuilderConfig.progress_monitor" in names:
                self.progress_monitor = None
            self._sources = (1 << 10) - 1
            self._capabilities: list[str] = []

        def set_compute_capability(self, capability: Any, index: int) -> bool:
            assert capability in trt.ComputeCapability
            assert 0 <= index < self.num_compute_capabilities
            self._capabilities.append(capability.name)
            return True

        def set_flag(self, flag: Any) -> None:
            assert flag in flags
            self._flags.add(flag)

        def clear_flag(self, flag: Any) -> None:
            self._flags.discard(flag)

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            if not 0 < size <= cuda.total:
                raise RuleBroken(f"a pool of {size} bytes on a GPU of {cuda.total}")
            self._pools[pool] = size

        def add_optimization_profile(self, profile: Any) -> int:
            self._profiles.append(profile)
            return len(self._profiles) - 1

        def create_timing_cache(self, data: bytes) -> Any:
            try:
                kernels, version = pickle.loads(bytes(data)) if data else ([], trt.__version__)
            except Exception:
                return None
            return ITimingCache(set(kernels), version)

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            if cache._version != trt.__version__ and not ignore_mismatch:
                return False
            self._cache = cache
            return True

        def get_tactic_sources(self) -> int:
            return self._sources

        def set_tactic_sources(self, sources: int) -> bool:
            self._sources = sources
            return True

    @offer
    class Builder(Named):
        def __init__(self, logger: Any) -> None:
            self._logger = world.attached(logger)

        platform_has_fast_int8 = property(lambda self: trouble.fast_int8)
        platform_has_fast_fp16 = property(lambda self: True)
        num_DLA_cores = property(lambda self: trouble.dla_cores)

        def create_network(self, flags: int = 0) -> Any:
            return INetworkDefinition(flags)

        def create_builder_config(self) -> Any:
            return IBuilderConfig()

        def create_optimization_profile(self) -> Any:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
            trt.built.append((network, config))
            why = self._wrong(network, config)
            if why or trouble.no_reason:
                if why:
                    world.error(self._logger, why)
                return None
            if not self._progressed(config):
                return None
            if config._cache is not None:
                config._cache._kernels |= {f"{n.op_type}:{n.output[0]}" for n in network._model.graph.node}
            plan = _plan(network, config)
            if trouble.rtx:
                self._logger.log(trt.Logger.VERBOSE, _listing(pickle.loads(plan[4:])["layers"]))
            return plan

        def _wrong(self, network: Any, config: Any) -> str:
            if network._model is None or network._parser() is None:
                raise RuleBroken("the parser, which holds the weights, is gone before the engine is built")
            if trouble.out_of_memory:
                return "10: [optimizer.cpp] Error Code 10: OutOfMemory (no further information)"
            weak_flags = {f for f in config._flags if f.name in ("FP16", "INT8", "BF16", "FP8")}
            if network._strong and weak_flags:
                return "3: [network.cpp] !mIsStronglyTyped: precision flags are set in a strongly typed network"
            qdq = any(node.op_type in QDQ for node in network._model.graph.node)
            int8 = any(f.name == "INT8" for f in config._flags)
            if qdq and not network._strong and not int8:
                return "4: Int8 precision has been set for a layer or layer output, but int8 is not configured"
            ranged = all(t._range for t in network._inputs) and any(t._range for t in network._outputs)
            if int8 and not qdq and not ranged and len(network._inputs) and config.DLA_core < 0:
                return "4: Calibration failure: no scales"
            for tensor in network._inputs:
                if -1 in tensor._shape and not all(tensor._name in p._shapes for p in config._profiles or [{}]):
                    return f"4: {tensor._name} has dynamic shapes and no optimization profile has been defined"
                if -1 in tensor._shape and config.default_device_type == trt.DeviceType.DLA:
                    return "4: DLA Layer does not support dynamic shapes in any dimension."
            return ""

        def _progressed(self, config: Any) -> bool:
            monitor = getattr(config, "progress_monitor", None)
            if monitor is None:
                return True
            monitor.phase_start("Building Engine", None, 2)
            for step in range(2):
                monitor.phase_start("Tactics", "Building Engine", 2)
                alive = all(monitor.step_complete("Tactics", i) for i in range(2))
                monitor.phase_finish("Tactics")
                if not alive or not monitor.step_complete("Building Engine", step):
                    return False
            monitor.phase_finish("Building Engine")
            return True

    def _plan(network: Any, config: Any) -> bytes:
        model: onnx.ModelProto = network._model
        flag_names = {f.name for f in config._flags}
        linear = 1 << int(trt.TensorFormat.LINEAR)
        stripped = "STRIP_PLAN" in flag_names
        given = onnx.ModelProto()
        given.CopyFrom(model)
        for constant in given.graph.initializer if stripped else ():
            if math.prod(constant.dims) > 1:
                blank = np.zeros_like(numpy_helper.to_array(constant))
                constant.CopyFrom(numpy_helper.from_array(blank, constant.name))
        content = {
            "version": trt.__version__,
            "compatible": "VERSION_COMPATIBLE" in flag_names,
            "hardware": level.name if (level := getattr(config, "hardware_compatibility_level", None)) else "NONE",
            "sm": cuda.sm,
            "capabilities": config._capabilities,
            "model": given.SerializeToString(),
            "linear": [t._name for t in (*network._inputs, *network._outputs) if t.allowed_formats == linear],
            "dtypes": {t._name: t._dtype.name for t in (*network._inputs, *network._outputs)},
            "static": {t._name: t._shape for t in network._inputs},
            "profiles": [p._shapes for p in config._profiles],
            "detailed": config.profiling_verbosity.name == "DETAILED",
            "layers": _layers(model, flag_names, network, config),
            "stripped": stripped,
        }
        return b"ftrt" + pickle.dumps(content)

    def _listing(layers: list[dict[str, Any]]) -> str:
        """The builder's own list, in the words of TensorRT-RTX 1.7.1."""
        rows = ["Layers:"]
        for layer in layers:
            inputs = ", ".join(
                f"{{ Name: {tensor['Name']}, Dimensions: [1], Strides: [1], StrideOrder: [0], "
                f"Datatype: {tensor.get('Datatype') or tensor['Format/Datatype']}, "
                "Format: (Linear) Row major linear format }"
                for tensor in layer["Inputs"]
            )
            kind = "correlation" if layer["LayerType"] == "CaskConvolution" else layer["LayerType"]
            rows.append(
                f"Name: {layer['Name']}, LayerType: {kind}, Inputs: [ {inputs}], Constants: [], Outputs: [], "
                "TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: "
            )
        return "\n".join(rows)

    def _layers(model: onnx.ModelProto, flag_names: set[str], network: Any, config: Any) -> list[dict[str, Any]]:
        """What the inspector will say, in the words of the version."""
        maker = {name: node for node in model.graph.node for name in node.output}
        stored = {c.name: c.data_type for c in model.graph.initializer}
        half = "FP16" in flag_names and not trouble.ignores_fp16
        words = {
            "Half": "Channel major FP16 format where channel % 8 == 0",
            "Float": "Row major linear FP32",
            "Int8": "Row major Int8 format",
        }
        on_dla = config.default_device_type.name == "DLA"
        tensors = [*network._inputs, *(t for layer in network._layers for t in layer._outputs)]
        reach = {t._name for t in tensors if t._range}
        found: list[dict[str, Any]] = [{"Name": "reformat", "LayerType": "Reformat", "Inputs": [], "Outputs": []}]
        for node in model.graph.node:
            if node.op_type not in ("Conv", "Gemm", "MatMul"):
                found.append(
                    {
                        "Name": node.name,
                        "LayerType": "PointWiseV2" if major >= 10 else "NoOp",
                        "Inputs": [],
                        "Outputs": [],
                    }
                )
                continue
            made = [maker[name].op_type if name in maker else "" for name in node.input[:2]]
            ranged = node.input[0] in reach
            if made == ["DequantizeLinear"] * 2 or (on_dla and ranged):
                precision = "Int8"
            elif half or stored.get(node.input[1]) == TensorProto.FLOAT16:
                precision = "Half"
            else:
                precision = "Float"
            layer = {"Name": node.name, "Inputs": [{"Name": node.input[0]}], "Outputs": []}
            if major >= 11:  # one compiler for all layers; in this version's words it is not proved
                layer["Inputs"] = [
                    {"Name": node.input[0], "Datatype": precision, "Format": "(NHWC) Channel major format"}
                ]
                layer |= {"LayerType": "correlation" if node.op_type == "Conv" else "gemm"}
                layer |= {"TacticName": "__myelin_CASK_STUB", "Metadata": f"[ONNX Layer: {node.name}]"}
                found.append(layer)
                continue
            layer["Inputs"][0]["Format/Datatype"] = words[precision]
            if node.op_type == "Conv":
                layer |= {"LayerType": "CaskConvolution", "ParameterType": "Convolution"}
                layer |= {"Weights": {"Type": precision, "Count": 9}}
            elif major >= 10:
                layer["Inputs"][0]["Format/Datatype"] = precision
                layer |= {"LayerType": "gemm", "TacticName": "sm80_xmma_gemm"}
            else:  # a convolution of 1x1
                layer |= {"LayerType": "CaskGemmConvolution", "ParameterType": "Convolution"}
                layer |= {"Weights": {"Type": precision, "Count": 9}, "TacticName": "sm80_xmma_gemm"}
            found.append(layer)
        others = range(1, len(config._profiles)) if major < 10 else ()
        return found + [_of_profile(layer, i) for i in others for layer in found]
