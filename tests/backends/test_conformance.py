"""Our own backends pass the conformance suite, and the suite finds what is wrong with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pytest
from fakes.machine import Box

from edgekd.backends.base import find_backend
from edgekd.backends.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeRunner
from edgekd.testing import ConformanceError, check_backend


def test_onnxruntime(tmp_path: Path) -> None:
    assert check_backend(find_backend("onnxruntime"), tmp_path) == {"fp32": "", "int8": ""}


def test_openvino(tmp_path: Path) -> None:
    options = {"static_batch_sizes": (1, 4)}
    results = check_backend(find_backend("openvino"), tmp_path, options=options)
    assert (results["fp32"], results["int8"]) == ("", "")
    assert results["fp16"] in ("", "this CPU computes in neither fp16 nor bf16")


@pytest.mark.parametrize("family", ["8.6", "11.4"])
def test_tensorrt_on_a_fake(box: Callable[..., Box], family: str, tmp_path: Path) -> None:
    box(family)
    assert check_backend(find_backend("tensorrt"), tmp_path) == {"fp32": "", "fp16": "", "int8": ""}


class Careless(OnnxRuntimeRunner):
    """Its outputs are its own buffers, and it forgets rows beyond the eighth."""

    def __call__(self, *xs: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        outputs = super().__call__(*xs)
        self.kept = getattr(self, "kept", outputs)
        for kept, new in zip(self.kept, outputs):
            kept[: len(new)] = new[: len(kept)]
        return [kept[: min(len(xs[0]), 8)] for kept in self.kept]


class CarelessBackend(OnnxRuntimeBackend):
    name = "careless"

    def load(self, path: Path, **options: Any) -> OnnxRuntimeRunner:
        path.read_bytes()  # besides `read`
        return Careless(super().load(path, **options)._session)

    def precisions(self, path: Path, **options: Any) -> dict[str, int]:
        return {"fp16": 1}


def test_a_backend_that_does_not_conform(tmp_path: Path) -> None:
    with pytest.raises(ConformanceError) as caught:
        check_backend(CarelessBackend(), tmp_path, precisions=["fp32"])
    for name in ("batch_sizes", "inputs_and_outputs", "reading", "precision_read_back"):
        assert f"fp32: {name}: " in str(caught.value)
    assert "fp32: files: " not in str(caught.value)
