"""How far activations reach on real images: what a symmetric int8 range is made of, measured once and kept."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgekd.errors import BackendError, ConfigError, nearest
from edgekd.files import atomic_write, cache_folder
from edgekd.schema import parse_json
from edgekd.serialization import to_json
from edgekd.types import Array, Progress

log = logging.getLogger(__name__)

BATCH = 8
BINS = 4096
LEVELS = 128
"""Magnitudes that a signed 8-bit number has."""
STRIDE = 32
"""Bins between the clipping points that `Entropy` tries."""
PERCENT = 99.999
REVISION = 1
"""Part of every cache key; raise it when a method changes what it measures."""


class MinMax:
    """The largest magnitude seen: nothing is clipped."""

    def __init__(self) -> None:
        self.largest = 0.0

    def add(self, values: npt.NDArray[np.floating[Any]]) -> None:
        """See some values, an array of any shape."""
        self.largest = max(self.largest, float(np.abs(values).max(initial=0)))

    def magnitude(self) -> float:
        """What 127 shall stand for."""
        return self.largest


class Histogram(MinMax):
    """Counts of magnitudes in equal bins from 0 to `reach`.

    When more comes in, pairs of bins are merged, so that counting batch by batch needs neither a second pass nor the
    values themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reach = 0.0
        self.counts = np.zeros(BINS, np.int64)

    def add(self, values: npt.NDArray[np.floating[Any]]) -> None:
        super().add(values)
        self.reach = self.reach or self.largest
        while self.largest > self.reach:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, np.int64)])
            self.reach *= 2
        if self.reach:
            place = np.minimum(np.abs(values).ravel() * np.float32(BINS / self.reach), BINS - 1)
            self.counts += np.bincount(place.astype(np.int64), minlength=BINS)

    def _at(self, bins: int) -> float:
        return min(bins / BINS * self.reach, self.largest)


class Percentile(Histogram):
    """The magnitude that 99.999 % keep under, to the width of a bin."""

    def magnitude(self) -> float:
        below = np.cumsum(self.counts)
        return self._at(int(np.searchsorted(below, PERCENT / 100 * below[-1])) + 1)


class Entropy(Histogram):
    """The magnitude at which clipping and rounding to 128 levels lose least information.

    Least Kullback-Leibler divergence of the clipped distribution from the rounded one: Migacz, "8-bit inference with
    TensorRT", GTC 2017. Zeros, which ReLU makes many of, count as their neighbours do.
    """

    def magnitude(self) -> float:
        seen = self.counts.astype(np.float64)
        seen[0] = seen[1]
        tops = range(BINS, LEVELS - 1, -STRIDE)  # from the whole down: of equals the largest is taken
        return self._at(min(tops, key=lambda top: divergence(seen, top)))


def divergence(seen: npt.NDArray[np.float64], top: int) -> float:
    """Between the first `top` bins, with all above put into the last, and the same rounded to 128 levels; in nats."""
    inside, level = seen[:top], np.arange(top) * LEVELS // top
    held = inside > 0
    share = np.bincount(level, inside, LEVELS) / np.maximum(np.bincount(level, held, LEVELS), 1)
    rounded, clipped = np.where(held, share[level], 0), inside.copy()
    clipped[-1] += seen[top:].sum()
    where = clipped > 0
    if not rounded[where].all():  # what was clipped fell into an empty bin
        return np.inf
    p, q = clipped[where] / clipped.sum(), rounded[where] / rounded.sum()
    return float((p * np.log(p / q)).sum())


METHODS: dict[str, type[MinMax]] = {"minmax": MinMax, "percentile": Percentile, "entropy": Entropy}


def ranges(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    images: Array,
    *,
    method: str,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Tensor to the magnitude that int8's 127 stands for, on images (N, 3, H, W) of the training split.

    Measured once: the file it is kept in is found by a key of the network's weights, the images and the settings, so
    that it cannot be stale. folder: where such files are; the user's cache folder if None.

    Raises:
        ConfigError: no images, or an unknown method.
        BackendError: nothing is kept, and ONNX Runtime, which measures, is not installed; or a value is not finite.
    """
    if method not in METHODS:
        raise ConfigError(f"no calibration method '{method}'", fix=nearest(method, METHODS))
    if not len(images):
        raise ConfigError("no calibration images", fix="int8 needs images of the training split: --data and --split")
    key = calibration_key(model, tensors, images, method=method)
    path = (folder or cache_folder("calibration")) / f"{key}.json"
    found = _read(path, key, tensors)
    if found is None:
        found = _measure(model, tensors, images, method=method, progress=progress)
        _keep(path, {"key": key, "method": method, "images": len(images), "ranges": found})
    return found


def calibration_key(model: onnx.ModelProto, tensors: Sequence[str], images: Array, *, method: str) -> str:
    """Hex digest of everything that a calibration depends on; the model's metadata is not part of it."""
    settings = [REVISION, method, PERCENT, BINS, STRIDE, list(tensors), list(images.shape)]
    digest = hashlib.sha256(json.dumps(settings).encode())
    digest.update(model.graph.SerializeToString(deterministic=True))
    digest.update(np.ascontiguousarray(images).tobytes())
    return digest.hexdigest()


def _read(path: Path, key: str, tensors: Sequence[str]) -> dict[str, float] | None:
    """What the file holds, if it is whole and says itself that it belongs to the key."""
    try:
        kept = parse_json(path.read_text(encoding="utf-8"))
        found = {name: float(kept["ranges"][name]) for name in tensors}
        return found if kept["key"] == key else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        log.warning("%s is damaged: calibrating again", path)
        return None


def _keep(path: Path, kept: dict[str, Any]) -> None:
    try:
        atomic_write(path, to_json(kept))
    except OSError as error:
        log.warning("the calibration cannot be kept in %s (%s): it will be measured again", path.parent, error.strerror)


def _measure(
    model: onnx.ModelProto, tensors: Sequence[str], images: Array, *, method: str, progress: Progress | None
) -> dict[str, float]:
    session = _session(model, tensors)
    seen = {name: METHODS[method]() for name in tensors}
    inner = [name for name in tensors if name != "images"]
    for start in range(0, len(images), BATCH):
        batch = np.ascontiguousarray(images[start : start + BATCH])
        outputs = {"images": batch, **dict(zip(inner, session.run(inner, {"images": batch})))}
        for name in tensors:
            if not np.isfinite(outputs[name]).all():
                raise BackendError(f"{name} is not finite on a calibration image", fix="compile with --recipe fp32")
            seen[name].add(outputs[name])
        if progress:
            progress(start + len(batch), len(images))
    return {name: values.magnitude() for name, values in seen.items()}


def _session(model: onnx.ModelProto, tensors: Sequence[str]) -> Any:
    """The network with inner tensors as outputs, too."""
    try:
        import onnxruntime
    except ImportError:
        raise BackendError(
            "calibration runs the network in ONNX Runtime, which is not installed",
            fix=f"pip install onnxruntime, or calibrate elsewhere on the same images and bring the files to "
            f"{cache_folder('calibration')}",
        ) from None
    wider = onnx.ModelProto()
    wider.CopyFrom(model)
    given = {value.name for value in [*wider.graph.output, *wider.graph.input]}
    wider.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in given)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(wider.SerializeToString(), options, providers=["CPUExecutionProvider"])
