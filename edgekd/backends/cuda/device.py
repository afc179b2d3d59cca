"""The GPU that edgekd uses, through the CUDA bindings that are installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable

from edgekd.backends.cuda.base import GET_DRIVER, CudaDevice
from edgekd.backends.cuda.cuda_python import CudaPython
from edgekd.backends.cuda.pycuda import PyCuda
from edgekd.errors import BackendError, ConfigError, nearest

CHOICE = "EDGEKD_CUDA"
"""Environment variable that names the bindings to use: cuda-python or pycuda."""


_finding = threading.Lock()


def device() -> CudaDevice:
    """Return the GPU, through the bindings that EDGEKD_CUDA names, else cuda-python, else pycuda.

    Raises:
        BackendError: There are no bindings, no driver or no GPU.
        ConfigError: EDGEKD_CUDA names something else.
    """
    with _finding:  # else two concurrent threads would create two
        return find()


@functools.cache
def find() -> CudaDevice:
    """Find the GPU; `device` calls this in one thread at a time."""
    makers: dict[str, Callable[[], CudaDevice | None]] = {"cuda-python": _cuda_python, "pycuda": _pycuda}
    requested = os.environ.get(CHOICE)
    if requested and requested not in makers:
        raise ConfigError(f"{CHOICE}={requested}: no such bindings", fix=nearest(requested, makers))
    for name in [requested] if requested else makers:
        if found := makers[name]():
            return found
    what = f"{requested} is not installed" if requested else "neither cuda-python nor pycuda is installed"
    raise BackendError(what, fix="pip install 'edgekd[tensorrt]', or 'edgekd[pycuda]'")


def _cuda_python() -> CudaDevice | None:
    for module in ("cuda.bindings.runtime", "cuda.cudart"):  # the second up to cuda-python 12.5
        try:
            return CudaPython(importlib.import_module(module))
        except ImportError:
            continue
    return None


def _pycuda() -> CudaDevice | None:
    if importlib.util.find_spec("pycuda") is None:
        return None
    try:
        return PyCuda(importlib.import_module("pycuda.driver"))
    except ImportError as error:  # installed, but linked to a driver that is missing
        raise BackendError(f"pycuda cannot be loaded: {error}", fix=GET_DRIVER) from error
