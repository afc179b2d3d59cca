"""The GPU that edgekd uses, through the CUDA bindings that are installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable

from edgekd.backends.cuda.base import GET_DRIVER, CudaDevice, pinned_bindings
from edgekd.backends.cuda.cuda_python import CudaPython, load
from edgekd.backends.cuda.pycuda import PyCuda
from edgekd.errors import BackendError, ConfigError, nearest
from edgekd.host import l4t_release

CHOICE = "EDGEKD_CUDA"
"""Environment variable that names the bindings to use: cuda-python or pycuda."""

_CUDA_OF_L4T = {(39,): "13.2", (38,): "13.0", (36, 4): "12.6", (36,): "12.2", (35,): "11.4"}
"""L4T release, from which on, to the CUDA version of its driver: JetPack 7.2, 7.0, 6.1, 6.0, 5.1."""
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
    raise BackendError(what, fix=_install_bindings())


def _install_bindings() -> str:
    """Return the advice for a machine without bindings: JetPack brings TensorRT and a driver that stays as it is."""
    release = l4t_release()
    for first, cuda in _CUDA_OF_L4T.items():
        if release >= first:
            return f"pip install '{pinned_bindings(cuda)}'"
    return "pip install 'edgekd[tensorrt]', or 'edgekd[pycuda]'"


def _cuda_python() -> CudaDevice | None:
    module = load("runtime")
    return CudaPython(module) if module else None


def _pycuda() -> CudaDevice | None:
    if importlib.util.find_spec("pycuda") is None:
        return None
    try:
        return PyCuda(importlib.import_module("pycuda.driver"))
    except ImportError as error:  # installed, but linked to a driver that is missing
        raise BackendError(f"pycuda cannot be loaded: {error}", fix=GET_DRIVER) from error
