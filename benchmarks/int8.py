"""How many int8 networks lose no more than 0.5 points, as quantised at first and after edgekd has mended them.

    python benchmarks/int8.py RUNS --data kather=FOLDER --data sipakmed=FOLDER --out benchmarks/results/int8

RUNS holds the run folders of benchmarks/int8.sh, NETWORK-SET. Each network is calibrated on its training images, and
judged on its test images, which have chosen nothing. Writes OUT.json after each network, and OUT.md; networks that are
in OUT.json are not measured again. `--reduce-range` limits weights to 7 bits, as on CPUs without VNNI.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from edgekd.artifacts.metadata import read_student
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import AnyBackend, find_backend
from edgekd.backends.report import describe_host
from edgekd.bench.tables import pipe_table
from edgekd.compiler.build import Compilation
from edgekd.compiler.gate import ALPHA, Validation, times_in_turns, worst_drop
from edgekd.compiler.gate import bounds as drop_bounds
from edgekd.data.images import load_subset
from edgekd.data.split import read_split
from edgekd.errors import GateError
from edgekd.export import export, model_metadata
from edgekd.files import atomic_write
from edgekd.host import HostInfo
from edgekd.policy import ensemble
from edgekd.progress import Span
from edgekd.runtime.engine import Engine, built_engine, reference_engine
from edgekd.serialization import to_json
from edgekd.training.run_folder import load_model

log = logging.getLogger("int8")

LIMIT = 0.5
"""Points that may be lost."""
ANY = 100.0
"""A limit that no engine exceeds."""
REPEATS = 7
"""Measurements of time, of which the least disturbed is taken."""
BACKENDS = ("onnxruntime", "openvino")


def measure(run: Path, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compile a network in float, in int8 as it comes, and in int8 as edgekd mends it, with both backends."""
    network, made = load_model(run)
    split, p = read_split(run), made.preprocess
    calibration, _ = load_subset(split, "train", data=data, preprocess=p, limit=options.calibration)
    images, labels = load_subset(split, "test", data=data, preprocess=p, limit=options.images)
    results = []
    with tempfile.TemporaryDirectory(prefix="edgekd-int8-") as name:
        folder = Path(name)
        import torch

        with torch.no_grad():
            outputs = network.eval()(torch.from_numpy(images[:1]))
        metadata = model_metadata(made.network, made.classes, p, outputs, provenance=made.provenance)
        export(network, metadata, out=folder / "student.onnx", images=images[:32], names=[str(i) for i in range(32)])
        student = read_student(folder / "student.onnx")
        reference = reference_engine(student.model, student.metadata, threads=1).logits(images)
        validation = Validation(images, labels, reference)

        def compilation(**settings: Any) -> Compilation:
            recipe = Recipe(batch_sizes=(1,), options={"openvino": {"static_batch_sizes": (1, 32)}}, **settings)
            judged = None if recipe.precision == "fp32" else validation
            return Compilation(student, recipe, calibration, judged, 1)

        float_ = compilation(precision="fp32")
        plain = compilation(precision="int8", max_accuracy_drop=ANY, int8_attempts=0)
        mended = compilation(precision="int8", max_accuracy_drop=LIMIT)
        for backend in map(find_backend, BACKENDS):
            if options.reduce_range:
                backend.reduces_range = lambda: True  # type: ignore[method-assign]
            results.append(_results(backend, folder / backend.name, (float_, plain, mended), validation))
    return {
        "run": run.name,
        "network": made.network,
        "gate_images": len(images),
        "calibration_images": len(calibration),
        "accuracy": float((ensemble(reference).argmax(axis=1) == labels).mean()),
        "results": results,
    }


def _results(
    backend: AnyBackend, folder: Path, ways: tuple[Compilation, ...], validation: Validation
) -> dict[str, Any]:
    """Return the drops, agreements and times of one backend."""
    found: dict[str, Any] = {"backend": backend.name}
    engines: dict[str, Engine] = {}
    for name, compilation in zip(("float", "plain", "mended"), ways):
        if name == "mended" and found["plain"]["drop"] <= LIMIT:
            found[name] = found["plain"]
            continue
        start = time.perf_counter()
        try:
            built = compilation.compile(backend, folder / name, Span(None), may_be_pending=False)
        except GateError as error:
            found[name] = {"refused": error.what}
            continue
        engines[name] = built_engine(built.folder, built.manifest, threads=1)
        accuracy = built.manifest.accuracy
        if accuracy is None:
            continue
        worst = worst_drop(accuracy)
        predicted = [
            ensemble(x).argmax(axis=1) for x in (engines[name].logits(validation.images), validation.reference)
        ]
        found[name] = {
            "drop": worst.points,
            "bounds": drop_bounds(worst, accuracy),
            "refused": worst.p_value(LIMIT) <= ALPHA / len(accuracy.predictions),
            "agreement": float((predicted[0] == predicted[1]).mean()),
            "int8": built.manifest.precision.get("int8", 0.0),
            "notes": built.manifest.notes,
            "seconds": time.perf_counter() - start,
        }
    times = [times_in_turns(list(engines.values()), validation.images) for _ in range(REPEATS)]
    found["ms"] = {name: min(sum(ms[i]) for ms in times) for i, name in enumerate(engines)}
    return found


def passes(result: dict[str, Any]) -> bool:
    """Return True if an engine loses no more than the limit on the gate's images."""
    return "drop" in result and result["drop"] <= LIMIT


def _cells(result: dict[str, Any]) -> list[str]:
    if "drop" not in result:
        return ["refused", "–"]
    low, high = result["bounds"]
    mark = " (refused)" if result["refused"] else ""
    return [f"{result['drop']:+.2f} [{low:+.2f}, {high:+.2f}]{mark}", f"{100 * result['agreement']:.1f}"]


def _measures(result: dict[str, Any]) -> str:
    """Return what the last attempt consisted of, from the notes or the refusal."""
    lines = [str(n) for n in result.get("notes", ())] or str(result["refused"]).splitlines()
    tried = [line.strip() for line in lines if line.rstrip().endswith("points")]
    tried = [line for line in tried if " lose" not in line]
    return "; ".join(tried) or "–"


def markdown(record: dict[str, Any]) -> str:
    """Render the table and the counts."""
    head = ["network", "float %", "backend", "plain int8: points lost [95 %]", "same answer %"]
    head += ["mended: points lost [95 %]", "same answer %", "int8 layers %", "mended / plain", "mended / float ms"]
    rows, tried = [], []
    for network in record["networks"]:
        for r in network["results"]:
            ms, plain, mended = r["ms"], r["plain"], r["mended"]
            is_mended = mended != plain
            ms = ms if is_mended else ms | {"mended": ms["plain"]}
            after = _cells(mended) if is_mended else ["as it is", "–"]
            int8 = f"{100 * mended['int8']:.0f}" if "int8" in mended else "–"
            ratios = [f"{ms['mended'] / ms[k]:.2f}" if "mended" in ms else "–" for k in ("plain", "float")]
            rows.append(
                [
                    network["run"],
                    f"{100 * network['accuracy']:.1f}",
                    r["backend"],
                    *_cells(plain),
                    *after,
                    int8,
                    *ratios,
                ]
            )
            if is_mended:
                tried.append(f"- {network['run']}, {r['backend']}: {_measures(mended)}")
    counts = []
    for backend in BACKENDS:
        found = [next(r for r in n["results"] if r["backend"] == backend) for n in record["networks"]]
        before, after_ = (sum(passes(r[way]) for r in found) for way in ("plain", "mended"))
        refused = sum(bool(r["plain"].get("refused")) for r in found), sum(bool(r["mended"]["refused"]) for r in found)
        counts.append(
            f"**{backend}: of {len(found)} networks, {before} lose at most {LIMIT} points before, {after_} after;** "
            f"the gate refuses {refused[0]} before, {refused[1]} after."
        )
    host, s = HostInfo(**record["host"]), record["settings"]
    images = [n["gate_images"] for n in record["networks"]]
    return (
        "## int8 that passes\n\n"
        + "\n\n".join(counts)
        + "\n\n"
        + pipe_table((head, rows))
        + "\n\nPoints of accuracy that the worse of the two predictions (ensemble, last exit) loses on test images, "
        f"with the exact interval of the true loss; “refused” where an exact test finds more than {LIMIT}. Same "
        "answer: as the float network. Times: medians of the stages on one image, one thread, engines in turns, the "
        f"least of {REPEATS} measurements. What was tried is chosen on calibration images; each line below gives the "
        "engines that were then judged on the gate's images, in turn.\n\n"
        + "\n".join(tried)
        + f"\n\n{record['created']}. {host}. {min(images)} to {max(images)} images for the gate, {s['calibration']} "
        f"for calibration. {'Weights of 7 bits. ' if s['reduce_range'] else ''}Networks trained by "
        "`benchmarks/int8.sh`: 64 pixels, 5 epochs from ImageNet weights or 12 from random ones, one seed. The machine "
        "was busy with other work.\n"
    )


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of run folders, NETWORK-SET")
    parser.add_argument("--data", action="append", required=True, help="SET=FOLDER of class folders of images")
    parser.add_argument("--names", nargs="*", help="run folders to measure; default: all")
    parser.add_argument("--out", type=Path, required=True, help="output path without suffix")
    parser.add_argument("--images", type=int, default=3000, help="images for the gate, at most")
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--reduce-range", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parsed(arguments)
    data = {name: Path(folder) for name, folder in (one.split("=", 1) for one in options.data)}
    file = options.out.with_suffix(".json")
    record = json.loads(file.read_text()) if file.is_file() else {"networks": []}
    done = {network["run"] for network in record["networks"]}
    for name in options.names or sorted(run.name for run in options.runs.iterdir() if (run / "split.json").is_file()):
        if name in done:
            continue
        log.info("%s", name)
        record["networks"].append(measure(options.runs / name, data[name.rsplit("-", 1)[1]], options))
        record |= {
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "settings": {key: getattr(options, key) for key in ("images", "calibration", "reduce_range")},
            "host": dataclasses.asdict(describe_host(*BACKENDS)),
        }
        atomic_write(file, to_json(record))
        atomic_write(options.out.with_suffix(".md"), markdown(record).encode())


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    main(sys.argv[1:])
