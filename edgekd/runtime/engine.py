"""Opening what was compiled, with the checks that it may run here."""

from __future__ import annotations

import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from edgekd.artifacts.manifest import Manifest, read_file, read_manifest
from edgekd.artifacts.metadata import ModelMetadata, read_onnx
from edgekd.artifacts.partition import graph, graph_names, with_shapes
from edgekd.artifacts.recipe import Recipe
from edgekd.backends import onnxruntime
from edgekd.backends.base import Decider, Loaded, Runner, StagedRunner, find_backend
from edgekd.backends.staged import host_staged_runner
from edgekd.errors import ArtifactError, BackendError
from edgekd.files import recover
from edgekd.host import checked_threads, host_info
from edgekd.policy import Policy
from edgekd.schema import from_dict
from edgekd.types import Array

log = logging.getLogger(__name__)

_alive: weakref.WeakSet[Engine] = weakref.WeakSet()
_inherited: list[tuple[str, list[Runner]]] = []
"""Backends and graphs of the process that this one was forked from. Their threads stayed there, so that to use or free
them here may never end."""


def _forked() -> None:
    _inherited.extend((engine.backend, list(engine._runners.values())) for engine in _alive)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class Engine:
    """The graphs of one compiled network, each loaded when first asked for. Threads may share it and its runners.

    It belongs to the process that opened it: a process forked from that one cannot use it.

    metadata: classes, preprocessing, exits and policy. manifest: None when opened from student.onnx.
    digest: SHA-256 of what was opened, of the manifest or of student.onnx.
    name: backend and precision, for tables. largest_batch: that walkers take; None for any.
    """

    def __init__(
        self,
        metadata: ModelMetadata,
        load: Callable[[str], Runner],
        *,
        backend: str,
        precision: str,
        threads: int,
        manifest: Manifest | None = None,
        make_staged_runner: Callable[[Sequence[Runner]], StagedRunner] | None = None,
        make_decider: Callable[[Sequence[Runner], Policy], Decider] | None = None,
        largest_batch: int | None = None,
    ) -> None:
        self.metadata = metadata
        self.manifest = manifest
        self.digest = manifest.digest if manifest else metadata.sha256
        self.backend = backend
        self.name = f"{backend} {precision}"
        self.threads = threads
        self.largest_batch = largest_batch
        self._load = load
        self._make_staged_runner = make_staged_runner or host_staged_runner
        self._make_decider = make_decider
        self._runners: dict[str, Runner] = {}
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._is_closed = False
        _alive.add(self)

    def close(self) -> None:
        """Free the graphs. The engine cannot be used afterwards."""
        self._is_closed = True
        self._runners.clear()

    def check_usable(self) -> None:
        """Whether it can be used here.

        Raises:
            BackendError: closed, or this process was forked from the one that opened it.
        """
        if self._is_closed:
            raise BackendError(f"{self.name} is closed", fix="open it again")
        if self._process != os.getpid():
            raise BackendError(
                f"{self.name} was opened before this process was forked, and its threads are not here",
                fix="start processes by multiprocessing's spawn method, or open it in each of them",
            )

    def stage(self, k: int) -> Runner:
        """Images (k = 0) or the tensors of boundary k-1 to [logits (N, C)] and, but for the last, boundary k."""
        return self._runner(f"stage_{k}")

    def staged_runner(self, exits: int | None = None) -> StagedRunner:
        """Load the stages up to so many exits, all if None; `with walker(images) as walk` sends a batch along."""
        return self._make_staged_runner([self.stage(k) for k in range(exits or len(self.metadata.exits))])

    def decider(self, policy: Policy) -> Decider:
        """The cascade of one image, with nobody but the device deciding when it ends.

        Raises:
            BackendError: the backend, or CUDA here, has no such thing.
        """
        if self._make_decider is None:
            what = f"{self.backend} cannot decide on the device when to stop"
            raise BackendError(what, fix="leave out --device-side-exit")
        return self._make_decider([self.stage(k) for k in range(len(self.metadata.exits))], policy)

    @property
    def monolithic(self) -> Runner:
        """Images (N, 3, H, W) to the logits (N, C) of every exit."""
        return self._runner("monolithic")

    @property
    def final(self) -> Runner:
        """Images (N, 3, H, W) to [the last exit's logits (N, C)]: the network without its shallow exits."""
        return self._runner("final")

    def logits(self, images: Array, *, batch_size: int = 32) -> Array:
        """Images (N, 3, H, W) to the logits of all exits, (E, N, C)."""
        batches = [self.monolithic(images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
        return np.concatenate([np.stack(outputs) for outputs in batches], axis=1, dtype=np.float32)

    def staged_logits(self, images: Array, *, batch_size: int = 32) -> Array:
        """The same through the stages one after the other, as a cascade in which nobody leaves."""
        batches = []
        staged_runner, size = self.staged_runner(), min(batch_size, self.largest_batch or batch_size)
        for start in range(0, len(images), size):
            with staged_runner(images[start : start + size]) as run:
                batches.append([run.run_stage() for _ in self.metadata.exits])
        return np.concatenate([np.stack(outputs) for outputs in batches], axis=1, dtype=np.float32)

    def _runner(self, name: str) -> Runner:
        self.check_usable()
        name = name if len(self.metadata.exits) > 1 else "monolithic"
        with self._lock:
            if name not in self._runners:
                self._runners[name] = self._load(name)
            return self._runners[name]


def open_engine(path: Path, *, threads: int | None = None, digest: str = "") -> Engine:
    """Open student.engine/, or student.onnx in ONNX Runtime FP32.

    What is open stays what it was: a graph that is loaded later is checked against the manifest as it was read here.
    threads: cores to use; all that the process may use if None. digest: of the engine that it has to be, if any.

    Raises:
        ArtifactError: missing, damaged or edited; built by another backend version or for another kind of machine; not
            the one of this digest.
        BackendError: the backend is not installed.
        ConfigError: fewer threads than one.
    """
    engine = _open(path, threads=checked_threads(threads))
    if digest and engine.digest != digest:
        raise ArtifactError(f"{path} was replaced since it was opened", fix="run the command again")
    return engine


def _open(path: Path, *, threads: int) -> Engine:
    recover(path)
    if path.is_dir():
        manifest = read_manifest(path)
        check_host(manifest, path)
        _check_files(manifest, path)
        return built_engine(path, manifest, threads=threads)
    find_backend("onnxruntime")
    model, metadata = read_onnx(path)
    model = with_shapes(model)

    def load(name: str) -> Runner:
        data = graph(model, metadata, name=name).SerializeToString()
        return _checked(onnxruntime.load(data, recipe=Recipe("fp32"), threads=threads), name, metadata)

    staged_runner = onnxruntime.staged_runner
    return Engine(
        metadata, load, backend="onnxruntime", precision="fp32", threads=threads, make_staged_runner=staged_runner
    )


def built_engine(folder: Path, manifest: Manifest, *, threads: int) -> Engine:
    """The engine whose files lie in `folder`; they are checked when they are loaded."""
    backend = find_backend(manifest.backend)
    recipe = from_dict(Recipe, manifest.recipe, where=f"{folder}: recipe", error=ArtifactError)
    if manifest.backend != "onnxruntime" and manifest.backend in dict(_inherited):
        raise BackendError(
            f"{manifest.backend} was in use when this process was forked, and cannot be used here",
            fix="start processes by multiprocessing's spawn method, or close engines before the fork",
        )

    def load(name: str) -> Runner:
        path = folder / f"{name}{backend.SUFFIX}"
        read = functools.partial(read_file, manifest=manifest)
        return _checked(backend.load(path, recipe=recipe, threads=threads, read=read), name, manifest.metadata)

    return Engine(
        manifest.metadata,
        load,
        backend=manifest.backend,
        precision=recipe.name,
        threads=threads,
        manifest=manifest,
        make_staged_runner=getattr(backend, "staged_runner", None),
        make_decider=getattr(backend, "decider", None),
        largest_batch=None if backend.ANY_BATCH else max(recipe.batch_sizes),
    )


def _checked(runner: Loaded, name: str, metadata: ModelMetadata) -> Runner:
    """A graph that reads and answers what the metadata says.

    Raises:
        ArtifactError: it does not.
    """
    image = (3, metadata.preprocess.image_size, metadata.preprocess.image_size)
    read, answered = runner.ends
    if name in ("stage_0", "monolithic", "final") and read != image:
        raise ArtifactError(f"{name} reads {read}, its metadata says {image}", fix="compile again")
    if answered != (len(metadata.classes),):
        raise ArtifactError(
            f"{name} answers {answered}, its metadata has {len(metadata.classes)} classes", fix="compile again"
        )
    return runner


def _check_files(manifest: Manifest, path: Path) -> None:
    """Whether the files are the graphs of this metadata, as this backend writes them, and no others.

    Raises:
        ArtifactError: they are not.
    """
    recipe = from_dict(Recipe, manifest.recipe, where=f"{path}: recipe", error=ArtifactError)
    suffixes = find_backend(manifest.backend).suffixes(recipe)
    asked = {f"{name}{suffix}": name for name in graph_names(manifest.metadata) for suffix in suffixes}
    found = {name: file.graph for name, file in manifest.files.items()}
    if found != asked:
        odd = min(found.items() ^ asked.items())[0]
        what = f"{path}: its manifest lists other files than the graphs of {manifest.backend}: {odd}"
        raise ArtifactError(what, fix="compile again")


def check_host(manifest: Manifest, path: Path) -> None:
    """Whether an engine built there may run here; another CPU of the same kind is only said in the log.

    Raises:
        ArtifactError: another backend version, system or architecture, or a CPU whose 8-bit sums would saturate.
    """
    recipe = from_dict(Recipe, manifest.recipe, where=f"{path}: recipe", error=ArtifactError)
    rebuild = (
        f"build it again on this machine: edgekd compile student.onnx --recipe {recipe.name} "
        f"--backend {manifest.backend} --out {path}"
    )
    backend, here, there = find_backend(manifest.backend), host_info(), manifest.host
    for key in ("system", "machine"):
        built_on, found = getattr(there, key), getattr(here, key)
        if built_on != found:
            raise ArtifactError(f"{path} was built on {key} {built_on}; here is {found}", fix=rebuild)
    if hasattr(backend, "refusal"):
        if why := backend.refusal(manifest):
            raise ArtifactError(f"{path} {why}", fix=rebuild)
        return
    if backend.version() != manifest.backend_version:
        what = f"{path} was built by {manifest.backend} {manifest.backend_version}; here is {backend.version()}"
        raise ArtifactError(what, fix=rebuild)
    if recipe.precision == "int8" and there.exact_int8 and not here.exact_int8:
        what = f"{path} was quantised for a CPU with VNNI; this one ({here.cpu}) has none"
        if backend.SATURATES:
            raise ArtifactError(what, fix=rebuild)
        log.warning("%s: it answers the same here, and takes longer", what)
    if there.cpu != here.cpu:
        log.warning("%s was built on %s; here is %s: its times do not hold", path, there.cpu, here.cpu)
