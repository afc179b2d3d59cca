"""Calibration: activation ranges, measured on training images once and cached."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
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
"""Magnitudes that int8 can represent."""
STRIDE = 32
"""Bins between the clipping thresholds that `Entropy` tries."""
PERCENT = 99.999
REVISION = 2
"""Part of every cache key: raise it when a calibrator's result changes."""


class MinMax:
    """The largest magnitude: nothing is clipped."""

    def __init__(self) -> None:
        self.lowest, self.highest = np.inf, -np.inf

    @property
    def largest(self) -> float:
        """The largest magnitude; 0 without activations."""
        return max(-self.lowest, self.highest, 0.0)

    def add(self, values: npt.NDArray[np.floating[Any]]) -> None:
        """Include activations, an array of any shape."""
        self.lowest = min(self.lowest, float(values.min(initial=np.inf)))
        self.highest = max(self.highest, float(values.max(initial=-np.inf)))

    def amax(self) -> float:
        """Return the end of the activation range: the magnitude that int8's 127 stands for."""
        return self.largest

    def limits(self) -> tuple[float, float]:
        """Return the activation range as unsigned integers cover it: both of its ends, neither beyond `amax`."""
        amax = self.amax()
        return max(self.lowest, -amax), min(self.highest, amax)


class Histogram(MinMax):
    """A histogram of magnitudes with equal bins from 0 to `upper_edge`.

    When a magnitude exceeds the upper edge, pairs of bins are merged and the edge is doubled, so that batches are
    counted in one pass and no activations are kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self.upper_edge = 0.0
        self.counts = np.zeros(BINS, np.int64)

    def add(self, values: npt.NDArray[np.floating[Any]]) -> None:
        super().add(values)
        self.upper_edge = self.upper_edge or self.largest
        while self.largest > self.upper_edge:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, np.int64)])
            self.upper_edge *= 2
        if self.upper_edge:
            bins = np.minimum(np.abs(values).ravel() * np.float32(BINS / self.upper_edge), BINS - 1)
            self.counts += np.bincount(bins.astype(np.int64), minlength=BINS)

    def _magnitude(self, bins: int) -> float:
        """Return the upper edge of the first `bins` bins, the largest magnitude at most."""
        return min(bins / BINS * self.upper_edge, self.largest)


class Percentile(Histogram):
    """The 99.999th percentile of the magnitudes, to the width of a bin."""

    def amax(self) -> float:
        below = np.cumsum(self.counts)
        return self._magnitude(int(np.searchsorted(below, PERCENT / 100 * below[-1])) + 1)


class Entropy(Histogram):
    """The clipping threshold at which clipping and rounding to 128 levels lose least information.

    It minimises the Kullback-Leibler divergence of the clipped distribution from the rounded one: Migacz, "8-bit
    inference with TensorRT", GTC 2017. Zeros, of which ReLU makes many, count as the next bin does.
    """

    def amax(self) -> float:
        counts = self.counts.astype(np.float64)
        counts[0] = counts[1]
        tops = range(BINS, LEVELS - 1, -STRIDE)  # descending: of equal divergences the largest range is taken
        return self._magnitude(min(tops, key=lambda top: divergence(counts, top)))


CALIBRATORS: dict[str, type[MinMax]] = {"minmax": MinMax, "percentile": Percentile, "entropy": Entropy}
"""Calibration method to the class that computes a range from activations."""


def check_inputs(images: Array, method: str) -> None:
    """Check the calibration images and method.

    Raises:
        ConfigError: No images, or an unknown method; the nearest is given.
    """
    if method not in CALIBRATORS:
        raise ConfigError(f"no calibration method '{method}'", fix=nearest(method, CALIBRATORS))
    if not len(images):
        raise ConfigError("no calibration images", fix="int8 needs images of the training split: --data and --split")


def activation_ranges(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    images: Array,
    *,
    method: str,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Return the largest magnitude of each of `activation_limits`, which int8's 127 stands for."""
    limits = activation_limits(model, tensors, images, method=method, folder=folder, progress=progress)
    return {name: max(-low, high, 0.0) for name, (low, high) in limits.items()}


def activation_limits(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    images: Array,
    *,
    method: str,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, tuple[float, float]]:
    """Measure the activation range of tensors, or read it from the cache.

    The cache key covers the network's weights, the images and the settings, so that a cached range is never stale.

    Args:
        model: The float network.
        tensors: Names of inputs, outputs and inner tensors.
        images: Calibration images (N, 3, H, W) of the training split, preprocessed.
        method: A name in `CALIBRATORS`.
        folder: Folder of the cache; the user's cache folder if None.
        progress: Called with the number of images done and their total.

    Returns:
        Tensor to both ends of its range.

    Raises:
        ConfigError: No images, or an unknown method.
        BackendError: Not cached, and ONNX Runtime, which runs the network, is not installed; or an activation is not
            finite.
    """
    check_inputs(images, method)
    key = calibration_key(model, tensors, images, method=method)
    path = (folder or cache_folder("calibration")) / f"{key}.json"
    cached = _read(path, key, tensors)
    if cached is not None:
        return cached
    ranges = _measure(model, tensors, images, method=method, progress=progress)
    _write(path, {"key": key, "method": method, "images": len(images), "ranges": ranges})
    return ranges


def calibration_key(model: onnx.ModelProto, tensors: Sequence[str], images: Array, *, method: str) -> str:
    """Return a hex digest of everything that a calibration depends on, which excludes the model's metadata.

    Args:
        model: The float network.
        tensors: Names of the tensors.
        images: Calibration images (N, 3, H, W).
        method: A name in `CALIBRATORS`.
    """
    settings = [REVISION, method, PERCENT, BINS, STRIDE, list(tensors), list(images.shape)]
    digest = hashlib.sha256(json.dumps(settings).encode())
    digest.update(model.graph.SerializeToString(deterministic=True))
    digest.update(np.ascontiguousarray(images).tobytes())
    return digest.hexdigest()


def divergence(counts: npt.NDArray[np.float64], top: int) -> float:
    """Return the Kullback-Leibler divergence of a clipped histogram from its rounding to 128 levels, in nats.

    Args:
        counts: The histogram, (BINS,).
        top: Number of bins that are kept; the counts above them are added to the last.
    """
    inside, level = counts[:top], np.arange(top) * LEVELS // top
    occupied = inside > 0
    mean = np.bincount(level, inside, LEVELS) / np.maximum(np.bincount(level, occupied, LEVELS), 1)
    rounded, clipped = np.where(occupied, mean[level], 0), inside.copy()
    clipped[-1] += counts[top:].sum()
    where = clipped > 0
    if not rounded[where].all():  # the clipped counts fell into an empty bin
        return np.inf
    p, q = clipped[where] / clipped.sum(), rounded[where] / rounded.sum()
    return float((p * np.log(p / q)).sum())


def _read(path: Path, key: str, tensors: Sequence[str]) -> dict[str, tuple[float, float]] | None:
    """Return the cached ranges if the file is intact and holds the key itself."""
    try:
        cached = parse_json(path.read_text(encoding="utf-8"))
        ranges = {name: (float(low), float(high)) for name in tensors for low, high in [cached["ranges"][name]]}
        return ranges if cached["key"] == key else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        log.warning("%s is damaged: calibrating again", path)
        return None


def _write(path: Path, calibration: dict[str, Any]) -> None:
    try:
        atomic_write(path, to_json(calibration))
    except OSError as error:
        log.warning("the calibration cannot be cached in %s (%s): it will be repeated", path.parent, error.strerror)


def run_tensors(
    model: onnx.ModelProto, tensors: Sequence[str], images: Array, *, progress: Progress | None = None
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Run images in batches, and yield the values of tensors.

    Args:
        model: A network, float or quantised.
        tensors: Names of inputs, outputs and inner tensors.
        images: Images (N, 3, H, W).
        progress: Called with the number of images done and their total.

    Raises:
        BackendError: ONNX Runtime, which runs the network, is not installed.
    """
    inner = [name for name in tensors if name != "images"]
    session = _session(model, inner)
    for start in range(0, len(images), BATCH):
        batch = np.ascontiguousarray(images[start : start + BATCH])
        outputs = {"images": batch, **dict(zip(inner, session.run(inner, {"images": batch})))}
        yield {name: outputs[name] for name in tensors}
        if progress:
            progress(start + len(batch), len(images))


def _measure(
    model: onnx.ModelProto, tensors: Sequence[str], images: Array, *, method: str, progress: Progress | None
) -> dict[str, tuple[float, float]]:
    calibrators = {name: CALIBRATORS[method]() for name in tensors}
    for batch in run_tensors(model, tensors, images, progress=progress):
        for name, values in batch.items():
            if not np.isfinite(values).all():
                raise BackendError(f"{name} is not finite on a calibration image", fix="compile with --recipe fp32")
            calibrators[name].add(values)
    return {name: calibrator.limits() for name, calibrator in calibrators.items()}


def _session(model: onnx.ModelProto, tensors: Sequence[str]) -> Any:
    """Return a session of the network with `tensors` as outputs."""
    try:
        import onnxruntime
    except ImportError:
        raise BackendError(
            "calibration runs the network in ONNX Runtime, which is not installed",
            fix=f"pip install onnxruntime, or calibrate elsewhere on the same images and copy the files to "
            f"{cache_folder('calibration')}",
        ) from None
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    if tensors:
        del extended.graph.output[:]
        extended.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        extended.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["WeightBiasQuantization"],  # it would quantise what is left in float
    )
