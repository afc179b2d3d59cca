"""The host as the installed backends report it."""

from __future__ import annotations

from typing import Any

from edgekd.backends.base import find_backend
from edgekd.host import HostInfo, host_info

PACKAGES = ("onnxruntime", "openvino", "tensorrt", "cuda-python", "pycuda")
"""Distributions that the backends load."""


def describe_host(*backends: str) -> HostInfo:
    """Describe this machine, the versions of all backends' packages, and the facts that `backends` report.

    Raises:
        BackendError: one of `backends` is not installed, or finds no device to run on.
    """
    return host_info(PACKAGES, {name: reported_facts(name) for name in dict.fromkeys(backends)})


def reported_facts(name: str) -> dict[str, str]:
    """Version of a backend and its facts about the hardware it runs on (GPU, SM, CUDA versions)."""
    backend: Any = find_backend(name)
    return {"version": str(backend.version()), **(backend.here() if hasattr(backend, "here") else {})}
