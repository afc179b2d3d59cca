"""A TensorRT for each family of versions: it knows only the names that the real bindings have, keeps the real rules
that edgekd depends on, and runs the graphs in ONNX Runtime. What only a GPU can tell, it cannot.

Rules that real TensorRT answers with a log message and None or False are answered so here; what crashes there, or
gives wrong numbers, raises `RuleBroken`.
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
    dla_cores: int = 0
    cannot_run: bool = False
    wrong_profile: int = -1  # whose kernels answer wrongly
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
        self.major, self.minor = map(int, family.split("."))
        self.trt: Any = types.ModuleType("tensorrt")
        self.trt.__version__ = FULL[family]
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
        if not (self.cuda.driver and self.cuda.count):
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
    if "IProgressMonitor" in world.names:
        world.trt.IProgressMonitor = IProgressMonitor
    offer_builder(world)
    offer_engine(world)
    module: types.ModuleType = world.trt
    return module
