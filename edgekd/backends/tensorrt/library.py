"""The tensorrt package: safe import, version, logger, and errors with its own messages."""

from __future__ import annotations

import collections
import functools
import importlib.util
import logging
import re
from typing import Any

from edgekd.backends.cuda.device import device
from edgekd.errors import BackendError, EdgekdError
from edgekd.host import installed_version

log = logging.getLogger(__name__)

PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11", "tensorrt-bindings")
"""Distributions that contain the package; JetPack's is the first."""
LESS_MEMORY = (
    "close other programs, lower --set tensorrt.workspace_share or batch_sizes; on a Jetson, add swap and log out "
    "of the desktop"
)
MEMORY = r"out of memory|outofmemory|failed_allocation|insufficient memory|allocation fail"
WORKSPACE = r"insufficient workspace|workspace size|increas\w+ (the )?workspace"
UNKNOWN_GPU = r"\bsm\b.*(support|version)|(unsupported|not support).*(\bsm\b|compute capab|this gpu)"


def version() -> str | None:
    """Return the installed version, or None if it is not installed. Imports nothing where there is no GPU."""
    if importlib.util.find_spec("tensorrt") is None:
        return None
    try:
        return str(library().__version__)
    except (EdgekdError, ImportError):
        return _recorded() or "unknown"


def _recorded() -> str | None:
    """Return the version in the metadata of pip or JetPack."""
    return next(filter(None, map(installed_version, PACKAGES)), None)


@functools.cache
def library() -> Any:
    """Import tensorrt, after checking for a GPU: without a driver, importing crashes the interpreter.

    Raises:
        BackendError: There are no CUDA bindings, no driver or no GPU, or TensorRT's own libraries do not load.
    """
    device()
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        fix = "follow NVIDIA's installation guide; JetPack has it, for a venv with --system-site-packages"
        raise BackendError(f"tensorrt cannot be loaded: {error}", fix=fix) from error
    return tensorrt


def parse_version(text: str) -> tuple[int, int]:
    """Return major and minor version: "10.16.1.11" -> (10, 16); (0, 0) if it is not a version."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def strongly_typed() -> bool:
    """Return True if the graph's own types decide (from 10.12 on), not flags that allow TensorRT to choose types."""
    trt = library()
    return not hasattr(trt.BuilderFlag, "FP16") or parse_version(trt.__version__) >= (10, 12)


@functools.cache
def logger() -> Any:
    """Return the logger of the process, as TensorRT requires; it keeps the last errors and warnings for `failed`."""
    trt = library()

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]  # TensorRT has no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: collections.deque[str] = collections.deque(maxlen=8)
            self.warnings: collections.deque[str] = collections.deque(maxlen=4)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.Logger.ERROR, trt.Logger.INTERNAL_ERROR):
                self.errors.append(msg.strip())
            elif severity == trt.Logger.WARNING:
                self.warnings.append(msg.strip())
            log.debug("TensorRT: %s", msg)

    return Log()


def forget_messages() -> None:
    """Discard the messages recorded so far, so that the next `failed` does not report them."""
    logger().errors.clear()
    logger().warnings.clear()


def failed(what: str, *, fix: str = "report it with the messages above") -> BackendError:
    """Return the error to raise when TensorRT has failed, with its messages and advice on them."""
    logged = logger().errors or logger().warnings  # the reason why CUDA does not start is only a warning
    messages = "\n".join(f"  TensorRT: {message}" for message in logged)
    forget_messages()
    return BackendError(
        f"{what}\n{messages}" if messages else f"{what}, and TensorRT gives no reason", fix=_advice(messages, fix)
    )


def _advice(messages: str, fix: str) -> str:
    if re.search(MEMORY, messages, re.IGNORECASE):
        return LESS_MEMORY
    if re.search(WORKSPACE, messages, re.IGNORECASE):
        return "raise --set tensorrt.workspace_share, or lower batch_sizes"
    if re.search(UNKNOWN_GPU, messages, re.IGNORECASE):
        gpu, ours = device(), library().__version__
        return f"TensorRT {ours} may not support {gpu.name} (SM {gpu.sm}): install the version that NVIDIA names for it"
    return fix


def make(kind: Any, *parts: Any) -> Any:
    """Return `kind(*parts, logger)`: a builder, runtime, parser or refitter.

    Raises:
        BackendError: TensorRT cannot start; with its reason.
    """
    try:
        return kind(*parts, logger())
    except TypeError as error:  # pybind11's "factory function returned nullptr"
        raise failed(f"TensorRT cannot make its {kind.__name__}") from error
