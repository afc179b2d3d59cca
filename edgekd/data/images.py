"""Files and pictures to a batch, decoded in a thread pool (Pillow frees the interpreter while it decodes)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgekd.data.preprocess import File, Preprocess, opened, to_rgb
from edgekd.data.split import Item, Split, Subset
from edgekd.errors import DataError
from edgekd.files import sha256
from edgekd.host import default_threads
from edgekd.types import Array, Progress

Source: TypeAlias = File | Image.Image | npt.NDArray[np.uint8]


def load(source: Source, preprocess: Preprocess) -> Array:
    """One picture to float32 (3, H, W).

    source: a path, the bytes of an image file, one that is open for reading in binary, a Pillow image, or a uint8
        array in RGB order (H, W, 3) or grey (H, W) or (H, W, 1).

    Raises:
        DataError: the file cannot be used (it is named), or the array is no picture.
    """
    if isinstance(source, Image.Image):
        return preprocess(to_rgb(source))
    if isinstance(source, np.ndarray) or not (isinstance(source, (str, Path, bytes)) or hasattr(source, "read")):
        return preprocess(to_rgb(_picture(source)))
    with opened(source) as image:
        return preprocess(image)


def _picture(pixels: Any) -> Image.Image:
    shape: tuple[int, ...] = getattr(pixels, "shape", ())
    dtype = getattr(pixels, "dtype", type(pixels).__name__)
    if dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))) or 0 in shape:
        raise DataError(
            f"{dtype} of shape {tuple(shape)} is no picture",
            fix="give a path, a file or its bytes, a Pillow image, or a uint8 array (H, W, 3) in RGB order",
        )
    return Image.fromarray(pixels[:, :, 0] if shape[2:] == (1,) else pixels)


def load_batch(paths: Sequence[Source], preprocess: Preprocess, *, progress: Progress | None = None) -> Array:
    """N sources (see `load`) to float32 (N, 3, H, W), in their order.

    Raises:
        DataError: the first that cannot be used; a file is named.
    """
    size = preprocess.image_size
    batch = np.empty((len(paths), 3, size, size), np.float32)
    with ThreadPoolExecutor(default_threads()) as pool:
        for done, pixels in enumerate(pool.map(partial(load, preprocess=preprocess), paths), start=1):
            batch[done - 1] = pixels
            if progress:
                progress(done, len(paths))
    return batch


def load_subset(
    split: Split,
    subset: Subset,
    *,
    data: Path,
    preprocess: Preprocess,
    limit: int | None = None,
    progress: Progress | None = None,
) -> tuple[Array, npt.NDArray[np.int64]]:
    """One part of a split: images (N, 3, H, W) and labels (N,).

    limit: at most so many, spread evenly over the part (which is sorted by class), the same ones each time.

    Raises:
        ArtifactError: the split has no such part. DataError: files are missing from `data`, were changed since the
            split was made, or cannot be used.
    """
    items = _spread(split.subset(subset), limit)
    require_unchanged(items, data, what=f"{subset} images")
    images = load_batch([data / item.path for item in items], preprocess, progress=progress)
    return images, np.array([item.label for item in items], np.int64)


def require_unchanged(items: Sequence[Item], data: Path, *, what: str = "images") -> None:
    """Compare image files with the SHA-256 that a split has of them. what: how errors call them.

    Raises:
        DataError: files that are missing from `data` or were changed since; some are named.
    """
    with ThreadPoolExecutor(default_threads()) as pool:
        found = list(pool.map(lambda item: _digest(data / item.path), items))
    missing = [item.path for item, digest in zip(items, found) if digest is None]
    if missing:
        raise DataError(
            f"{data} lacks {_counted(missing, items, what)}",
            fix="give the folder that the split was made from with --data",
        )
    if changed := [item.path for item, digest in zip(items, found) if item.digest not in ("", digest)]:
        raise DataError(
            f"{data} holds other pictures than the split was made of: {_counted(changed, items, what)}",
            fix="bring back the pictures, or make a new split and train on it",
        )


def _digest(path: Path) -> str | None:
    try:
        return sha256(path) if path.is_file() else None
    except OSError:  # such names cannot be, or it may not be read
        return None


def _counted(some: Sequence[str], items: Sequence[Item], what: str) -> str:
    return f"{len(some)} of the split's {len(items)} {what}: {', '.join(some[:3])}" + (", …" if some[3:] else "")


def _spread(items: tuple[Item, ...], limit: int | None) -> tuple[Item, ...]:
    if limit is None or limit >= len(items):
        return items
    return tuple(items[i * len(items) // limit] for i in range(limit))
