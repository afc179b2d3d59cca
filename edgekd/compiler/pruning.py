"""Removal of exits from a compiled engine: their heads are cut out of its graph, and their stages merged.

The engine's folder keeps the network that its graphs were built from, quantised already, so the same backend builds the
pruned engine without calibration images, and the logits of the exits that are kept stay what they were.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

from edgekd._version import __version__
from edgekd.artifacts import onnx_checks
from edgekd.artifacts.manifest import (
    MANIFEST,
    NETWORK_FILE,
    Accuracy,
    Manifest,
    Parity,
    read_file,
    read_manifest,
    write_manifest,
)
from edgekd.artifacts.partition import keep_exits
from edgekd.backends.base import find_backend
from edgekd.backends.report import describe_host
from edgekd.compiler.build import build_graphs
from edgekd.compiler.gate import FP32_TOLERANCE, logits_of_paths, read_back, stage_times
from edgekd.errors import ArtifactError, ConfigError, GateError
from edgekd.files import atomic_folder, temporary_folder
from edgekd.progress import Span
from edgekd.runtime.engine import Engine, built_engine, open_engine
from edgekd.types import Array, Progress

CHECKED_IMAGES = 64
"""Images on which the logits before and after are compared."""
REDUCED_TOLERANCE = 0.05
"""Allowed difference of logits in reduced precision where parity was not measured, as a fraction of their range."""


def prune_exits(
    folder: Path,
    keep: Sequence[int],
    *,
    images: Array,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Remove all exits but `keep` from a compiled engine, which is replaced if the result passes its checks.

    Args:
        folder: The engine folder.
        keep: Indices of the exits to keep, rising; the last exit is one of them. With the last exit alone, the engine
            becomes the plain network.
        images: Preprocessed images (N, 3, H, W) on which the logits are compared and the stages timed.
        threads: CPU threads of the engine.
        progress: Called with the percentage done and 100.

    Returns:
        The manifest. The policy is that of the exits kept; the tuning and its curve, which belonged to the engine as it
        was, are gone.

    Raises:
        ConfigError: `keep` are no such exits.
        ArtifactError: See `open_engine`; or the engine does not contain its network.
        BackendError: The backend cannot build the graphs.
        GateError: The logits of the exits kept have changed.
    """
    before = open_engine(folder, threads=threads)
    with temporary_folder("pruned") as out:
        manifest = write_pruned(before, folder, keep, out, images=images, span=Span(progress))
        replace_engine(folder, out, digest=before.digest)
    before.close()
    return manifest


def write_pruned(
    before: Engine, folder: Path, keep: Sequence[int], out: Path, *, images: Array, span: Span
) -> Manifest:
    """Write an engine with the exits `keep` of another one; see `prune_exits`.

    Args:
        before: The engine as it is, opened.
        folder: Its folder.
        keep: Indices of the exits to keep.
        out: Folder to write to.
        images: See `prune_exits`.
        span: Progress.
    """
    old, exits = before.manifest, len(before.metadata.exits)
    if old is None:
        raise ConfigError(f"{folder} is not an engine folder", fix="compile it first")
    if not keep or list(keep) != sorted(set(keep)) or keep[0] < 0 or keep[-1] != exits - 1:
        raise ConfigError(
            f"cannot keep the exits {list(keep)} of {folder}", fix=f"give rising indices that end in {exits - 1}"
        )
    backend = find_backend(old.backend)
    model, metadata = keep_exits(read_network(folder, old), before.metadata, keep)
    files = build_graphs(backend, out, model, metadata, recipe=old.recipe, span=span.part(0.7))
    built = dataclasses.replace(
        old,
        metadata=metadata,
        precision=read_back(out, metadata, backend, recipe=old.recipe),
        host=describe_host(backend.name),
        files=files,
        parity=_kept_parity(old.parity, keep),
        accuracy=_kept_accuracy(old.accuracy, keep),
        stage_ms={},
        curve=(),
        tuning=None,
        certificate=None,
        edgekd=__version__,
    )
    after = built_engine(out, built, threads=before.threads)
    _check_logits(before, after, keep, images[:CHECKED_IMAGES])
    span.part(0.15).fraction(1)
    stage_ms, _ = stage_times(after, images, sizes=old.recipe.batch_sizes)
    manifest = dataclasses.replace(built, stage_ms=stage_ms)
    write_manifest(out, manifest)
    after.close()
    span.fraction(1)
    return read_manifest(out)


def read_network(folder: Path, manifest: Manifest) -> onnx.ModelProto:
    """Read the network that an engine was built from, as quantised.

    Raises:
        ArtifactError: The engine does not contain it, or the file is damaged.
    """
    again = "compile it again"
    if NETWORK_FILE not in manifest.files:
        raise ArtifactError(f"{folder} was compiled without {NETWORK_FILE}, so no exit can be cut out", fix=again)
    if not (folder / NETWORK_FILE).is_file():
        raise ArtifactError(f"{folder} is a copy without {NETWORK_FILE}, so no exit can be cut out", fix=again)
    try:
        return onnx_checks.parse(read_file(folder / NETWORK_FILE, manifest))
    except ValueError as error:
        raise ArtifactError(f"{folder / NETWORK_FILE} is not a network built by edgekd: {error}", fix=again) from None


def replace_engine(folder: Path, other: Path, *, digest: str) -> None:
    """Replace an engine by another one, at once; files in its folder that are not its own stay.

    Args:
        folder: The engine folder.
        other: Folder of the other engine.
        digest: Digest that the engine has had.

    Raises:
        ArtifactError: It has changed since.
    """
    with atomic_folder(folder) as new:
        old = read_manifest(folder)
        if old.digest != digest:
            raise ArtifactError(f"{folder} was rewritten while exits were cut out of it", fix="tune it again")
        own = {*old.files, MANIFEST}
        kept = [path for path in folder.iterdir() if path.name not in own and not path.name.startswith(".")]
        for path in [*kept, *other.iterdir()]:
            if path.is_dir():
                shutil.copytree(path, new / path.name)
            else:
                shutil.copy2(path, new / path.name)


def _kept_parity(parity: Parity | None, keep: Sequence[int]) -> Parity | None:
    if parity is None:
        return None

    def kept(differences: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(differences[k] for k in keep)

    by_size = (
        dataclasses.replace(p, max_abs_logit_difference=kept(p.max_abs_logit_difference)) for p in parity.by_batch_size
    )
    return dataclasses.replace(
        parity, max_abs_logit_difference=kept(parity.max_abs_logit_difference), by_batch_size=tuple(by_size)
    )


def _kept_accuracy(accuracy: Accuracy | None, keep: Sequence[int]) -> Accuracy | None:
    """Return the accuracies of the exits kept; that of the ensemble, which is another one now, is unknown."""
    if accuracy is None:
        return None
    return dataclasses.replace(
        accuracy,
        reference=tuple(accuracy.reference[k] for k in keep),
        engine=tuple(accuracy.engine[k] for k in keep),
        predictions={name: of for name, of in accuracy.predictions.items() if name == "final"},
    )


def _check_logits(before: Engine, after: Engine, keep: Sequence[int], images: Array) -> None:
    """Compare the logits of the exits kept, in every path and batch size that the gate checks.

    They may differ by what the engine's own graphs differ among each other, or from student.onnx: merged stages are
    fused in another way.

    Raises:
        GateError: They differ by more.
    """
    assert before.manifest is not None  # an engine folder
    recipe, parity = before.manifest.recipe, before.manifest.parity
    sizes = sorted(set(recipe.batch_sizes)) if before.largest_batch else [32]
    for size in sizes:
        old = np.stack(logits_of_paths(before, images, batch_size=size))[:, list(keep)]  # (paths, exits, N, C)
        new = np.stack(logits_of_paths(after, images, batch_size=size))
        limits = np.maximum(np.ptp(old, axis=0).max(axis=(1, 2)), FP32_TOLERANCE)
        if parity:
            limits = np.maximum(limits, [parity.max_abs_logit_difference[k] for k in keep])
        elif recipe.precision != "fp32":
            limits = np.maximum(limits, REDUCED_TOLERANCE * np.ptp(old))
        found = np.abs(new - old[0]).max(axis=(0, 2, 3))
        for k, difference, limit in zip(keep, found, limits):
            if not difference <= limit:  # nor if it is not a number
                what = f"{before.name} without the other exits: the logits of exit_{k} differ by {difference:.2e}"
                raise GateError(f"{what} (limit {limit:.0e})", fix="use --keep-exits, and please report this network")
