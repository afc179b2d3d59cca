"""Opening compiled engines, with the checks that they can run on this machine."""

from __future__ import annotations

import functools
import logging
import os
import platform
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import onnx

from edgekd.artifacts.manifest import NETWORK, NETWORK_FILE, STUDENT, STUDENT_FILE, Manifest, read_file, read_manifest
from edgekd.artifacts.metadata import ModelMetadata, read_onnx
from edgekd.artifacts.partition import graph, graph_names, with_shapes
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import REFERENCE, AnyBackend, find_backend
from edgekd.backends.runner import CompiledGraph, DeviceCascade, Runner, StagedRunner
from edgekd.errors import ArtifactError, BackendError, ConfigError
from edgekd.files import recover
from edgekd.host import checked_threads
from edgekd.policy import Policy
from edgekd.types import Array, Progress

log = logging.getLogger(__name__)

_alive: weakref.WeakSet[Engine] = weakref.WeakSet()
_inherited: list[tuple[str, list[Runner]]] = []
"""Backends and graphs of the process that this one was forked from. Their threads are not in this process, so using or
freeing them here may hang."""


def _forked() -> None:
    _inherited.extend((engine.backend.name, list(engine._runners.values())) for engine in _alive)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class Engine:
    """The graphs of one compiled network, each loaded when first used. Threads may share it and its runners.

    It belongs to the process that opened it: a process forked from that one cannot use it.

    Args:
        metadata: Classes, preprocessing, exits and policy.
        load: Loads the graph called `stage_0`, … or, where built, `monolithic` or `final`.
        backend: The backend that loads them.
        recipe: The recipe that they were compiled with.
        threads: CPU threads to use.
        manifest: None when opened from student.onnx.

    Attributes:
        digest: SHA-256 of what was opened, of the manifest or of student.onnx.
        name: Backend and precision, for tables.
        largest_batch: Largest batch of a staged run; None for any.
    """

    def __init__(
        self,
        metadata: ModelMetadata,
        load: Callable[[str], CompiledGraph],
        *,
        backend: AnyBackend,
        recipe: Recipe,
        threads: int,
        manifest: Manifest | None = None,
    ) -> None:
        self.metadata = metadata
        self.manifest = manifest
        self.digest = manifest.digest if manifest else metadata.sha256
        self.backend = backend
        self.name = f"{backend.name} {backend.recipe_name(recipe)}"
        self.threads = threads
        self.largest_batch = max(recipe.batch_sizes) if backend.fixed_batch_sizes else None
        self._load = load
        self._runners: dict[str, CompiledGraph] = {}
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._is_closed = False
        _alive.add(self)

    def close(self) -> None:
        """Free the graphs. The engine cannot be used afterwards."""
        self._is_closed = True
        self._runners.clear()

    def check_usable(self) -> None:
        """Check that the engine can be used in this process.

        Raises:
            BackendError: It is closed, or this process was forked from the one that opened it.
        """
        if self._is_closed:
            raise BackendError(f"{self.name} is closed", fix="open it again")
        if self._process != os.getpid():
            raise BackendError(
                f"{self.name} was opened before this process was forked, and its threads are not here",
                fix="start processes by multiprocessing's spawn method, or open it in each of them",
            )

    def has(self, graph: str) -> bool:
        """Return True if `monolithic` or `final` was built; all stages in sequence stand in for one that was not."""
        files = self.manifest.files.values() if self.manifest else ()
        return self.manifest is None or len(self.metadata.exits) == 1 or any(file.graph == graph for file in files)

    def stage(self, k: int) -> Runner:
        """Return stage k: images (k = 0) or boundary k-1 to [logits (N, C)] and, but for the last, boundary k."""
        return self._runner(f"stage_{k}")

    def staged_runner(self, exits: int | None = None) -> StagedRunner:
        """Load the stages of the first `exits` exits (None: all); `with runner(images) as run` starts a staged run."""
        return self.backend.staged_runner(self._stages(exits))

    def device_cascade(self, policy: Policy) -> DeviceCascade:
        """Return a cascade for one image in which the device itself applies the exit policy.

        Raises:
            BackendError: The backend, or CUDA on this machine, does not support it.
        """
        return self.backend.device_cascade(self._stages(), policy)

    @property
    def monolithic(self) -> Runner:
        """From images (N, 3, H, W) to the logits (N, C) of every exit: one graph, or all stages in sequence."""
        if self.has("monolithic"):
            return self._runner("monolithic")
        return functools.partial(
            _in_sequence, self.staged_runner(), exits=len(self.metadata.exits), largest=self.largest_batch
        )

    @property
    def final(self) -> Runner:
        """From images (N, 3, H, W) to [the last exit's logits (N, C)]: one graph without the earlier exits' heads.

        Where that was not built, all stages in sequence, heads included.
        """
        if self.has("final"):
            return self._runner("final")
        every = self.monolithic
        return lambda *images: every(*images)[-1:]

    def logits(self, images: Array, *, batch_size: int = 32, progress: Progress | None = None) -> Array:
        """Run every exit on images (N, 3, H, W), in one piece where that was built.

        Args:
            images: The images.
            batch_size: Images of one run.
            progress: Called with the images done and their number.

        Returns:
            The logits of all exits, (E, N, C).
        """
        batches, every = [], self.monolithic
        for start in range(0, len(images), batch_size):
            batches.append(every(images[start : start + batch_size]))
            if progress:
                progress(min(start + batch_size, len(images)), len(images))
        return np.concatenate([np.stack(outputs) for outputs in batches], axis=1, dtype=np.float32)

    def staged_logits(self, images: Array, *, batch_size: int = 32) -> Array:
        """Return the logits of all exits, (E, N, C), by a staged run without early exit."""
        batches = []
        staged_runner, size = self.staged_runner(), min(batch_size, self.largest_batch or batch_size)
        for start in range(0, len(images), size):
            with staged_runner(images[start : start + size]) as run:
                batches.append([run.run_stage() for _ in self.metadata.exits])
        return np.concatenate([np.stack(outputs) for outputs in batches], axis=1, dtype=np.float32)

    def _stages(self, exits: int | None = None) -> list[CompiledGraph]:
        return [self._runner(f"stage_{k}") for k in range(exits or len(self.metadata.exits))]

    def _runner(self, name: str) -> CompiledGraph:
        self.check_usable()
        name = name if len(self.metadata.exits) > 1 else "monolithic"
        with self._lock:
            if name not in self._runners:
                graph = self._load(name)
                _check_shapes(graph, name, self.metadata)
                self._runners[name] = graph
            return self._runners[name]


def _in_sequence(
    staged_runner: StagedRunner, images: npt.NDArray[np.generic], *, exits: int, largest: int | None
) -> list[npt.NDArray[np.generic]]:
    """Return the logits (N, C) of every exit by staged runs of at most `largest` images."""
    size, batches = min(len(images), largest or len(images)), []
    for start in range(0, len(images), size):
        with staged_runner(cast(Array, images[start : start + size])) as run:
            batches.append([run.run_stage() for _ in range(exits)])
    return [np.concatenate(rows) for rows in zip(*batches)] if len(batches) > 1 else [*batches[0]]


def open_engine(path: Path, *, threads: int | None = None, digest: str = "", pending: bool = False) -> Engine:
    """Open student.engine/, or student.onnx in ONNX Runtime FP32.

    A graph that is loaded later is checked against the manifest read here, so an opened engine never changes.

    Args:
        path: Engine folder or ONNX file.
        threads: CPU threads to use; all that the process may use if None.
        digest: Digest that the engine must have, if not empty.
        pending: Open it even if it was built where it cannot run, and was not checked since.

    Raises:
        ArtifactError: Missing, damaged or edited; built by another backend version or for another kind of machine; of
            another digest; pending.
        BackendError: The backend is not installed.
        ConfigError: Fewer threads than one.
    """
    engine = _open(path, threads=checked_threads(threads), pending=pending)
    if digest and engine.digest != digest:
        raise ArtifactError(f"{path} was replaced since it was opened", fix="run the command again")
    return engine


def _open(path: Path, *, threads: int, pending: bool) -> Engine:
    recover(path)
    if not path.is_dir():
        return reference_engine(*read_onnx(path), threads=threads)
    manifest = read_manifest(path)
    if manifest.pending and not pending:
        what = f"{path} is pending: it was built where it cannot run, and its accuracy and times are unknown"
        raise ArtifactError(what, fix=f"check it on a machine that runs it: edgekd tune {path} --data … --split …")
    check_host(manifest, path)
    _check_files(manifest, path)
    return built_engine(path, manifest, threads=threads)


def reference_engine(model: onnx.ModelProto, metadata: ModelMetadata, *, threads: int) -> Engine:
    """Open student.onnx in FP32, as the reference that engines are compared with.

    Args:
        model: The model.
        metadata: Its metadata.
        threads: CPU threads to use.

    Raises:
        BackendError: ONNX Runtime is not installed.
    """
    backend, recipe = find_backend(REFERENCE), Recipe("fp32")
    model = with_shapes(model)

    def load(name: str) -> CompiledGraph:
        data = graph(model, metadata, name=name).SerializeToString()
        return cast(CompiledGraph, backend.load(Path(name), recipe=recipe, threads=threads, read=lambda _: data))

    return Engine(metadata, load, backend=backend, recipe=recipe, threads=threads)


def built_engine(folder: Path, manifest: Manifest, *, threads: int) -> Engine:
    """Open the engine whose files are in `folder`; they are checked when they are loaded.

    Args:
        folder: The engine folder.
        manifest: Its manifest.
        threads: CPU threads to use.

    Raises:
        BackendError: The backend is not installed, or was in use when this process was forked.
    """
    backend, recipe = find_backend(manifest.backend), manifest.recipe
    if not backend.works_after_fork and backend.name in dict(_inherited):
        raise BackendError(
            f"{backend.name} was in use when this process was forked, and cannot be used here",
            fix="start processes by multiprocessing's spawn method, or close engines before the fork",
        )

    def load(name: str) -> CompiledGraph:
        read = functools.partial(read_file, manifest=manifest)
        path = folder / f"{name}{backend.suffix}"
        return cast(CompiledGraph, backend.load(path, recipe=recipe, threads=threads, read=read))

    return Engine(manifest.metadata, load, backend=backend, recipe=recipe, threads=threads, manifest=manifest)


def _check_shapes(graph: CompiledGraph, name: str, metadata: ModelMetadata) -> None:
    """Check the shapes of a graph's input and logits against the metadata.

    Raises:
        ArtifactError: They differ.
    """
    image = (3, metadata.preprocess.image_size, metadata.preprocess.image_size)
    read, logits = graph.row_shapes
    if name in ("stage_0", "monolithic", "final") and read != image:
        raise ArtifactError(f"{name} reads {read}, its metadata states {image}", fix="compile again")
    if logits != (len(metadata.classes),):
        raise ArtifactError(
            f"{name} gives {logits}, its metadata has {len(metadata.classes)} classes", fix="compile again"
        )


def _check_files(manifest: Manifest, path: Path) -> None:
    """Check that the manifest lists the files of these graphs, as this backend writes them, and no others.

    `WHOLE` graphs and `NETWORK_FILE` may be among them; engines of earlier versions have no `NETWORK_FILE`. Pending
    engines have `STUDENT_FILE`.

    Raises:
        ArtifactError: It does not.
    """
    suffixes = find_backend(manifest.backend).suffixes(manifest.recipe)
    found = {name: file.graph for name, file in manifest.files.items() if (name, file.graph) != (NETWORK_FILE, NETWORK)}
    needed, every = (graph_names(manifest.metadata, whole=whole) for whole in (False, True))
    names = [name for name in every if name in needed or name in found.values()]
    expected = {f"{name}{suffix}": name for name in names for suffix in suffixes}
    expected |= {STUDENT_FILE: STUDENT} if manifest.pending else {}
    if found != expected:
        odd = min(found.items() ^ expected.items())[0]
        what = f"{path}: its manifest lists other files than the graphs of {manifest.backend}: {odd}"
        raise ArtifactError(what, fix="compile again")


def _machine(name: str) -> str:
    """Return an architecture's name on Linux for the one on Windows."""
    return "x86_64" if name == "AMD64" else name


def check_host(manifest: Manifest, path: Path) -> None:
    """Check that an engine can run on this machine; another CPU of the same kind is logged only.

    Raises:
        ArtifactError: Damaged options, another system or architecture, or one of `Backend.incompatibility`.
    """
    backend, there = find_backend(manifest.backend), manifest.host
    try:
        backend.parse_options(manifest.recipe, where=f"{path}: recipe")
    except ConfigError as error:
        raise ArtifactError(error.what, fix="compile again") from None
    rebuild = (
        f"build it again on this machine: edgekd compile student.onnx --recipe {backend.recipe_name(manifest.recipe)} "
        f"--backend {manifest.backend} --out {path}"
    )
    for key, built_on, found in (
        ("system", there.system, platform.system()),
        ("machine", _machine(there.machine), _machine(platform.machine())),
    ):
        if built_on != found and not (key == "system" and backend.across_systems):
            raise ArtifactError(f"{path} was built on {key} {built_on}; this machine has {found}", fix=rebuild)
    if reason := backend.incompatibility(manifest):
        raise ArtifactError(f"{path} {reason}", fix=rebuild)
