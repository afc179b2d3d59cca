"""The cascade of one image as one launch, which the GPU itself ends early.

A CUDA graph holds each stage as a child graph that ends in a small kernel. The kernel computes probabilities and
confidence as `policy.decide` does, and sets the condition of the IF node that holds all later stages. So the
host uploads an image, launches, and downloads the prediction. Batches have no such form: their images need different
depths.

Measured on an H100 with TensorRT 8.6 (benchmarks/results/gpu): the bodies accept the work that TensorRT enqueues, and
predictions equal the host's. Without early exit it takes 0.88 of the host's time; where most images take the first
exit, it gains nothing.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.backends.cuda.base import Graph
from edgekd.backends.cuda.cuda_python import Bindings, CudaPython, load
from edgekd.backends.cuda.device import device
from edgekd.backends.tensorrt.library import parse_version
from edgekd.backends.tensorrt.runner import TensorRTRunner, enqueue, staged_runner
from edgekd.confidence import CONFIDENCE_MEASURES
from edgekd.errors import BackendError
from edgekd.policy import Policy

NEEDED = (12, 4)
"""The first version of CUDA with conditional nodes."""
SHIPPED = Path(__file__).parent / "ptx"
"""PTX of the built-in confidence measures, compiled by NVRTC, in a version that the drivers of CUDA 12.4 accept."""
SOURCE = r"""
extern "C" __device__ void cudaGraphSetConditional(unsigned long long handle, unsigned int value);

// result: confidence, exit, then a probability a class. total: the sum of the probabilities of the exits so far.
extern "C" __global__ void decide(
    const float* logits, float* total, float* result, int classes, int exit, float temperature, float threshold,
    int mean, unsigned long long handle)
{
    float largest = logits[0] / temperature, sum = 0;
    #pragma unroll 1
    for (int i = 1; i < classes; ++i) largest = fmaxf(largest, logits[i] / temperature);
    #pragma unroll 1
    for (int i = 0; i < classes; ++i) sum += expf(logits[i] / temperature - largest);
    float first = 0, second = 0, negative_entropy = 0;
    #pragma unroll 1
    for (int i = 0; i < classes; ++i) {
        float p = expf(logits[i] / temperature - largest) / sum;
        if (mean) {
            total[i] = exit ? total[i] + p : p;
            p = total[i] / (exit + 1);
        }
        result[2 + i] = p;
        second = fmaxf(second, fminf(first, p));
        first = fmaxf(first, p);
        negative_entropy += p * logf(fmaxf(p, 1.17549435e-38f));
    }
    float confidence = CONFIDENCE;
    result[0] = confidence;
    result[1] = exit;
    if (handle) cudaGraphSetConditional(handle, confidence < threshold);
}
"""
"""The kernel; the confidence measure's CUDA expression takes the place of CONFIDENCE."""
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
ARGUMENTS = (_POINTER, _POINTER, _POINTER, _INT, _INT, _FLOAT, _FLOAT, _INT, ctypes.c_uint64)
"""Types of the kernel's arguments."""


class DeviceCascade:
    """Maps one image (1, 3, H, W) to its probabilities (C,), confidence and exit, in one launch.

    Args:
        stages: Runners of the stages.
        policy: Exit policy.

    Raises:
        BackendError: CUDA or its bindings are too old, or a stage cannot be captured.
    """

    def __init__(self, stages: Sequence[TensorRTRunner], policy: Policy) -> None:
        with device() as gpu:
            self._gpu = _able(gpu)
            staged_runner(stages)  # links them
            self._stages, self._policy = stages, policy
            self._images = stages[0].tensors["images"]
            self._classes = math.prod(stages[0].tensors[stages[0].logits[0]].shape)
            self._result = gpu.allocate(4 * (2 + self._classes))
            self._total = gpu.allocate(4 * self._classes)
            self._host = gpu.pinned((2 + self._classes,), np.float32)
            self._kernel = _compiled(self._gpu, policy)
            self._scratch = gpu.scratch
            self._scratch.reserve(self, 0)  # the stages ask for what they need
            self._graph: Graph | None = self._built()

    def __call__(self, image: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], float, int]:
        with self._gpu as gpu:
            self._stages[0].fits("images", image)
            self._graph = self._graph or self._built()
            self._images.put(image)
            gpu.launch(self._graph)
            gpu.download(self._host, self._result.address)
            gpu.synchronize()
            return self._host[2:].copy(), float(self._host[0]), int(self._host[1])

    def scratch_moved(self) -> None:
        """Build the graph anew when it is next used; see `edgekd.backends.cuda.scratch`."""
        self._graph = None

    def _built(self) -> Graph:
        self._contexts = [stage.prepared(1) for stage in self._stages]
        for stage, context in zip(self._stages, self._contexts):  # the first run cannot be captured
            enqueue(context, library=stage.library, name=stage.name)
        self._gpu.synchronize()
        root = self._gpu.do(self._gpu.runtime.cudaGraphCreate(0))
        try:
            self._add(root, 0)
        except BaseException:
            self._gpu.runtime.cudaGraphDestroy(root)
            raise
        return self._gpu.launchable(root)

    def _add(self, graph: Any, exit: int) -> None:
        """Add a stage with its decision and, on condition, the stage after it."""
        runtime, do = self._gpu.runtime, self._gpu.do
        is_last = exit == len(self._stages) - 1
        handle = 0 if is_last else do(runtime.cudaGraphConditionalHandleCreate(graph, 0, 0))
        stage = self._gpu.record(lambda: self._stage(exit, int(handle)))
        try:
            node = do(runtime.cudaGraphAddChildGraphNode(graph, [], 0, stage))
        finally:
            runtime.cudaGraphDestroy(stage)  # the node has a copy
        if not is_last:
            self._add(self._body(graph, node, handle), exit + 1)

    def _body(self, graph: Any, node: Any, handle: Any) -> Any:
        """Add an IF node after a node and return the graph inside it."""
        runtime = self._gpu.runtime
        parameters = runtime.cudaGraphNodeParams()
        parameters.type = runtime.cudaGraphNodeType.cudaGraphNodeTypeConditional
        parameters.conditional.handle = handle
        parameters.conditional.type = runtime.cudaGraphConditionalNodeType.cudaGraphCondTypeIf
        parameters.conditional.size = 1
        edges = (None,) if parse_version(self._gpu.cuda["runtime"]) >= (13, 0) else ()  # data of the edges, new in 13
        self._gpu.do(runtime.cudaGraphAddNode(graph, [node], *edges, 1, parameters))
        return parameters.conditional.phGraph_out[0]

    def _stage(self, exit: int, handle: int) -> None:
        stage, policy = self._stages[exit], self._policy
        enqueue(self._contexts[exit], library=stage.library, name=stage.name)
        values = (
            stage.tensors[stage.logits[0]].address,
            self._total.address,
            self._result.address,
            self._classes,
            exit,
            policy.temperatures[exit],
            policy.thresholds[exit] if handle else 0.0,
            int(policy.average == "mean"),
            handle,
        )
        self._gpu.do(_driver().cuLaunchKernel(self._kernel, *[1] * 6, 0, self._gpu.stream, (values, ARGUMENTS), 0))


def _able(gpu: Any) -> CudaPython:
    if not isinstance(gpu, CudaPython):
        raise BackendError(f"{gpu.bindings} has no conditional graph nodes", fix="pip install cuda-python")
    for part, text in gpu.cuda.items():
        if parse_version(text) < NEEDED:
            what = f"deciding on the device needs CUDA 12.4; the {part} here is {text}"
            raise BackendError(what, fix="omit --device-side-exit")
    return gpu


def _driver() -> Any:
    return Bindings(load("driver"))


def source(policy: Policy) -> str:
    """Return the kernel's CUDA source for the policy's confidence measure.

    Raises:
        BackendError: The measure has no CUDA expression.
    """
    expression = CONFIDENCE_MEASURES[policy.confidence].cuda
    if expression is None:
        what = f"the confidence measure '{policy.confidence}' has no CUDA form, so the device cannot decide by it"
        raise BackendError(what, fix="omit --device-side-exit, or tune with another --confidence")
    return SOURCE.replace("CONFIDENCE", expression)


def _compiled(gpu: CudaPython, policy: Policy) -> Any:
    """Load the kernel on this GPU; the driver compiles the PTX."""
    shipped, driver = SHIPPED / f"{policy.confidence}.ptx", _driver()
    text = shipped.read_bytes() if shipped.is_file() else ptx(source(policy), gpu.sm)
    module = gpu.do(driver.cuModuleLoadData(text + b"\0"), fix="update NVIDIA's driver, or omit --device-side-exit")
    return gpu.do(driver.cuModuleGetFunction(module, b"decide"))


def ptx(source: str, sm: str) -> bytes:
    """Compile the kernel; this needs no GPU.

    Args:
        source: CUDA source (see `source`).
        sm: Compute capability, such as "8.7".

    Returns:
        The PTX.

    Raises:
        BackendError: NVRTC is missing, or compilation fails; with NVRTC's log.
    """
    nvrtc = load("nvrtc")
    try:
        _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"decide.cu", 0, [], [])
    except RuntimeError as error:  # the bindings do not bring the library
        raise BackendError(
            f"a confidence measure of another package needs NVRTC to run on the device: {error}",
            fix="pip install nvidia-cuda-nvrtc, or omit --device-side-exit",
        ) from error
    options = [f"--gpu-architecture=compute_{sm.replace('.', '')}".encode(), b"--relocatable-device-code=true"]
    (failure,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(failure):
        log = b" " * nvrtc.nvrtcGetProgramLogSize(program)[1]
        nvrtc.nvrtcGetProgramLog(program, log)
        raise BackendError(f"NVRTC cannot compile the decision: {log.decode()}", fix="omit --device-side-exit")
    code: bytes = b" " * nvrtc.nvrtcGetPTXSize(program)[1]
    nvrtc.nvrtcGetPTX(program, code)
    return code
