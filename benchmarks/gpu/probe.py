"""Checks edgekd's CUDA layer without TensorRT, and measures the cost of launching, waiting and copying.

    python benchmarks/gpu/probe.py OUT.json [--seconds 0.3]

Needs an NVIDIA GPU, cuda-python and numpy; NVRTC for the sections with kernels. A section that fails records its
traceback, and the next one runs; OUT.json is written after each. Times are in µs on the host's clock.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from edgekd.backends.cuda.cuda_python import CudaPython
from edgekd.backends.cuda.device import device
from edgekd.backends.tensorrt.device_exit import DeviceCascade
from edgekd.errors import BackendError
from edgekd.files import atomic_write
from edgekd.policy import NEVER_EXIT, Policy, decide
from edgekd.serialization import to_json

KERNELS = rb"""
extern "C" __device__ void cudaGraphSetConditional(unsigned long long handle, unsigned int value);
extern "C" __global__ void busy(unsigned long long cycles)
{
    for (long long end = clock64() + cycles; clock64() < end;);
}
extern "C" __global__ void write_word(volatile unsigned int* word, unsigned int* count)
{
    unsigned int next = *count + 1;
    *count = next;
    __threadfence_system();
    *word = next;
}
extern "C" __global__ void count(unsigned int* counter, unsigned int limit, unsigned long long handle)
{
    unsigned int next = *counter + 1;
    *counter = next;
    if (handle) cudaGraphSetConditional(handle, next < limit);
}
"""
WAITS = {"auto": 0, "spin": 1, "yield": 2, "block": 4}
"""cudaDeviceSchedule…, the same since CUDA 4."""
CLASSES, STAGES = 5, 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=0.3, help="duration of each measurement")
    parser.add_argument("--wait", choices=WAITS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sections: dict[str, Callable[[argparse.Namespace], Any]] = {"here": here, "layer": layer, "kernels": kernels}
    sections |= {"launch": launch, "copies": copies, "cascade": cascade}
    sections |= {"condition in a child graph": child_condition, "condition in the same graph": same_condition}
    sections |= {"waits": waits, "polling": polling}
    if args.wait:
        sections = {"wait": wait}
    found: dict[str, Any] = {}
    for name, section in sections.items():
        began = time.perf_counter()
        try:
            found[name] = section(args)
        except Exception:
            found[name] = {"failed": traceback.format_exc()}
            sys.stderr.write(f"{name}: {traceback.format_exc()}")
        sys.stderr.write(f"{name}: {time.perf_counter() - began:.1f} s\n")
        atomic_write(args.out, to_json(found))
    sys.stdout.write(json.dumps(found, indent=1)[:6000] + "\n")
    return 0


def gpu_here() -> CudaPython:
    gpu = device()
    if not isinstance(gpu, CudaPython):
        raise BackendError(f"{gpu.bindings} cannot be measured here", fix="pip install cuda-python")
    return gpu


def timed(
    work: Callable[[], object], *, seconds: float, after: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Time `work`, in µs: percentiles and number of samples. `after` is not timed; the first tenth is warm-up."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < 30:
        start = time.perf_counter_ns()
        work()
        found.append((time.perf_counter_ns() - start) / 1e3)
        after()
    found = found[len(found) // 10 :]
    low, *_, high = statistics.quantiles(found, n=10)
    return {"p50": statistics.median(found), "p10": low, "p90": high, "n": len(found)}


def here(args: argparse.Namespace) -> dict[str, Any]:
    """Describe the machine, GPU, driver and bindings."""
    gpu = gpu_here()
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,pstate,pci.bus_id"
    smi = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True, check=False
    )
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "gpu": gpu.name,
        "sm": gpu.sm,
        "cuda": gpu.cuda,
        "free_bytes": gpu.free_bytes(),
        "bindings": metadata.version("cuda-bindings"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpu": cpus[0].partition(":")[2].strip(),
        "cpus": len(cpus),
        "nvidia_smi": smi.stdout.splitlines(),
    }


def layer(args: argparse.Namespace) -> dict[str, Any]:
    """Check every method of edgekd's CudaDevice."""
    size, rng = 1 << 20, np.random.default_rng(0)
    with gpu_here() as gpu:
        free = gpu.free_bytes()
        memory, other = gpu.allocate(size), gpu.allocate(size)
        host, back = gpu.pinned((size,), np.uint8), gpu.pinned((size,), np.uint8)
        gpu.download(back, memory.address)
        gpu.synchronize()
        zeroed = not back.any()
        host[:] = rng.integers(0, 256, size, np.uint8)

        def round_trip() -> None:
            gpu.upload(memory.address, host)
            gpu.move(other.address, memory.address, size)
            gpu.download(back, other.address)

        round_trip()
        gpu.synchronize()
        copied = bool((host == back).all())
        graph = gpu.capture(round_trip)
        host[:] = rng.integers(0, 256, size, np.uint8)
        gpu.launch(graph)
        gpu.synchronize()
        replayed = bool((host == back).all())
        refused = _refusal(lambda: gpu.capture(lambda: gpu.free_bytes() and gpu.synchronize()))
        again = gpu.capture(round_trip)  # the stream is usable after a failed capture
        host[:] = 7
        gpu.launch(again)
        gpu.synchronize()
        too_much = _refusal(lambda: gpu.allocate(1 << 44))
        gpu.launch(again)  # and the device after a failed allocation
        gpu.synchronize()
        took = free - gpu.free_bytes()
    return {
        "zeroed": zeroed,
        "copied": copied,
        "replayed": replayed,
        "after_a_failed_capture": bool((back == 7).all()),
        "capture_refused": refused,
        "too_much_memory": too_much,
        "took_bytes": took,
    }


def _refusal(work: Callable[[], object]) -> str:
    try:
        work()
    except BackendError as error:
        return str(error)
    return "not refused"


_loaded: dict[bytes, Any] = {}


def kernel(name: bytes) -> Any:
    """Compile KERNELS with NVRTC once, and return one of them."""
    gpu, driver, nvrtc = gpu_here(), *(importlib.import_module(f"cuda.bindings.{n}") for n in ("driver", "nvrtc"))
    if not _loaded:
        _, program = nvrtc.nvrtcCreateProgram(KERNELS, b"probe.cu", 0, [], [])
        options = [f"--gpu-architecture=compute_{gpu.sm.replace('.', '')}".encode(), b"--relocatable-device-code=true"]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(error):
            message = b" " * nvrtc.nvrtcGetProgramLogSize(program)[1]
            nvrtc.nvrtcGetProgramLog(program, message)
            raise RuntimeError(message.decode())
        code = b" " * nvrtc.nvrtcGetPTXSize(program)[1]
        nvrtc.nvrtcGetPTX(program, code)
        module = gpu.do(driver.cuModuleLoadData(code))
        for each in (b"busy", b"write_word", b"count"):
            _loaded[each] = gpu.do(driver.cuModuleGetFunction(module, each))
    return _loaded[name]


def enqueue(name: bytes, *values: Any, kinds: tuple[Any, ...]) -> None:
    """Launch one thread of a kernel."""
    driver, gpu = importlib.import_module("cuda.bindings.driver"), gpu_here()
    gpu.do(driver.cuLaunchKernel(kernel(name), *[1] * 6, 0, gpu.stream, (values, kinds), 0))


def busy(microseconds: float) -> None:
    """Keep the GPU busy for this long at a clock of 1.7 GHz."""
    enqueue(b"busy", int(microseconds * 1700), kinds=(ctypes.c_uint64,))


def kernels(args: argparse.Namespace) -> dict[str, Any]:
    """Time the launch of an empty kernel, and compiling and loading it with NVRTC."""
    start = time.perf_counter()
    with gpu_here() as gpu:
        busy(0)
        gpu.synchronize()
        first = time.perf_counter() - start
        plain = timed(lambda: (busy(0), gpu.synchronize()), seconds=args.seconds)
        enqueued = timed(lambda: busy(0), seconds=args.seconds, after=gpu.synchronize)
    return {"first_s": first, "launch_and_wait": plain, "launch_alone": enqueued}


def launch(args: argparse.Namespace) -> dict[str, Any]:
    """Time graphs of several kernels in sequence: the host's call alone, and with the wait."""
    found = {}
    with gpu_here() as gpu:
        empty = timed(gpu.synchronize, seconds=args.seconds / 3)
        for count in (1, 10, 30, 100):
            graph = gpu.capture(lambda count=count: [busy(0) for _ in range(count)] and None)
            call = timed(lambda graph=graph: gpu.launch(graph), seconds=args.seconds, after=gpu.synchronize)
            both = timed(lambda graph=graph: (gpu.launch(graph), gpu.synchronize()), seconds=args.seconds)
            found[f"{count} kernels"] = {"call": call, "call_and_wait": both}
        logits, memory = gpu.pinned((1, CLASSES), np.float32), gpu.allocate(64)

        def run() -> None:
            busy(0)
            gpu.download(logits, memory.address)

        graph = gpu.capture(run)
        ways = {"in a graph": lambda: gpu.launch(graph), "without a graph": run}
        for name, work in ways.items():
            waited = timed(lambda work=work: (work(), gpu.synchronize()), seconds=args.seconds)
            found[f"1 kernel and its logits to the host, {name}"] = waited
    return {"nothing_to_wait_for": empty, **found}


def copies(args: argparse.Namespace) -> dict[str, Any]:
    """Time the copy of a 224-pixel image, as float32 and as bytes: into pinned memory, to the GPU, and both."""
    found = {}
    with gpu_here() as gpu:
        for name, dtype in (("float32", np.float32), ("uint8", np.uint8)):
            for batch in (1, 32):
                shape = (batch, 3, 224, 224)
                image, pinned = np.ones(shape, dtype), gpu.pinned(shape, dtype)
                memory = gpu.allocate(pinned.nbytes)
                steps: dict[str, Callable[[], object]] = {
                    "host_copy": lambda pinned=pinned, image=image: pinned.__setitem__(slice(None), image),
                    "upload": lambda pinned=pinned, memory=memory: (
                        gpu.upload(memory.address, pinned),
                        gpu.synchronize(),
                    ),
                }
                steps["both"] = lambda steps=dict(steps): [work() for work in steps.values()]
                found[f"{name} {batch}"] = {k: timed(work, seconds=args.seconds / 2) for k, work in steps.items()}
        # normalisation on the CPU, which passing bytes would save
        pixels, scale = np.ones((224, 224, 3), np.uint8), np.float32(1 / 255)
        chw = np.empty((3, 224, 224), np.float32)

        def normalise() -> None:
            np.multiply(pixels.transpose(2, 0, 1), scale, out=chw)
            np.subtract(chw, np.float32(0.45), out=chw)
            np.divide(chw, np.float32(0.22), out=chw)

        found["normalising on the CPU"] = timed(normalise, seconds=args.seconds / 2)
    return found


def polling(args: argparse.Namespace) -> dict[str, Any]:
    """Compare polling a word in host memory with waiting for a copy, after kernels of 0, 50 and 300 µs."""
    found = {}
    with gpu_here() as gpu:
        runtime = gpu.runtime
        address = int(gpu.do(runtime.cudaHostAlloc(64, runtime.cudaHostAllocMapped)))
        word = ctypes.c_uint32.from_address(address)
        there = int(gpu.do(runtime.cudaHostGetDevicePointer(address, 0)))
        counter, logits = gpu.allocate(64), gpu.pinned((1, CLASSES), np.float32)
        word.value = 0
        expected = 0
        for microseconds in (0, 50, 300):

            def write_word(us: float = microseconds) -> None:
                busy(us)
                enqueue(b"write_word", there, counter.address, kinds=(ctypes.c_void_p, ctypes.c_void_p))

            def fetch(us: float = microseconds) -> None:
                busy(us)
                gpu.download(logits, counter.address + 32)

            writing, fetching = gpu.capture(write_word), gpu.capture(fetch)

            def polled(graph: Any = writing) -> None:
                nonlocal expected
                expected += 1
                gpu.launch(graph)
                while word.value != expected:
                    pass

            def queried(graph: Any = fetching) -> None:
                gpu.launch(graph)
                while int(runtime.cudaStreamQuery(gpu.stream)[0]):
                    pass

            found[f"kernel of {microseconds} us"] = {
                "polled word": timed(polled, seconds=args.seconds, after=gpu.synchronize),
                "copy and cudaStreamQuery": timed(queried, seconds=args.seconds),
                "copy and cudaStreamSynchronize": timed(
                    lambda graph=fetching: (gpu.launch(graph), gpu.synchronize()), seconds=args.seconds
                ),
            }
        gpu.do(runtime.cudaFreeHost(address))
    return found


def waits(args: argparse.Namespace) -> dict[str, Any]:
    """Run `wait` for each scheduling flag in its own process, since CUDA reads the flag at start."""
    found = {}
    for name in WAITS:
        out = args.out.with_suffix(f".{name}.json")
        command = [sys.executable, __file__, str(out), f"--wait={name}", f"--seconds={args.seconds}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        found[name] = json.loads(out.read_text())["wait"] if out.is_file() else {"failed": done.stderr[-2000:]}
        out.unlink(missing_ok=True)
    return found


def wait(args: argparse.Namespace) -> dict[str, Any]:
    """Time a kernel, the copy of its logits and cudaStreamSynchronize, with the share of CPU time."""
    runtime = importlib.import_module("cuda.bindings.runtime")
    os.environ["EDGEKD_CUDA_SCHEDULE"] = "auto"  # edgekd leaves the flags as they are
    (error,) = runtime.cudaSetDeviceFlags(WAITS[args.wait])
    found: dict[str, Any] = {"cudaSetDeviceFlags": int(error)}
    with gpu_here() as gpu:
        logits, memory = gpu.pinned((1, CLASSES), np.float32), gpu.allocate(64)
        for microseconds in (0, 50, 300, 2000):

            def work(us: float = microseconds) -> None:
                busy(us)
                gpu.download(logits, memory.address)

            graph = gpu.capture(work)
            cpu, start = time.thread_time(), time.perf_counter()
            times = timed(lambda graph=graph: (gpu.launch(graph), gpu.synchronize()), seconds=args.seconds)
            times["cpu_share"] = (time.thread_time() - cpu) / (time.perf_counter() - start)
            found[f"kernel of {microseconds} us"] = times
    return found


class Toy:
    """A stand-in for a TensorRT stage that copies given logits."""

    library = None  # which names itself where a run fails

    def __init__(self, name: str, gpu: CudaPython, source: Any) -> None:
        self.name, self._gpu, self._source = name, gpu, source
        self.tensors = {"images": source, f"exit_{name}": _ToyTensor(gpu)}
        self.logits = [f"exit_{name}"]

    def read_from(self, before: Toy) -> None: ...

    def prepared(self, size: int) -> Toy:
        return self

    def fits(self, name: str, x: Any) -> None: ...

    def execute_async_v3(self, stream: int) -> bool:
        row = int(self.name) * 4 * CLASSES
        self._gpu.move(self.tensors[self.logits[0]].address, self._source.address + row, 4 * CLASSES)
        return True


class _ToyTensor:
    shape = (CLASSES,)

    def __init__(self, gpu: CudaPython, rows: int = 1) -> None:
        self._memory = gpu.allocate(4 * CLASSES * rows)
        self.address = self._memory.address
        self._host = gpu.pinned((rows, CLASSES), np.float32)
        self._gpu = gpu

    def put(self, rows: Any) -> None:
        self._host[:] = rows
        self._gpu.upload(self.address, self._host)


def cascade(args: argparse.Namespace) -> dict[str, Any]:
    """Compare edgekd's DeviceCascade on stages that copy logits with the policy in NumPy, and time it."""
    rng, found = np.random.default_rng(1), {}
    policies = {
        "tuned": Policy((0.7, 1.0, 1.9, 1.0), (0.9, 0.7, 0.8)),
        "mean margin": Policy((1.0,) * 4, (0.6, 0.5, 0.4), confidence="margin", average="mean"),
        "mean entropy": Policy((1.0,) * 4, (0.6, 0.5, 0.4), confidence="entropy", average="mean"),
        "never": Policy((1.0,) * 4, (NEVER_EXIT,) * 3),
        "first": Policy((1.0,) * 4, (0.0,) * 3),
    }
    for name, policy in policies.items():
        with gpu_here() as gpu:
            images = _ToyTensor(gpu, STAGES)
            stages = [Toy(str(k), gpu, images) for k in range(STAGES)]
            predict = DeviceCascade(stages, policy)  # type: ignore[arg-type]
        exits, off = [], []
        for logits in rng.normal(size=(200, STAGES, CLASSES)).astype(np.float32) * 3:
            probabilities, confidence, exit = predict(logits)
            total = np.zeros((1, CLASSES), np.float32)
            for k in range(STAGES):
                seen = decide(policy, k, logits[k : k + 1], total)
                total = seen.state
                if seen.exited[0]:
                    break
            exits.append((exit, k))
            off.append(max(abs(confidence - seen.confidence[0]), np.abs(probabilities - seen.probabilities[0]).max()))
        found[name] = {
            "same_exits": float(np.mean([a == b for a, b in exits])),
            "left_at": np.bincount([a for a, _ in exits], minlength=STAGES).tolist(),
            "off_by": float(max(off)),
            "us": timed(lambda logits=logits, predict=predict: predict(logits), seconds=args.seconds),
        }
    return found


def _if(gpu: CudaPython, graph: Any, before: Sequence[Any], handle: Any) -> Any:
    """Add an IF node behind some nodes, and return its body graph."""
    runtime = gpu.runtime
    params = runtime.cudaGraphNodeParams()
    params.type = runtime.cudaGraphNodeType.cudaGraphNodeTypeConditional
    params.conditional.handle = handle
    params.conditional.type = runtime.cudaGraphConditionalNodeType.cudaGraphCondTypeIf
    params.conditional.size = 1
    edges = (None,) if int(gpu.cuda["runtime"].split(".")[0]) >= 13 else ()
    gpu.do(runtime.cudaGraphAddNode(graph, list(before), *edges, len(before), params))
    return params.conditional.phGraph_out[0]


def _counted(gpu: CudaPython, build: Callable[[Any, int, int, Any], None], args: argparse.Namespace) -> dict[str, Any]:
    """Count the stages that run when each increments a counter and continues below a limit; time the launch."""
    found = {}
    counter, host = gpu.allocate(64), gpu.pinned((1,), np.uint32)
    for limit in range(1, STAGES + 1):
        root = gpu.do(gpu.runtime.cudaGraphCreate(0))
        build(root, 0, limit, counter)
        graph = gpu.launchable(root)

        def run(graph: Any = graph) -> None:
            host[:] = 0
            gpu.upload(counter.address, host)
            gpu.launch(graph)
            gpu.download(host, counter.address)
            gpu.synchronize()

        run()
        ran = int(host[0])
        found[f"{limit} stages"] = {"ran": ran, "right": ran == limit, "us": timed(run, seconds=args.seconds)}
    return found


def _count(handle: Any, limit: int, counter: Any) -> None:
    kinds = (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64)
    enqueue(b"count", counter.address, limit, int(handle), kinds=kinds)


def child_condition(args: argparse.Namespace) -> dict[str, Any]:
    """Test conditional nodes with the condition set in a child graph of the IF node's graph."""
    with gpu_here() as gpu:
        runtime, do = gpu.runtime, gpu.do

        def build(graph: Any, exit: int, limit: int, counter: Any) -> None:
            last = exit == STAGES - 1
            handle = 0 if last else do(runtime.cudaGraphConditionalHandleCreate(graph, 0, 0))
            stage = gpu.record(lambda: _count(handle, limit, counter))
            node = do(runtime.cudaGraphAddChildGraphNode(graph, [], 0, stage))
            do(runtime.cudaGraphDestroy(stage))
            if not last:
                build(_if(gpu, graph, [node], handle), exit + 1, limit, counter)

        return _counted(gpu, build, args)


def same_condition(args: argparse.Namespace) -> dict[str, Any]:
    """Test conditional nodes with the condition set by a kernel captured into the IF node's graph."""
    with gpu_here() as gpu:
        runtime, do = gpu.runtime, gpu.do

        def build(graph: Any, exit: int, limit: int, counter: Any) -> None:
            last = exit == STAGES - 1
            handle = 0 if last else do(runtime.cudaGraphConditionalHandleCreate(graph, 0, 0))
            mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            do(runtime.cudaStreamBeginCaptureToGraph(gpu.stream, graph, None, None, 0, mode))
            _count(handle, limit, counter)
            do(runtime.cudaStreamEndCapture(gpu.stream))
            if not last:
                nodes = _nodes(gpu, graph)
                build(_if(gpu, graph, nodes[-1:], handle), exit + 1, limit, counter)

        return _counted(gpu, build, args)


def _nodes(gpu: CudaPython, graph: Any) -> list[Any]:
    _, _, count = gpu.runtime.cudaGraphGetNodes(graph)
    error, nodes, _ = gpu.runtime.cudaGraphGetNodes(graph, count)
    gpu.do((error,))
    return list(nodes)[:count]


if __name__ == "__main__":
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    sys.exit(main())
