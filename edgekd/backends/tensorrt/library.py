"""NVIDIA's two libraries, TensorRT and TensorRT-RTX: safe import, version, logger, errors with their own messages."""

from __future__ import annotations

import collections
import ctypes
import functools
import importlib
import importlib.util
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

from edgekd.backends.cuda.device import device
from edgekd.backends.tensorrt.layers import LISTING
from edgekd.errors import BackendError, EdgekdError
from edgekd.host import installed_version

log = logging.getLogger(__name__)

LESS_MEMORY = (
    "close other programs, lower --set tensorrt.workspace_share or batch_sizes; on a Jetson, add swap and log out "
    "of the desktop"
)
MEMORY = r"out of memory|outofmemory|failed_allocation|insufficient memory|allocation fail"
WORKSPACE = r"insufficient workspace|workspace size|increas\w+ (the )?workspace"
OVERFLOW = r"overflow"
UNKNOWN_GPU = r"\bsm\b.*(support|version)|(unsupported|not support).*(\bsm\b|compute capab|this gpu)"


class Library:
    """One of NVIDIA's libraries; what is imported or made is kept for the process.

    Attributes:
        name: Its name in messages.
        modules: Python modules that offer it, the preferred one first.
        packages: Distributions that contain it, the preferred one first.
        needs_gpu: Importing it without a driver crashes the interpreter.
    """

    name = "TensorRT"
    modules: tuple[str, ...] = ("tensorrt",)
    packages: tuple[str, ...] = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11", "tensorrt-bindings")
    needs_gpu = True
    _install = "follow NVIDIA's installation guide; JetPack has it, for a venv with --system-site-packages"

    def version(self) -> str | None:
        """Return the installed version, or None if it is not installed. Imports nothing without a GPU that it needs."""
        if self._module() is None:
            return None
        try:
            return str(self.trt.__version__)
        except (EdgekdError, ImportError):
            return next(filter(None, map(installed_version, self.packages)), None) or "unknown"

    def _module(self) -> str | None:
        return next((name for name in self.modules if importlib.util.find_spec(name)), None)

    @functools.cached_property
    def trt(self) -> Any:
        """The Python module, imported after checking for a GPU if one is needed.

        Raises:
            BackendError: It or the libraries behind it do not load; or there are no CUDA bindings, no driver or no GPU.
        """
        if self.needs_gpu:
            device()
        try:
            self._load_dependencies()
            return importlib.import_module(self._module() or self.modules[0])
        except (ImportError, OSError) as error:
            raise BackendError(f"{self.name} cannot be loaded: {error}", fix=self._install) from error

    def _load_dependencies(self) -> None:
        """Load the shared libraries that importing the module would not find."""

    @property
    def strongly_typed(self) -> bool:
        """True if the graph's own types decide (from 10.12 on), not flags that allow TensorRT to choose types."""
        return not hasattr(self.trt.BuilderFlag, "FP16") or parse_version(self.trt.__version__) >= (10, 12)

    @functools.cached_property
    def logger(self) -> Any:
        """The logger of the process, as TensorRT requires.

        It keeps the last errors and warnings for `failed` and the last listing of layers, and logs warnings of weights
        that overflow. A build has 10^4 to 10^6 other messages: they are logged at the level DEBUG only.
        """
        trt, name = self.trt, self.name
        chatter = {trt.Logger.INFO, trt.Logger.VERBOSE}

        class Log(trt.ILogger):  # type: ignore[misc,name-defined]  # TensorRT has no types
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.errors: collections.deque[str] = collections.deque(maxlen=8)
                self.warnings: collections.deque[str] = collections.deque(maxlen=4)
                self.listing = ""

            def log(self, severity: Any, msg: str) -> None:
                if severity in chatter:
                    if msg.startswith(LISTING):
                        self.listing = msg
                elif severity == trt.Logger.WARNING:
                    self.warnings.append(msg.strip())
                    if re.search(OVERFLOW, msg, re.IGNORECASE):
                        log.warning("%s: %s", name, msg.strip())
                else:
                    self.errors.append(msg.strip())
                if log.isEnabledFor(logging.DEBUG):
                    log.debug("%s: %s", name, msg)

        return Log()

    def forget_messages(self) -> None:
        """Discard the messages recorded so far, so that the next `failed` does not report them."""
        self.logger.errors.clear()
        self.logger.warnings.clear()
        self.logger.listing = ""

    def failed(self, what: str, *, fix: str = "report it with the messages above") -> BackendError:
        """Return the error to raise when the library has failed, with its messages and advice on them."""
        logged = self.logger.errors or self.logger.warnings  # the reason why CUDA does not start is only a warning
        messages = "\n".join(f"  {self.name}: {message}" for message in logged)
        self.forget_messages()
        return BackendError(
            f"{what}\n{messages}" if messages else f"{what}, and {self.name} gives no reason",
            fix=self._advice(messages, fix),
        )

    def _advice(self, messages: str, fix: str) -> str:
        if re.search(MEMORY, messages, re.IGNORECASE):
            return LESS_MEMORY if self.needs_gpu else "close other programs, or lower batch_sizes"
        if re.search(WORKSPACE, messages, re.IGNORECASE):
            return "raise --set tensorrt.workspace_share, or lower batch_sizes"
        if re.search(UNKNOWN_GPU, messages, re.IGNORECASE) and self.needs_gpu:
            gpu, ours = device(), f"{self.name} {self.trt.__version__}"
            return f"{ours} may not support {gpu.name} (SM {gpu.sm}): install the version that NVIDIA names for it"
        return fix

    def make(self, kind: Any, *parts: Any) -> Any:
        """Return `kind(*parts, logger)`: a builder, runtime, parser or refitter.

        Raises:
            BackendError: The library cannot start; with its reason.
        """
        try:
            return kind(*parts, self.logger)
        except TypeError as error:  # pybind11's "factory function returned nullptr"
            raise self.failed(f"{self.name} cannot make its {kind.__name__}") from error

    def check_starts(self) -> None:
        """Check that CUDA starts for this library, by making a builder: making a runtime would crash the interpreter.

        Raises:
            BackendError: It does not; with its reason.
        """
        self.make(self.trt.Builder)


class RtxLibrary(Library):
    """TensorRT-RTX, which builds engines where there is no GPU.

    NVIDIA's own wheels and SDK bring bindings that find their libraries. The bindings on PyPI do not: their libraries
    are on NVIDIA's index, but also in the wheel of the plugin for ONNX Runtime, whose file names carry the version.
    """

    name = "TensorRT-RTX"
    modules = ("tensorrt_rtx", "tensorrt_rtx_bindings")
    packages = (
        "tensorrt-rtx-cu12-bindings",
        "tensorrt-rtx-cu13-bindings",
        "tensorrt-rtx",
        "onnxruntime-ep-nv-tensorrt-rtx-cu12",
        "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    )
    needs_gpu = False
    _install = "pip install 'edgekd[tensorrt-rtx]', or follow NVIDIA's installation guide"

    def _load_dependencies(self) -> None:
        """Load the libraries of the plugin, which the bindings then find by their sonames, on Windows by the PATH."""
        plugin = importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx")
        if plugin is None or importlib.util.find_spec("tensorrt_rtx_libs"):
            return
        for folder in plugin.submodule_search_locations or ():
            if sys.platform == "win32":
                os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", "")])
            for name in ("libtensorrt_rtx", "libtensorrt_onnxparser_rtx"):  # the parser needs the builder
                for path in sorted(Path(folder).glob(f"{name}.so.*.*")):
                    ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


def parse_version(text: str) -> tuple[int, int]:
    """Return major and minor version: "10.16.1.11" -> (10, 16); (0, 0) if it is not a version."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


TENSORRT = Library()
TENSORRT_RTX = RtxLibrary()
