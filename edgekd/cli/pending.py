"""The check of a pending engine, before a command uses it."""

from __future__ import annotations

from pathlib import Path


def complete_pending(engine: Path, data: Path, split: Path | None, *, threads: int | None = None) -> None:
    """Check and time an engine that was built where it cannot run; does nothing to any other.

    The images are those that `edgekd compile` would take: the validation split, or else pictures that the network has
    learned from.

    Raises:
        ArtifactError, BackendError: It cannot run here, either.
        GateError: It is not accurate enough, and stays pending.
    """
    from edgekd.artifacts.manifest import is_pending

    if not is_pending(engine):
        return
    from edgekd.cli.common import bar, echo, read_or_scan
    from edgekd.cli.compile import seen_pictures
    from edgekd.compiler.pending import complete, float_network
    from edgekd.data.images import load_subset
    from edgekd.runtime.engine import open_engine

    opened = open_engine(engine, threads=threads, pending=True)  # before images are read: it may not run here, either
    assert opened.manifest is not None, "a pending engine has one"
    metadata = opened.metadata
    with bar("read images") as progress:
        if split is None:
            _, (images, labels) = seen_pictures(float_network(engine), data, opened.manifest.recipe, progress)
        else:
            found = read_or_scan(data, split, metadata.classes)
            images, labels = load_subset(found, "val", data=data, preprocess=metadata.preprocess, progress=progress)
    manifest = complete(engine, images, labels, threads=threads)
    echo(f"{engine} was pending; it is now checked against its float network, and timed")
    for note in manifest.notes:
        echo(f"note: {note}")
