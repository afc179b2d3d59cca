"""Pooled features at all candidates, and the network's own answers, in one pass, streamed to a file-backed cache."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from edgekd.backends.onnxruntime import OnnxRuntimeRunner, open_graph
from edgekd.conversion.cut_points import CutPoint, with_outputs
from edgekd.conversion.pooling import add_pooling, pooled_size
from edgekd.data.preprocess import Preprocess, opened
from edgekd.files import atomic_folder, temporary_folder
from edgekd.host import default_threads
from edgekd.types import Array, Progress

BATCH = 32
"""Pictures that are read and run together."""
CROP_AREA = 0.7, 1.0
"""Range of the area of a view's crop, as a fraction of the picture's."""


@dataclass(frozen=True)
class Features:
    """Features and answers for N pictures in V views each, the first being the whole picture.

    Attributes:
        pooled: Features (N, V, F) at each candidate, in files.
        logits: The network's logits (N, V, C).
    """

    pooled: tuple[Array, ...]
    logits: Array


@contextlib.contextmanager
def features(
    model: onnx.ModelProto,
    cuts: Sequence[CutPoint],
    pictures: Sequence[tuple[Path, str]],
    preprocess: Preprocess,
    *,
    folder: Path,
    cache: Path | None = None,
    views: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Iterator[Features]:
    """Compute the features of pictures, or take them from the cache, for the duration of a block.

    Memory does not grow with the pictures: they are read, run and stored batch by batch.

    Args:
        model: The network: input `images`, output `logits`.
        cuts: The candidates.
        pictures: Path and SHA-256 of each.
        preprocess: The network's preprocessing.
        folder: Where the files lie during the block.
        cache: Folder that keeps them for the next call with the same network, candidates, pictures and views.
        views: Views of each picture: the picture, and random crops of `CROP_AREA` that are flipped half of the time.
        seed: Seed of the views.
        progress: Called with the pictures done and their number.
    """
    graph = _pooling_graph(model, cuts)
    sizes = [*map(pooled_size, cuts), model.graph.output[0].type.tensor_type.shape.dim[1].dim_value]
    shapes = [(len(pictures), views, size) for size in sizes]
    compute = partial(_compute, graph, shapes, [path for path, _ in pictures], preprocess, seed, progress=progress)
    if cache is None:
        with temporary_folder("features", parent=folder) as kept:
            compute(kept)
            yield _opened(kept, len(shapes))
        return
    key = hashlib.sha256(graph.SerializeToString())
    key.update(repr((preprocess, [digest for _, digest in pictures], views, seed, CROP_AREA)).encode())
    kept = cache / key.hexdigest()[:32]
    if not kept.is_dir():
        with atomic_folder(kept) as part:
            compute(part)
    yield _opened(kept, len(shapes))


def _pooling_graph(model: onnx.ModelProto, cuts: Sequence[CutPoint]) -> onnx.ModelProto:
    """Return the network with the pooled features of each candidate, and the logits, as outputs."""
    pooling = onnx.ModelProto()
    pooling.CopyFrom(model)
    names = [
        add_pooling(pooling.graph, cut, prefix=f"candidate_{k}_", opset=opset_of(model)) for k, cut in enumerate(cuts)
    ]
    return with_outputs(pooling, [*names, model.graph.output[0].name])


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of the ONNX operators of a model."""
    return next(int(one.version) for one in model.opset_import if one.domain in ("", "ai.onnx"))


def opened_graph(model: onnx.ModelProto) -> OnnxRuntimeRunner:
    """Open a graph in ONNX Runtime on the CPU, with all threads that the process may use."""
    return open_graph(model.SerializeToString(), threads=default_threads())


def _compute(
    graph: onnx.ModelProto,
    shapes: Sequence[tuple[int, int, int]],
    paths: Sequence[Path],
    preprocess: Preprocess,
    seed: int,
    folder: Path,
    *,
    progress: Progress | None,
) -> None:
    """Write one file for each candidate and one for the logits into a folder."""
    files = [
        np.lib.format.open_memmap(folder / f"{k}.npy", mode="w+", dtype=np.float32, shape=shape)
        for k, shape in enumerate(shapes)
    ]
    views, network, done = shapes[0][1], opened_graph(graph), 0
    with ThreadPoolExecutor(default_threads()) as pool:
        read = partial(pool.map, partial(_views, preprocess=preprocess, views=views, seed=seed))
        starts = range(0, len(paths), BATCH)
        coming = read(range(BATCH), paths[:BATCH])
        for start in starts:
            images = np.stack(list(coming))  # (n, views, 3, H, W)
            coming = read(range(start + BATCH, start + 2 * BATCH), paths[start + BATCH : start + 2 * BATCH])
            for view in range(views):
                for file, rows in zip(files, network(np.ascontiguousarray(images[:, view]))):
                    file[start : start + len(images), view] = rows
            done += len(images)
            if progress:
                progress(done, len(paths))
    for file in files:
        file.flush()


def _views(index: int, path: Path, *, preprocess: Preprocess, views: int, seed: int) -> Array:
    """Return the views (V, 3, H, W) of a picture."""
    rng = np.random.default_rng((seed, index))
    with opened(path) as image:
        found = [preprocess(image)]
        for _ in range(views - 1):
            side = rng.uniform(*CROP_AREA) ** 0.5
            width, height = (max(round(length * side), 1) for length in image.size)
            left, top = (int(rng.integers(n - m + 1)) for n, m in zip(image.size, (width, height)))
            view = preprocess(image.crop((left, top, left + width, top + height)))
            found.append(view[:, :, ::-1] if rng.random() < 0.5 else view)
    return np.stack(found)


def _opened(folder: Path, count: int) -> Features:
    *pooled, logits = (np.load(folder / f"{k}.npy", mmap_mode="r") for k in range(count))
    return Features(tuple(pooled), logits)
