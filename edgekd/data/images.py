"""Loading images into batches, decoded in a thread pool (Pillow releases the GIL while it decodes)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """Load one image as the network's input, float32 (3, H, W).

    Args:
        source: A path, the bytes of an image file, a file opened for reading in binary mode, a Pillow image, or a uint8
            array in RGB order (H, W, 3) or grey (H, W) or (H, W, 1).
        preprocess: The network's preprocessing.

    Raises:
        DataError: An unusable file, which is named, or an array that is not an image.
    """
    if isinstance(source, Image.Image):
        return preprocess(to_rgb(source))
    if isinstance(source, np.ndarray) or not (isinstance(source, (str, Path, bytes)) or hasattr(source, "read")):
        return preprocess(to_rgb(_from_array(source)))
    with opened(source) as image:
        return preprocess(image)


def _from_array(pixels: Any) -> Image.Image:
    shape: tuple[int, ...] = getattr(pixels, "shape", ())
    dtype = getattr(pixels, "dtype", type(pixels).__name__)
    if dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))) or 0 in shape:
        raise DataError(
            f"{dtype} of shape {tuple(shape)} is not an image",
            fix="give a path, a file or its bytes, a Pillow image, or a uint8 array (H, W, 3) in RGB order",
        )
    return Image.fromarray(pixels[:, :, 0] if shape[2:] == (1,) else pixels)


def load_batch(paths: Sequence[Source], preprocess: Preprocess, *, progress: Progress | None = None) -> Array:
    """Load N images as float32 (N, 3, H, W), in their order.

    Args:
        paths: Sources as for `load`.
        preprocess: The network's preprocessing.
        progress: Called with the images loaded and their number.

    Raises:
        DataError: An unusable image; the first one is reported, a file by its name.
    """
    size = preprocess.image_size
    batch = np.empty((len(paths), 3, size, size), np.float32)
    with ThreadPoolExecutor(default_threads()) as pool:
        for done, pixels in enumerate(pool.map(partial(load, preprocess=preprocess), paths), start=1):
            batch[done - 1] = pixels
            if progress:
                progress(done, len(paths))
    return batch


def load_batches(
    paths: Sequence[Source], preprocess: Preprocess, *, batch: int = 32, progress: Progress | None = None
) -> Iterator[Array]:
    """Load images as batches (`batch`, 3, H, W), in their order; the next one is decoded while one is used.

    Memory does not grow with the number of images.

    Args:
        paths: Sources as for `load`.
        preprocess: The network's preprocessing.
        batch: Number of images in each batch but the last.
        progress: Called with the images loaded and their number.

    Raises:
        DataError: An unusable image, which is named.
    """
    with ThreadPoolExecutor(default_threads()) as pool:
        decoding = [pool.submit(load, path, preprocess) for path in paths[:batch]]
        for done in range(0, len(paths), batch):
            ahead = [pool.submit(load, path, preprocess) for path in paths[done + batch : done + 2 * batch]]
            images = np.stack([future.result() for future in decoding])
            if progress:
                progress(done + len(decoding), len(paths))
            yield images
            decoding = ahead


def load_subset(
    split: Split,
    subset: Subset,
    *,
    data: Path,
    preprocess: Preprocess,
    limit: int | None = None,
    progress: Progress | None = None,
) -> tuple[Array, npt.NDArray[np.int64]]:
    """Load one subset of a split.

    Args:
        split: The split.
        subset: Which subset.
        data: The data folder.
        preprocess: The network's preprocessing.
        limit: Largest number of images, spread evenly over the subset (which is sorted by class), always the same ones.
        progress: Called with the images loaded and their number.

    Returns:
        Images (N, 3, H, W) and labels (N,).

    Raises:
        ArtifactError: The split has no such subset.
        DataError: Files are missing from `data`, have changed since the split was made, or are unusable.
    """
    items = _spread(split.subset(subset), limit)
    require_unchanged(items, data, what=f"{subset} images")
    images = load_batch([data / item.path for item in items], preprocess, progress=progress)
    return images, np.array([item.label for item in items], np.int64)


def require_unchanged(items: Sequence[Item], data: Path, *, what: str = "images") -> None:
    """Compare image files with their SHA-256 in the split.

    Args:
        items: The images.
        data: The data folder.
        what: Name of the images in errors.

    Raises:
        DataError: Files are missing from `data` or have changed; some are named.
    """
    with ThreadPoolExecutor(default_threads()) as pool:
        digests = list(pool.map(lambda item: _digest(data / item.path), items))
    missing = [item.path for item, digest in zip(items, digests) if digest is None]
    if missing:
        raise DataError(
            f"{data} lacks {_counted(missing, items, what)}",
            fix="give the folder that the split was made from with --data",
        )
    if changed := [item.path for item, digest in zip(items, digests) if item.digest not in ("", digest)]:
        raise DataError(
            f"{data} has other images than the split: {_counted(changed, items, what)}",
            fix="restore the images, or create a new split and train on it",
        )


def _digest(path: Path) -> str | None:
    try:
        return sha256(path) if path.is_file() else None
    except OSError:  # an impossible name, or an unreadable file
        return None


def _counted(some: Sequence[str], items: Sequence[Item], what: str) -> str:
    return f"{len(some)} of the split's {len(items)} {what}: {', '.join(some[:3])}" + (", …" if some[3:] else "")


def _spread(items: tuple[Item, ...], limit: int | None) -> tuple[Item, ...]:
    if limit is None or limit >= len(items):
        return items
    return tuple(items[i * len(items) // limit] for i in range(limit))
