"""The tensorrt package, imported when it is safe; what it says when something fails; what its version can do."""

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
"""Names under which the package is installed; JetPack's is the first."""
LESS_MEMORY = (
    "close other programs, lower --set tensorrt.workspace_share or batch_sizes; on a Jetson, add swap and log out "
    "of the desktop"
)
MEMORY = r"out of memory|outofmemory|failed_allocation|insufficient memory|allocation fail"
WORKSPACE = r"insufficient workspace|workspace size|increas\w+ (the )?workspace"
UNKNOWN_GPU = r"\bsm\b.*(support|version)|(unsupported|not support).*(\bsm\b|compute capab|this gpu)"


def version() -> str | None:
    """The installed version; None if it is not installed. Imports nothing where there is no GPU."""
    if importlib.util.find_spec("tensorrt") is None:
        return None
    try:
        return str(library().__version__)
    except (EdgekdError, ImportError):
        return _recorded() or "unknown"


def _recorded() -> str | None:
    """The version that pip or JetPack wrote down."""
    return next(filter(None, map(installed_version, PACKAGES)), None)


@functools.cache
def library() -> Any:
    """The tensorrt module. The GPU is asked for first: without a driver, TensorRT crashes the interpreter.

    Raises:
        BackendError: no CUDA bindings, no driver, no GPU, or TensorRT's own libraries do not load.
    """
    device()
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        fix = "install it as its makers say; on a Jetson it comes with JetPack, for a venv with --system-site-packages"
        raise BackendError(f"tensorrt cannot be loaded: {error}", fix=fix) from error
    return tensorrt


def number(text: str) -> tuple[int, int]:
    """Major and minor version: "10.16.1.11" -> (10, 16); (0, 0) if it is no version."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def strongly_typed() -> bool:
    """Whether the graph's own types decide: from 10.12 on. Below, flags say which types TensorRT may choose from."""
    trt = library()
    return not hasattr(trt.BuilderFlag, "FP16") or number(trt.__version__) >= (10, 12)


@functools.cache
def logger() -> Any:
    """One for the whole process, as TensorRT wants it; keeps the last errors and warnings for `failed`."""
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
    """Leave nothing for the next `failed` of what has passed."""
    logger().errors.clear()
    logger().warnings.clear()


def failed(what: str, *, fix: str = "report it with the messages above") -> BackendError:
    """What to raise when TensorRT has failed, with what it logged and what that calls for."""
    messages = logger().errors or logger().warnings  # why CUDA does not start is only a warning
    said = "\n".join(f"  TensorRT: {message}" for message in messages)
    forget_messages()
    return BackendError(f"{what}\n{said}" if said else f"{what}, and TensorRT does not say why", fix=_advice(said, fix))


def _advice(said: str, fix: str) -> str:
    if re.search(MEMORY, said, re.IGNORECASE):
        return LESS_MEMORY
    if re.search(WORKSPACE, said, re.IGNORECASE):
        return "raise --set tensorrt.workspace_share, or lower batch_sizes"
    if re.search(UNKNOWN_GPU, said, re.IGNORECASE):
        gpu, ours = device(), library().__version__
        return f"TensorRT {ours} may not know {gpu.name} (SM {gpu.sm}): take the version that its makers name for it"
    return fix


def make(kind: Any, *parts: Any) -> Any:
    """`kind(*parts, logger)`, for what TensorRT cannot make when it cannot start: builders, runtimes, parsers.

    Raises:
        BackendError: with TensorRT's reason.
    """
    try:
        return kind(*parts, logger())
    except TypeError as error:  # pybind11's "factory function returned nullptr"
        raise failed(f"TensorRT cannot make its {kind.__name__}") from error
