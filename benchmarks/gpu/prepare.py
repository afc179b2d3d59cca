"""Prepares the input of benchmarks/gpu/run.sh for a machine without network access: OUT/models and OUT/images.

    python benchmarks/gpu/prepare.py --student runs/student --plain runs/plain --light runs/light \
        --data sipakmed --out gpu-bench

student, plain, light: run folders or ONNX files of edgekd export; `light` is an optional second student.
models: the ONNX files, their logits from ONNX Runtime (NAME.npz), and calibrations for int8. images: a few hundred
images of the split, resized to the networks' input, as PNG, and their split.json.
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
    parser.add_argument("--data", type=Path, required=True, help="folder of the images listed in the split")
    parser.add_argument("--split", type=Path, help="split.json; default: the one in the student's run folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=128, help="number of calibration images")
    parser.add_argument("--val", type=int, default=400, help="number of images for gate and tuning")
    parser.add_argument("--test", type=int, default=400, help="number of images to measure on")
    args = parser.parse_args()
    try:
        prepare(args)
    except EdgekdError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def prepare(args: argparse.Namespace) -> None:
    """Write both folders atomically."""
    given = {name: path for name in NAMES if (path := getattr(args, name))}
    limits = {"train": args.train, "val": args.val, "test": args.test}
    with atomic_folder(args.out) as out:
        models = out / "models"
        models.mkdir()
        for name, path in given.items():
            _onnx(path, models / f"{name}.onnx")
        preprocess = _same([models / f"{name}.onnx" for name in given])
        split = _few(read_split(args.split or args.student), limits)
        split = _write_images(split, args.data, out / "images", preprocess)
        for name in given:
            say(f"{name}: logits from ONNX Runtime, and calibrations")
            _write_logits(models / name, split, out / "images")
    say(f"next: benchmarks/gpu/run.sh {args.out}/models {args.out}/images OUT")


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
    """Return the preprocessing shared by all networks, since images are written once."""
    found = {path: read_onnx(path)[1] for path in paths}
    if len({(metadata.preprocess, metadata.classes) for metadata in found.values()}) > 1:
        described = ", ".join(
            f"{p.stem}: {m.preprocess.image_size} pixels, {len(m.classes)} classes" for p, m in found.items()
        )
        raise ConfigError(f"the networks expect different images ({described})", fix="train them with one protocol")
    return found[paths[0]].preprocess


def _few(split: Split, limits: dict[str, int]) -> Split:
    """Thin each subset to its limit, spread evenly over it."""
    subsets = {}
    for name, limit in limits.items():
        items = split.subset(name)  # type: ignore[arg-type]
        few = min(limit, len(items))
        subsets[name] = tuple(items[i * len(items) // few] for i in range(few))
    groups, leaking = leaks(subsets)
    return dataclasses.replace(split, subsets=subsets, groups=groups, leaking=leaking, excluded={})


def _write_images(split: Split, data: Path, out: Path, preprocess: Preprocess) -> Split:
    """Write the images losslessly at the networks' input size, where resizing them again changes nothing."""
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


def _write_logits(stem: Path, split: Split, data: Path) -> None:
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
