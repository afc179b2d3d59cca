"""A TensorRT for each family of versions: it knows only the names that the real bindings have, keeps the real rules
that edgekd depends on, and runs the graphs in ONNX Runtime. What only a GPU can tell, it cannot.

Not proved on a GPU, or on one alone (an H100 with 8.6): that a context which takes another profile gives up the one it
had; that garbage is no timing cache (for TensorRT-RTX it is an empty one); that a context without memory accepts a
profile; that formats are told only with a context; what the inspectors of 10 and 11 call things; that Q/DQ graphs give
what they give in ONNX Runtime. Every engine here needs 4096 bytes of scratch memory, so too little cannot be noticed.

Rules that real TensorRT answers with a log message and None or False are answered so here; what crashes there, or
gives wrong numbers, raises `RuleBroken`.

What the fakes do and no GPU has shown, except TensorRT 8.6 on an H100 (benchmarks/results/gpu), where it is so marked:

- CUDA bindings of a newer minor version than the driver's are refused on a Jetson (integrated), and accepted elsewhere.
- A profile is free again when its context leaves it. A context with the user's memory accepts a profile before it has
  memory (8.6).
- A captured graph survives later calls on other contexts of its engine (8.6), and another memory of its own context.
- Several engines can share one scratch memory, which is larger than most of them need.
- A kernel in a child graph may set a condition of the parent (8.6).
- Formats in the inspector's report are unknown only without a context.
- Q/DQ graphs give what ONNX Runtime gives, but for rounding.
- Damaged timing caches are answered with None.
"""

from __future__ import annotations

import dataclasses
import enum
import types
from pathlib import Path
from typing import Any

from fakes.builder import offer_builder
from fakes.cuda import Cuda, RuleBroken
from fakes.engine import offer_engine
from fakes.names import Named

FULL = {"8.5": "8.5.2", "8.6": "8.6.1", "10.3": "10.3.0", "10.16": "10.16.1.11", "11.4": "11.4.0.106"}
FAMILIES = tuple(FULL)
ENUMS = (
    "BuilderFlag",
    "DataType",
    "DeviceType",
    "ExecutionContextAllocationStrategy",
    "HardwareCompatibilityLevel",
    "LayerInformationFormat",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParserFlag",
    "ProfilingVerbosity",
    "TacticSource",
    "TensorFormat",
    "TensorIOMode",
)


def real_names(family: str) -> set[str]:
    """Class and Class.name of the real bindings of a version."""
    column = FAMILIES.index(family)
    lines = (Path(__file__).parent / "tensorrt_names.txt").read_text().splitlines()[1:]
    return {name for name, there in map(str.split, lines) if there[column] == "Y"}


@dataclasses.dataclass
class Trouble:
    """What shall go wrong."""

    out_of_memory: bool = False
    no_reason: bool = False  # fail to build and log nothing
    unknown_sm: bool = False
    cannot_start: bool = False  # why is only a warning
    operators: tuple[str, ...] = ()  # that the parser does not know
    fast_int8: bool = True
    ignores_fp16: bool = False  # builds float32 whatever it is asked for
    damaged_information: bool = False
    opaque_layers: bool = False  # the inspector names no layer that multiplies
    dla_cores: int = 0
    padded: str = ""  # tensor whose layout is not that of an array
    cannot_run: bool = False
    wrong_profile: int = -1  # whose kernels answer wrongly
    rtx: bool = False  # TensorRT-RTX instead of TensorRT
    forgets: bool = False  # a context answers wrongly once one of another profile has run since it did


class _Enum(enum.Enum):
    def __int__(self) -> int:
        return int(self.value)


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class World:
    """One fake module with the GPU that it is on. `offer` puts classes into it."""

    def __init__(self, family: str, cuda: Cuda, trouble: Trouble) -> None:
        self.family, self.cuda, self.trouble = family, cuda, trouble
        self.names = real_names(family)
        if trouble.rtx:
            self.names |= {f"IBuilderConfig.{name}" for name in ("num_compute_capabilities", "set_compute_capability")}
        self.major, self.minor = map(int, family.split("."))
        self.trt: Any = types.ModuleType("tensorrt")
        self.trt.__version__ = "1.7.1.116" if trouble.rtx else FULL[family]
        self.trt.built = []  # network and config of every build, for tests to look at

    def offer(self, cls: type[Named]) -> type[Named]:
        """A class with the real one's names, if the version has it."""
        kind = cls.__name__
        if kind in self.names:
            cls._names = frozenset(n.split(".")[1] for n in self.names if n.startswith(f"{kind}."))
            setattr(self.trt, kind, cls)
        return cls

    def offer_enum(self, kind: str, *, shift: int) -> None:
        """With numbers that fit no other version, so that none can be hard-coded."""
        members = sorted(n.split(".")[1] for n in self.names if n.startswith(f"{kind}."))
        if kind in self.names:
            setattr(self.trt, kind, _Enum(kind, {name: i + shift for i, name in enumerate(members)}))

    def error(self, logger: Any, text: str) -> None:
        logger.log(Severity.ERROR, text)

    def attached(self, logger: Any) -> Any:
        """The logger of what is being made."""
        if not (self.cuda.driver and self.cuda.count) and not self.trouble.rtx:
            raise RuleBroken("TensorRT is used where there is no driver or GPU: it crashes the interpreter")
        assert logger._is_logger
        if self.trouble.cannot_start:
            logger.log(
                Severity.WARNING, "CUDA initialization failure with error: 35. Please check your CUDA installation"
            )
            raise TypeError("pybind11::init(): factory function returned nullptr")
        if self.trouble.unknown_sm:
            self.error(logger, "6: [builder.cpp] Target GPU SM 53 is not supported by this TensorRT release.")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return logger


def make(family: str, cuda: Cuda, trouble: Trouble) -> types.ModuleType:
    """The `tensorrt` module of a family, on a fake GPU."""
    world = World(family, cuda, trouble)
    for i, kind in enumerate(ENUMS):
        world.offer_enum(kind, shift=(FAMILIES.index(family) + i) % 5)

    class ILogger:
        def __init__(self) -> None:
            self._is_logger = True

    class Logger(ILogger):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    class IProgressMonitor:
        def __init__(self) -> None:
            self._is_monitor = True

    world.trt.ILogger, world.trt.Logger = ILogger, Logger
    if trouble.rtx:
        world.trt.ComputeCapability = _Enum("ComputeCapability", ["SM86", "SM89", "SM120"])
    if "IProgressMonitor" in world.names:
        world.trt.IProgressMonitor = IProgressMonitor
    offer_builder(world)
    offer_engine(world)
    module: types.ModuleType = world.trt
    return module
