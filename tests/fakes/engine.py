"""The half of the fake TensorRT that runs engines."""

from __future__ import annotations

import json
import math
import pickle
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from fakes.cuda import Cuda, RuleBroken
from fakes.names import Named, shapes_of

if TYPE_CHECKING:
    from fakes.tensorrt import World

NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8}


def offer_engine(world: World) -> None:
    """Runtimes, engines, contexts, inspectors and refitters."""
    trt, cuda, trouble, offer = world.trt, world.cuda, world.trouble, world.offer
    types_ = trt.DataType

    @offer
    class EngineInspector(Named):
        def __init__(self, engine: Any) -> None:
            self._engine = engine
            self.execution_context = None

        def get_engine_information(self, format: Any) -> str:
            assert format is trt.LayerInformationFormat.JSON
            content = self._engine._content
            if trouble.damaged_information:
                return '{"Layers": ['
            if not content["detailed"]:
                return json.dumps({"Layers": [layer["Name"] for layer in content["layers"]]})
            layers = json.loads(json.dumps(content["layers"]))
            for layer in layers if trouble.opaque_layers else ():
                layer |= {"LayerType": "Myelin", "ParameterType": "", "Weights": None}
            for tensor in (t for layer in layers for t in layer["Inputs"] if self.execution_context is None):
                tensor.pop("Datatype", None)
                tensor["Format/Datatype"] = "N/A due to dynamic shapes"
            return json.dumps({"Layers": layers, "Bindings": []})

    @offer
    class Runtime(Named):
        def __init__(self, logger: Any) -> None:
            if trouble.cannot_start:
                raise RuleBroken("a runtime is made where CUDA does not start: it crashes the interpreter")
            self._logger = world.attached(logger)
            self._allowed = False
            self.DLA_core = -1

        def _allow(self, allowed: bool) -> None:
            self._allowed = allowed

        engine_host_code_allowed = property(lambda self: self._allowed, _allow)

        def deserialize_cuda_engine(self, data: bytes) -> Any:
            try:
                content = pickle.loads(bytes(data)[4:])
            except Exception:
                world.error(self._logger, "1: [stdArchiveReader.cpp] Serialization assertion magicTagRead failed.")
                return None
            if content["version"] != trt.__version__ and not (content["compatible"] and self._allowed):
                world.error(self._logger, "6: The engine plan file is not compatible with this version of TensorRT")
                return None
            if trouble.rtx:
                here = "SM{}{}".format(*cuda.sm)
                if not (cuda.driver and cuda.count) or here not in (content["capabilities"] or [here]):
                    world.error(self._logger, "Cuda Runtime (cudaError 35)")
                    return None
            elif content["sm"] != cuda.sm and content["hardware"] == "NONE":
                world.error(self._logger, "6: The engine plan file is generated on an incompatible device")
                return None
            return ICudaEngine(content)

    @offer
    class ICudaEngine(Named):
        def __init__(self, content: dict[str, Any]) -> None:
            self._content = content
            self._model = onnx.load_from_string(content["model"])
            self._shapes = {**shapes_of(self._model), **content["static"]}
            self._weights = not content["stripped"]
            self._scratch = 512 * len(self._model.graph.node)
            self._session: Any = None
            self._used: dict[int, Any] = {}  # profile to the context that has it
            self._ran: list[int] = []  # profiles, in the order of their first runs and of every return

        num_io_tensors = property(lambda self: len(self._shapes))
        device_memory_size = property(lambda self: self._scratch)
        device_memory_size_v2 = property(lambda self: self._scratch)
        num_optimization_profiles = property(lambda self: max(len(self._content["profiles"]), 1))

        def get_tensor_name(self, index: int) -> str:
            return list(self._shapes)[index]

        def get_tensor_mode(self, name: str) -> Any:
            mode: Any = trt.TensorIOMode
            return mode.INPUT if name in {i.name for i in self._model.graph.input} else mode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            return types_[self._content["dtypes"][name]]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return self._shapes[name]

        def get_tensor_format(self, name: str) -> Any:
            linear = name in self._content["linear"] and name != trouble.padded
            return trt.TensorFormat.LINEAR if linear else trt.TensorFormat.CHW32

        def get_tensor_format_desc(self, name: str) -> str:
            if name == trouble.padded:
                return "Channel major FP16 format where channel % 32 == 0"
            return "Row major linear " + {"FLOAT": "FP32", "HALF": "FP16 format"}[self._content["dtypes"][name]]

        def get_tensor_components_per_element(self, name: str) -> int:
            return 1

        def create_engine_inspector(self) -> Any:
            return EngineInspector(self)

        def create_execution_context(self, strategy: Any = None) -> Any:
            kinds: Any = trt.ExecutionContextAllocationStrategy
            assert strategy is kinds.USER_MANAGED
            return IExecutionContext(self)

        def create_execution_context_without_device_memory(self) -> Any:
            return IExecutionContext(self)

        def _run(self, feeds: dict[str, Any]) -> dict[str, Any]:
            if not self._weights:
                raise RuleBroken("an engine without weights is run before it was refitted")
            if self._session is None:
                options = onnxruntime.SessionOptions()
                options.log_severity_level, options.intra_op_num_threads = 3, 1
                options.add_session_config_entry("session.disable_quant_qdq", "1")  # it fuses what 16 bits have not
                data = self._model.SerializeToString()
                self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
            wanted = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
            inputs = {i.name: feeds[i.name].astype(wanted[i.type]) for i in self._session.get_inputs()}
            outputs = [o.name for o in self._session.get_outputs()]
            return dict(zip(outputs, self._session.run(outputs, inputs)))

    @offer
    class IExecutionContext(Named):
        def __init__(self, engine: Any) -> None:
            self._engine, self._profile, self._memory = engine, -1, (0, 0)
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._has_run = False
            self._switched_at = -1
            if not engine._used:
                self._take(0)

        def _take(self, profile: int) -> bool:
            if self._engine._used.get(profile, lambda: None)() not in (None, self):
                return False
            self._engine._used.pop(self._profile, None)
            self._engine._used[profile] = weakref.ref(self)
            self._profile = profile
            return True

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            cuda.alive(stream_handle)
            self._switched_at = cuda.syncs
            return profile_index < self._engine.num_optimization_profiles and self._take(profile_index)

        def set_input_shape(self, name: str, shape: Any) -> bool:
            if self._switched_at == cuda.syncs:
                raise RuleBroken("a context is used before its change of profile was synchronised")
            shape = tuple(shape)
            assert all(type(d) is int for d in shape)
            profiles = self._engine._content["profiles"]
            low, _, high = profiles[self._profile][name] if profiles else [self._engine._shapes[name]] * 3
            if not all(a <= d <= b for a, d, b in zip(low, shape, high)):
                return False
            self._shapes[name], self._has_run = shape, False
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            if name in self._shapes:
                return self._shapes[name]
            batch = next(iter(self._shapes.values()))[0]
            return tuple(batch if d == -1 else d for d in self._engine._shapes[name])

        def _set_memory(self, address: int) -> None:
            cuda.bytes_at(address, self._engine._scratch)
            self._memory = (address, self._engine._scratch)

        device_memory = property(None, _set_memory)

        def set_device_memory(self, memory: int, size: int) -> None:
            if size < self._engine._scratch:
                raise RuleBroken("too little device memory for the context")
            cuda.bytes_at(memory, size)
            self._memory = (memory, self._engine._scratch)

        def set_tensor_address(self, name: str, memory: int) -> bool:
            assert type(memory) is int
            cuda.bytes_at(memory, 1)
            self._addresses[name] = memory
            return name in self._engine._shapes

        def execute_async_v3(self, stream_handle: int) -> bool:
            if trouble.cannot_run:
                return False
            if cuda.capturing is not None and not self._has_run:
                cuda.invalid = True
                return False
            engine = self._engine
            missing = set(engine._shapes) - set(self._addresses)
            if missing or not self._memory[0] or self._profile < 0:
                raise RuleBroken(f"a context is run without memory, profile or the addresses of {missing}")
            cuda.plain += cuda.capturing is None
            self._has_run = True
            spans = {}
            for name, address in self._addresses.items():
                dtype = np.dtype(NUMPY[engine._content["dtypes"][name]])
                shape = self.get_tensor_shape(name)
                spans[name] = (address, math.prod(shape) * dtype.itemsize, dtype, shape)
                cuda.bytes_at(*spans[name][:2])
            me, memory, profile = weakref.ref(self), self._memory, self._profile

            def act() -> None:
                if me() is None:
                    raise RuleBroken("a context is gone before its work is done")
                cuda.runs += 1
                cuda.bytes_at(*memory).fill(0xFF)
                inputs = [i.name for i in engine._model.graph.input]
                feeds = {n: _read(cuda, spans[n]) for n in inputs}
                wrong = profile == trouble.wrong_profile or (trouble.forgets and profile in engine._ran[:-1])
                engine._ran += [profile] if engine._ran[-1:] != [profile] else []
                for name, value in engine._run(feeds).items():
                    value = np.roll(value, 1, axis=1) if wrong and value.ndim == 2 else value
                    address, size, dtype, shape = spans[name]
                    assert value.shape == shape
                    cuda.bytes_at(address, size)[:] = np.frombuffer(value.astype(dtype).tobytes(), np.uint8)

            cuda.enqueue(act, stream_handle, memory[0], *(span[0] for span in spans.values()))
            return True

    @offer
    class Refitter(Named):
        def __init__(self, engine: Any, logger: Any) -> None:
            self._engine, self._model = engine, None

        def refit_cuda_engine(self) -> bool:
            if self._model is None:
                return False
            self._engine._model, self._engine._weights = self._model, True
            return True

    @offer
    class OnnxParserRefitter(Named):
        def __init__(self, refitter: Any, logger: Any) -> None:
            self._refitter = refitter

        def refit_from_bytes(self, data: bytes) -> bool:
            model = onnx.load_model_from_string(data)
            if shapes_of(model) != shapes_of(self._refitter._engine._model):
                return False
            self._refitter._model = model
            return True


def _read(cuda: Cuda, span: tuple[int, int, Any, tuple[int, ...]]) -> Any:
    address, size, dtype, shape = span
    return np.frombuffer(cuda.bytes_at(address, size).tobytes(), dtype).reshape(shape)
