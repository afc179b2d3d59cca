"""What benchmarks/gpu/run.sh needs on a machine that can install nothing: OUT/models and OUT/images.

    python benchmarks/gpu/prepare.py --student runs/student --plain runs/plain --light runs/light \
        --data sipakmed --out gpu-bench

student, plain, light: run folders or ONNX files of edgekd export; `light` is another student and may be left out.
models: the ONNX files, what ONNX Runtime answers (NAME.npz), and calibrations for int8. images: a few hundred of the
split, already at the networks' size, as PNG, and their split.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from edgekd.artifacts.metadata import read_onnx
from edgekd.data.images import load_subset
from edgekd.data.preprocess import Preprocess, open_image
from edgekd.data.split import Item, Split, leaks, read_split
from edgekd.errors import ConfigError, EdgekdError
from edgekd.files import atomic_folder, atomic_write, sha256
from edgekd.quantization.tensorrt import quantize_tensorrt
from edgekd.runtime.engine import open_engine
from edgekd.serialization import to_json

NAMES = ("student", "plain", "light")
METHODS = ("minmax", "entropy")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in NAMES:
        parser.add_argument(f"--{name}", type=Path, required=name != "light", metavar="RUN_OR_ONNX")
    parser.add_argument("--data", type=Path, required=True, help="the images that the split names")
    parser.add_argument("--split", type=Path, help="split.json; the student's run folder's if not given")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=128, help="images to calibrate on")
    parser.add_argument("--val", type=int, default=400, help="images to check and tune on")
    parser.add_argument("--test", type=int, default=400, help="images to measure on")
    asked = parser.parse_args()
    try:
        prepare(asked)
    except EdgekdError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def prepare(asked: argparse.Namespace) -> None:
    """Write both folders, or nothing."""
    given = {name: path for name in NAMES if (path := getattr(asked, name))}
    limits = {"train": asked.train, "val": asked.val, "test": asked.test}
    with atomic_folder(asked.out) as out:
        models = out / "models"
        models.mkdir()
        for name, path in given.items():
            _onnx(path, models / f"{name}.onnx")
        preprocess = _same([models / f"{name}.onnx" for name in given])
        split = _few(read_split(asked.split or asked.student), limits)
        split = _write_images(split, asked.data, out / "images", preprocess)
        for name in given:
            say(f"{name}: what ONNX Runtime answers, and calibrations")
            _answers(models / name, split, out / "images")
    say(f"next: benchmarks/gpu/run.sh {asked.out}/models {asked.out}/images OUT")


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _onnx(source: Path, out: Path) -> None:
    if source.is_dir():
        command = [sys.executable, "-m", "edgekd", "export", str(source), "--out", str(out)]
        if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
            raise ConfigError(f"{source} cannot be exported", fix="see above")
    else:
        shutil.copyfile(source, out)


def _same(paths: list[Path]) -> Preprocess:
    """The one pre-processing of all networks, whose images are written once."""
    cards = {path: read_onnx(path)[1] for path in paths}
    if len({(metadata.preprocess, metadata.classes) for metadata in cards.values()}) > 1:
        told = ", ".join(
            f"{p.stem}: {c.preprocess.image_size} pixels, {len(c.classes)} classes" for p, c in cards.items()
        )
        raise ConfigError(f"the networks see different images ({told})", fix="train them with one protocol")
    return cards[paths[0]].preprocess


def _few(split: Split, limits: dict[str, int]) -> Split:
    """At most so many of each part, spread evenly over it."""
    subsets = {}
    for name, limit in limits.items():
        items = split.subset(name)  # type: ignore[arg-type]
        few = min(limit, len(items))
        subsets[name] = tuple(items[i * len(items) // few] for i in range(few))
    groups, leaking = leaks(subsets)
    return dataclasses.replace(split, subsets=subsets, groups=groups, leaking=leaking, excluded={})


def _write_images(split: Split, data: Path, out: Path, preprocess: Preprocess) -> Split:
    """The pictures at the networks' size, without loss; resizing them again changes nothing."""
    subsets: dict[str, tuple[Item, ...]] = {}
    for subset, items in split.subsets.items():
        written = []
        for item in items:
            path = Path(subset) / Path(item.path).with_suffix(".png")
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            preprocess.resized(open_image(data / item.path)).save(out / path)
            written.append(dataclasses.replace(item, path=str(path), digest=sha256(out / path)))
        subsets[subset] = tuple(written)
    split = dataclasses.replace(split, subsets=subsets)
    atomic_write(out / "split.json", to_json(split))
    return split


def _answers(stem: Path, split: Split, data: Path) -> None:
    model, metadata = read_onnx(stem.with_suffix(".onnx"))
    engine = open_engine(stem.with_suffix(".onnx"))
    logits = {
        subset: engine.logits(load_subset(split, subset, data=data, preprocess=metadata.preprocess)[0])
        for subset in ("val", "test")
    }
    np.savez(stem.with_suffix(".npz"), val=logits["val"], test=logits["test"])
    train, _ = load_subset(split, "train", data=data, preprocess=metadata.preprocess)
    for method in METHODS:
        for heads in (True, False):
            quantize_tensorrt(model, metadata, train, heads=heads, method=method, folder=stem.parent / "calibration")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
