"""The backend interface and the registry of backends."""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar, cast

import onnx

from edgekd import config
from edgekd.artifacts.manifest import Manifest
from edgekd.artifacts.recipe import Recipe
from edgekd.backends import BUILTIN
from edgekd.backends.runner import CompiledGraph, DeviceCascade, StagedRunner
from edgekd.backends.staged import host_staged_runner
from edgekd.errors import BackendError, ConfigError, nearest
from edgekd.host import cpu_model, exact_int8
from edgekd.policy import Policy
from edgekd.registry import Registry
from edgekd.schema import from_dict

log = logging.getLogger(__name__)

AUTO = "auto"
"""Selects every installed backend; the fastest engine that passes the gate is kept."""
REFERENCE = "onnxruntime"
"""The backend that runs student.onnx as it is; its files are ONNX."""

ReadFile: TypeAlias = Callable[[Path], bytes]
"""Function that reads a file of an engine; `artifacts.manifest.read_file` also checks it against the manifest."""
Graph = TypeVar("Graph", bound=CompiledGraph)


@dataclass(frozen=True)
class NoOptions:
    """Options of a backend that has none."""


class Backend(ABC, Generic[Graph]):
    """Compiles ONNX graphs into files and loads these files into runners. Instances hold no state.

    To add a backend, subclass this (`CpuBackend` if it runs on the CPU), set the class attributes, implement `version`,
    `build`, `load` and `precisions`, and offer the class in a package's pyproject.toml:

        [project.entry-points."edgekd.backends"]
        mine = "my_package.backend:MyBackend"

    `edgekd compile --backend mine`, `edgekd doctor`, the versions in records and the `[mine]` table of recipes follow
    from it; `edgekd.testing.check_backend` tests it. An engine holds a graph for each stage and, where requested,
    `monolithic` (all exits) and `final` (the last exit alone). Inputs and outputs are named as in the ONNX graph, the
    batch size is the free first dimension, a stage's first output is its logits, and the others are the next stage's
    inputs in order.

    Attributes:
        name: Name on the command line and in manifests; the entry point has the same.
        extra: Extra of edgekd that installs it; empty for backends of other packages.
        packages: Distributions whose versions `edgekd doctor` and records show.
        suffix: Suffix of the main file of a graph.
        supported_precisions: Precisions that a recipe may request: fp32, fp16, int8.
        options: Dataclass with defaults for all fields, parsed from the recipe's table called `name`.
        fixed_batch_sizes: Staged runs take batches up to the largest of the recipe's batch sizes only.
        pads_batches: Batches run best in a size that was timed, so survivors are padded to one.
        works_after_fork: It can be used in a process forked from one that used it.
        may_crash: Its library may end the process instead of raising, so `edgekd doctor` tries it in one of its own.
        across_systems: Engines run on other operating systems than the one that built them.
    """

    name: ClassVar[str]
    extra: ClassVar[str] = ""
    packages: ClassVar[tuple[str, ...]] = ()
    suffix: ClassVar[str]
    supported_precisions: ClassVar[frozenset[str]] = frozenset({"fp32"})
    options: ClassVar[type] = NoOptions
    fixed_batch_sizes: ClassVar[bool] = False
    pads_batches: ClassVar[bool] = False
    works_after_fork: ClassVar[bool] = False
    may_crash: ClassVar[bool] = False
    across_systems: ClassVar[bool] = False

    @abstractmethod
    def version(self) -> str | None:
        """Return the installed version, or None if it is not installed."""

    @abstractmethod
    def build(
        self, graph: onnx.ModelProto, path: Path, *, recipe: Recipe, progress: Callable[[float], None] | None = None
    ) -> None:
        """Compile one graph into `path` and, if it needs more files, files beside it (see `suffixes`).

        Args:
            graph: ONNX graph with a free batch size; a Q/DQ graph where the recipe's precision is int8.
            path: File to write; it ends in `suffix`.
            recipe: Precision, batch sizes and options.
            progress: Called with the fraction done, by builds that take long.

        Raises:
            BackendError: This machine or this version cannot build the graph or run the recipe's precision.
        """

    @abstractmethod
    def load(self, path: Path, *, recipe: Recipe, threads: int, read: ReadFile = Path.read_bytes) -> Graph:
        """Load a built graph for this machine.

        Args:
            path: The file given to `build`.
            recipe: The recipe it was built with.
            threads: CPU threads to use.
            read: Reads the files; each is read once, and the runner must not open files itself.

        Raises:
            BackendError: The files are damaged, or this machine cannot run them.
        """

    @abstractmethod
    def precisions(self, path: Path, *, recipe: Recipe) -> Mapping[str, int]:
        """Read back the precisions that run in one graph.

        Returns:
            Precision (fp32, fp16, bf16, int8) to its number of the layers that multiply by weights.
        """

    def suffixes(self, recipe: Recipe) -> tuple[str, ...]:
        """Return the suffixes of the files that `build` writes for each graph, the main one first."""
        return (self.suffix,)

    def quantization_target(self, recipe: Recipe) -> str:
        """Return which kind of Q/DQ graph the backend runs fast; see `edgekd.quantization`."""
        return "cpu"

    def reduces_range(self) -> bool:
        """Return True if 8-bit weights must be limited to 7 bits on this machine."""
        return False

    def build_notes(self, recipe: Recipe) -> list[str]:
        """Return remarks on engines of this recipe on this machine, for the manifest and the user."""
        return []

    def recipe_name(self, recipe: Recipe) -> str:
        """Return the recipe's name in tables and messages, with what this backend's options add to it."""
        return recipe.name

    def exclusive_feature(self, recipe: Recipe) -> str:
        """Return what the options request that no other backend may silently ignore; empty if nothing."""
        return ""

    def staged_runner(self, stages: Sequence[Graph]) -> StagedRunner:
        """Return a staged runner for the loaded stages; by default boundary tensors are arrays in host memory."""
        return host_staged_runner(stages)

    def device_cascade(self, stages: Sequence[Graph], policy: Policy) -> DeviceCascade:
        """Return a cascade for one image in which the device itself applies the exit policy.

        Raises:
            BackendError: The backend does not support it.
        """
        raise BackendError(f"{self.name} cannot apply the exit policy on the device", fix="omit --device-side-exit")

    def cannot_run(self, recipe: Recipe) -> str:
        """Return why an engine of this recipe can be built but not run on this machine; empty if it can run.

        Such an engine is pending: `edgekd tune` or `edgekd bench` checks and times it on the machine that runs it.
        """
        return ""

    def host_facts(self) -> dict[str, str]:
        """Return what engines depend on besides the CPU: device, driver and runtime versions, clocks, power mode.

        Manifests and records keep it, and `edgekd compare` compares it. Unreadable facts are omitted.
        """
        return {}

    def incompatibility(self, manifest: Manifest) -> str:
        """Return why an engine cannot run on this machine, as the end of a sentence about it; empty if it can."""
        if self.version() != manifest.backend_version:
            return f"was built by {self.name} {manifest.backend_version}; this machine has {self.version()}"
        return ""

    @property
    def install_command(self) -> str:
        """The shell command that installs the backend."""
        return f"pip install 'edgekd[{self.extra}]'" if self.extra else f"pip install {' '.join(self.packages)}"

    def parse_options(self, recipe: Recipe, *, where: str = "the recipe") -> Any:
        """Parse the recipe's table of this backend into an `options` object.

        Raises:
            ConfigError: Unknown keys or wrong values; `where` names the recipe.
        """
        return from_dict(self.options, recipe.options.get(self.name, {}), where=where, at=f"{self.name}.")

    def check_supports(self, recipe: Recipe) -> None:
        """Check that the recipe's precisions are supported and its options request nothing of another backend alone.

        Raises:
            BackendError: They are not; the message lists the backends that support it.
        """
        for other in all_backends():
            feature = other.exclusive_feature(recipe)
            if feature and other.name != self.name:
                what = f"{self.name} has no {feature}"
                raise BackendError(what, fix=f"use --backend {other.name}, or another --recipe")
        for precision in sorted(recipe.precisions - self.supported_precisions):
            others = [b.name for b in all_backends() if recipe.precisions <= b.supported_precisions]
            use = "".join(f"--backend {name}, or " for name in others)
            known = " or ".join(sorted(self.supported_precisions))
            raise BackendError(f"{self.name} has no {precision} kernels", fix=f"use {use}--recipe {known}")


class CpuBackend(Backend[Graph]):
    """A backend that runs on the CPU; warns if an engine was built on another model of CPU.

    Attributes:
        int8_saturates: Sums of 8-bit products saturate on x86 CPUs without VNNI, so weights keep to 7 bits there.
        no_vnni_note: Remark on int8 engines that are built on such a CPU.
    """

    int8_saturates: ClassVar[bool] = False
    no_vnni_note: ClassVar[str] = ""

    def reduces_range(self) -> bool:
        return self.int8_saturates and not exact_int8()

    def build_notes(self, recipe: Recipe) -> list[str]:
        return [self.no_vnni_note] if self.no_vnni_note and recipe.precision == "int8" and not exact_int8() else []

    def incompatibility(self, manifest: Manifest) -> str:
        if reason := super().incompatibility(manifest):
            return reason
        cpu, there = cpu_model(), manifest.host
        if manifest.recipe.precision == "int8" and there.exact_int8 and not exact_int8():
            reason = f"was quantised for a CPU with VNNI; this one ({cpu}) has none"
            if self.int8_saturates:
                return reason
            log.warning("the engine %s: its predictions are the same, but it is slower", reason)
        if there.cpu != cpu:
            log.warning(
                "the engine was built on %s, this machine has %s: its measured times do not apply", there.cpu, cpu
            )
        return ""


AnyBackend: TypeAlias = Backend[Any]

BACKENDS: Registry[type[AnyBackend]] = Registry("backend", "backends", Backend, BUILTIN)


@functools.cache
def get_backend(name: str) -> AnyBackend:
    """Return the backend called `name`, installed or not.

    Raises:
        ConfigError: No such backend (the nearest is given), or a class that lacks methods.
    """
    kind = BACKENDS[name]
    if missing := cast(frozenset[str], getattr(kind, "__abstractmethods__", frozenset())):
        what = f"the backend '{name}' ({kind.__module__}.{kind.__qualname__}) lacks {', '.join(sorted(missing))}"
        raise ConfigError(what, fix="see edgekd.backends.base.Backend")
    return kind()


def find_backend(name: str) -> AnyBackend:
    """Return the installed backend called `name`.

    Raises:
        BackendError: No such backend, or it is not installed.
    """
    if name not in BACKENDS:
        raise BackendError(f"no backend '{name}'", fix=nearest(name, BACKENDS))
    backend = get_backend(name)
    if backend.version() is None:
        raise BackendError(f"{name} is not installed", fix=backend.install_command)
    return backend


def all_backends() -> list[AnyBackend]:
    """Return every registered backend, edgekd's own first."""
    return [get_backend(name) for name in BACKENDS]


def installed() -> list[AnyBackend]:
    """Return the backends that are installed."""
    return [backend for backend in all_backends() if backend.version() is not None]


def package_names() -> list[str]:
    """Return the distributions that backends name, installed or not."""
    return list(dict.fromkeys(package for backend in all_backends() for package in backend.packages))


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read the shipped recipe called `name`, or the TOML file at that path; see `edgekd.config.load`.

    Raises:
        ConfigError: No such recipe; unknown keys or wrong values, also in the backends' tables.
    """
    return config.load(Recipe, "compile", name, overrides=overrides, check=check_options)


def check_options(recipe: Recipe, where: str) -> None:
    """Check each table of backend options.

    Raises:
        ConfigError: A table that belongs to no backend, or unknown keys or wrong values in one.
    """
    for name in recipe.options:
        if name not in BACKENDS:
            raise ConfigError(f"{where}:\n  {name}: no backend has this table", fix=nearest(name, BACKENDS))
        get_backend(name).parse_options(recipe, where=where)


def backend_failure(what: str, error: Exception) -> BackendError:
    """Return the error to raise when a backend's library fails with `error`, of whatever type."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return BackendError(f"{what}: {reason}", fix="try another --backend, or compile again on this machine")
