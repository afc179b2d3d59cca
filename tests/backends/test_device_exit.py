"""The cascade that the GPU ends itself: its kernel compiled for real and run on the CPU, its graph on a fake CUDA."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fakes.cuda import Cuda
from fakes.machine import IMAGES, RNG, Box, engine_of, policies, recipe
from helpers.device_kernel import Kernel

from edgekd.backends.cuda.device import device
from edgekd.backends.tensorrt.device_exit import SHIPPED, ptx, source
from edgekd.confidence import CONFIDENCE_MEASURES, ConfidenceMeasure
from edgekd.errors import BackendError, ConfigError
from edgekd.policy import Average, Policy, decide
from edgekd.runtime.classifier import Classifier
from edgekd.runtime.engine import open_engine


@pytest.mark.parametrize("measure", ["max_probability", "margin", "entropy"])
def test_the_shipped_ptx_is_the_kernel(measure: str) -> None:
    """Another release of NVRTC than the one that wrote it translates slightly differently."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="no CUDA bindings to compile with")
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:
        pytest.skip(f"no NVRTC to compile with: {error}")
    code = ptx(source(Policy((1.0,), confidence=measure)), "7.5").rstrip(b"\0")
    now = re.sub(rb"\.version \d\.\d", b".version 7.0", code, count=1)
    shipped = (SHIPPED / f"{measure}.ptx").read_bytes()
    for words in (b".version 7.0", b".target sm_75", b".entry decide(", b".extern .func cudaGraphSetConditional"):
        assert words in shipped
    compiler = re.compile(rb"Cuda compilation tools, release .*")
    if compiler.findall(shipped) == compiler.findall(now):
        assert shipped == now


@pytest.mark.parametrize("average", ["own", "mean"])
@pytest.mark.parametrize("measure", CONFIDENCE_MEASURES)
def test_the_kernel_decides_as_the_policy_does(
    kernels: Callable[[str], Kernel], measure: str, average: Average
) -> None:
    kernel = kernels(measure)
    policy = Policy((0.7, 1.0, 1.9), (0.6, 0.4), confidence=measure, average=average)
    for logits in RNG.normal(size=(40, 3, 1, 7)).astype(np.float32) * 4:
        ours, said = np.zeros(7, np.float32), np.zeros(9, np.float32)
        total = np.zeros((1, 7), np.float32)
        for exit in range(3):
            threshold = (*policy.thresholds, 0.0)[exit]
            at = [x.ctypes.data for x in (logits[exit], ours, said)]
            rest = (7, exit, policy.temperatures[exit], threshold, int(average == "mean"), 77)
            kernel(*at, *rest)
            seen = decide(policy, exit, logits[exit], total)
            assert said[0] == pytest.approx(seen.confidence[0], abs=1e-5)
            assert said[2:] == pytest.approx(seen.probabilities[0], abs=1e-6)
            assert said[1] == exit
            if exit < 2:
                assert kernel.conditions[77] == (not seen.exited[0])
            total = seen.state


def test_the_gpu_ends_the_cascade(
    box: Callable[..., Box], kernels: Callable[[str], Kernel], small_student: Path, tmp_path: Path
) -> None:
    kernel = kernels("max_probability")
    cuda = box("10.16", kernel=kernel).cuda
    engine, reference = engine_of(small_student, tmp_path, recipe(graphs="all")), open_engine(small_student, threads=1)
    for policy in reversed(policies(reference.logits(IMAGES))):
        want = Classifier(reference, policy=policy).run(IMAGES)
        ours = Classifier(engine, policy=policy, device_side_exit=True)
        kernel.conditions = cuda.graphs.conditions
        ours.run(IMAGES[:1])  # opening the last exit's graph may have moved the scratch memory
        before = cuda.launches, cuda.syncs, cuda.runs
        found = ours.run(IMAGES)
        assert found.exits.tolist() == want.exits.tolist()
        assert found.probabilities == pytest.approx(want.probabilities, abs=1e-5)
        assert found.confidence == pytest.approx(want.confidence, abs=1e-5)
        after = cuda.launches, cuda.syncs, cuda.runs
        stages = int((want.exits + 1).sum())  # no later stage runs
        assert [b - a for a, b in zip(before, after)] == [20, 20, stages]
    with device() as gpu:
        address = gpu.scratch.memory.address
    engine.logits(IMAGES)  # in one piece, which needs more scratch memory: that of the cascade moves
    assert address not in cuda.blocks
    assert ours.run(IMAGES).probabilities == pytest.approx(want.probabilities, abs=1e-5)


def test_a_measure_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entropy = CONFIDENCE_MEASURES["entropy"]
    monkeypatch.setitem(CONFIDENCE_MEASURES._loaded, "entropy", ConfidenceMeasure("entropy", entropy.of_batch))
    with pytest.raises(BackendError, match=r"'entropy' has no CUDA form[\s\S]*another --confidence"):
        source(Policy((1.0,), confidence="entropy"))


def test_a_geometric_mean_on_the_gpu_is_refused(box: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    box("10.16")
    pooling = ((1.0,), (0.5, 0.5), (0.0, 0.0, 1.0))
    policy = Policy((1.0,) * 3, (0.5, 0.5), average="geometric", pooling=pooling)
    with pytest.raises(BackendError, match=r"weighted geometric mean[\s\S]*--average own"):
        Classifier(engine_of(small_student, tmp_path), policy=policy, device_side_exit=True)


def test_where_the_gpu_cannot(box: Callable[..., Box], small_student: Path, tmp_path: Path) -> None:
    policy = Policy((1.0,) * 3, (0.5, 0.5))
    with pytest.raises(
        BackendError, match=r"onnxruntime cannot apply the exit policy on the device[\s\S]*--device-side-exit"
    ):
        Classifier(small_student, policy=policy, device_side_exit=True)
    for keys, text in (
        ({"bindings": ("pycuda",)}, "pycuda has no"),
        ({"cuda": Cuda(driver=12020)}, r"driver here is 12\.2"),
    ):
        box("10.3", **keys)
        engine = engine_of(small_student, tmp_path)
        with pytest.raises(BackendError, match=text):
            Classifier(engine, policy=policy, device_side_exit=True)
        with pytest.raises(ConfigError, match="ends cascades, not 'full'"):
            Classifier(engine, strategy="full", device_side_exit=True)
