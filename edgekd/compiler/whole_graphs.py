"""The graphs `monolithic` and `final` for an engine that was compiled as stages alone, where something needs them.

`final` is the plain network, with which the cascade is compared; `monolithic` is all exits in one piece. They are cut
out of the network that the engine keeps, so the same backend builds them without calibration images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from edgekd.artifacts.manifest import NETWORK, NETWORK_FILE, write_manifest
from edgekd.artifacts.partition import graphs
from edgekd.compiler.build import build_parts
from edgekd.compiler.pruning import read_network, replace_engine
from edgekd.errors import ArtifactError
from edgekd.files import temporary_folder
from edgekd.progress import Span
from edgekd.runtime.engine import Engine, open_engine


def write_with_graphs(engine: Engine, folder: Path, names: Collection[str], out: Path) -> Path:
    """Write a copy of an engine that also has the graphs called `names`.

    Args:
        engine: The engine, opened.
        folder: Its folder.
        names: Of `WHOLE`.
        out: Folder to write to; it is made.

    Returns:
        `out`, or `folder` if the engine has these graphs.

    Raises:
        ArtifactError: The engine was copied here without its network.
        BackendError: The backend cannot build a graph.
    """
    manifest, missing = engine.manifest, [name for name in names if not engine.has(name)]
    if manifest is None or not missing:
        return folder
    try:
        model = read_network(folder, manifest)
    except ArtifactError as error:
        what = f"{folder} consists of stages alone, and cannot be compared with the network in one piece: {error.what}"
        raise ArtifactError(what, fix="compile it again with --graphs all") from None
    out.mkdir(parents=True)
    for name, file in manifest.files.items():
        if file.graph != NETWORK:
            shutil.copy2(folder / name, out / name)
    parts = graphs(model, manifest.metadata, missing)
    files = build_parts(engine.backend, out, parts, recipe=manifest.recipe, span=Span(None))
    write_manifest(out, dataclasses.replace(manifest, files=manifest.files | files))
    return out


@contextlib.contextmanager
def with_graphs(engine: Engine, folder: Path, names: Collection[str]) -> Iterator[Engine]:
    """Provide an engine that also has the graphs called `names`, built if need be, for the duration of a block.

    Args:
        engine: The engine, opened.
        folder: Its folder.
        names: Of `WHOLE`.

    Raises:
        ArtifactError, BackendError: See `write_with_graphs`.
    """
    if all(map(engine.has, names)):
        yield engine
        return
    with temporary_folder("graphs") as temporary:
        complete = open_engine(write_with_graphs(engine, folder, names, temporary / "engine"), threads=engine.threads)
        try:
            yield complete
        finally:
            complete.close()


def add_final(engine: Engine, folder: Path) -> Engine:
    """Add the graph `final` to an engine folder, for a policy that runs it; return the engine, opened again.

    An engine that was copied without its network stays as it is: its stages run in sequence.
    """
    if engine.has("final") or not (folder / NETWORK_FILE).is_file():
        return engine
    with temporary_folder("final") as temporary:
        out = write_with_graphs(engine, folder, ["final"], temporary / "engine")
        shutil.copy2(folder / NETWORK_FILE, out / NETWORK_FILE)
        replace_engine(folder, out, digest=engine.digest)
    engine.close()
    return open_engine(folder, threads=engine.threads)
