"""Give each network of make.py early exits with `edgekd add-exits`, compile it, and write one table.

    python benchmarks/networks/measure.py OUT PICTURES NAME ...     # measure: OUT/NAME/result.json
    python benchmarks/networks/measure.py OUT                       # networks.md from all of them

PICTURES has train/ (the heads learn from these; labels are not used), val/ (thresholds) and test/ (what is reported).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from edgekd.artifacts.metadata import read_student
from edgekd.cli.main import app
from edgekd.data.folders import image_files
from edgekd.data.images import load_batch
from edgekd.files import atomic_write
from edgekd.runtime.classifier import Classifier
from edgekd.runtime.engine import open_engine
from edgekd.runtime.tuning import stage_ms, threshold_path

CHANGED = 0.005
"""Share of the validation images whose answer may change."""


def session(path: Path | bytes) -> ort.InferenceSession:
    """Open an ONNX file on the CPU."""
    ort.set_default_logger_severity(3)
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def original_answers(path: Path, images: np.ndarray) -> np.ndarray:
    """Return the first output of the original file for preprocessed images, in its own layout and type."""
    run = session(path)
    of = run.get_inputs()[0]
    batch = images if of.shape[1] in (1, 3) else images.transpose(0, 2, 3, 1)
    batch = batch.astype(
        {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}[of.type]
    )
    step = of.shape[0] if isinstance(of.shape[0], int) else 64
    return np.concatenate([run.run(None, {of.name: batch[k : k + step]})[0] for k in range(0, len(batch), step)])


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities in float64."""
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def edgekd(*words: object) -> tuple[float, str]:
    """Run a command of edgekd in this process; return its seconds and what it printed.

    Raises:
        RuntimeError: It failed; the message is what it printed.
    """
    started, printed = time.monotonic(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            app([str(word) for word in words], prog_name="edgekd")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(printed.getvalue().strip()) from None
    return time.monotonic() - started, printed.getvalue()


def compare(folder: Path, student: Path, images: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Compare the last exit with the original file, and with the framework's own answers to the same pictures."""
    ours = open_engine(student).logits(images)[-1]
    original = original_answers(folder / "model.onnx", images).astype(np.float32).reshape(len(images), -1)
    has_softmax = bool(np.allclose(original.sum(1), 1, atol=2e-3) and (original >= 0).all())
    last = softmax(ours) if has_softmax else ours
    facts: dict[str, Any] = {
        "output": "probabilities" if has_softmax else "logits",
        "difference": float(np.abs(last - original).max()),
        "changed": int((ours.argmax(1) != original.argmax(1)).sum()),
    }
    if (folder / "framework.npz").exists():
        framework = np.load(folder / "framework.npz")
        rows = [framework["paths"].tolist().index(name) for name in names]
        labels, theirs = framework["labels"][rows], framework["answers"][rows]
        both = (last, softmax(theirs) if has_softmax and theirs.min() < 0 else theirs)
        facts |= {
            "framework_accuracy": float((theirs.argmax(1) == labels).mean()),
            "accuracy": float((ours.argmax(1) == labels).mean()),
            "framework_changed": int((ours.argmax(1) != theirs.argmax(1)).sum()),
            "framework_difference": float(np.abs(both[0] - both[1]).max()),
        }
    return facts


def early_exit(path: Path, val: np.ndarray, test: np.ndarray) -> dict[str, Any]:
    """Choose thresholds on validation images; measure changed answers, exit shares and time on test images."""
    engine = open_engine(path)
    stages = stage_ms(engine, val[:1])
    points = threshold_path(engine.logits(val), None, stages)
    point = min((p for p in points if p.loss <= CHANGED), key=lambda p: p.latency_ms)
    cascade = Classifier(engine, policy=point.policy, strategy="cascade")
    plain = Classifier(engine, policy=point.policy, strategy="final")
    decision, reference = cascade.run(test), plain.run(test)
    taken = np.bincount(decision.exits, minlength=len(stages)) / len(test)
    rounds = [(_times_ms(plain, test[:100]), _times_ms(cascade, test[:100])) for _ in range(7)]
    plain_ms, cascade_ms = np.min(rounds, axis=0).mean(axis=1)  # of each image the shortest: other programs run
    return {
        "name": engine.name,
        "stage_ms": stages,
        "confidence": point.policy.confidence,
        "average": point.policy.average,
        "val_changed": point.loss,
        "test_changed": float((decision.probabilities.argmax(1) != reference.probabilities.argmax(1)).mean()),
        "shares": taken.tolist(),
        "expected_time": float(sum(np.cumsum(stages) * taken) / sum(stages)),
        "plain_ms": float(plain_ms),
        "cascade_ms": float(cascade_ms),
    }


def _times_ms(classifier: Classifier, images: np.ndarray) -> list[float]:
    """Return the milliseconds of each image, one at a time."""
    times = []
    for image in images:
        started = time.perf_counter()
        classifier.run(image[None])
        times.append((time.perf_counter() - started) * 1e3)
    return times


def measure(folder: Path, pictures: Path, *, int8: bool) -> dict[str, Any]:
    """Run `add-exits`, `compile` and the comparison for one network; a refusal is a result too."""
    facts = json.loads((folder / "facts.json").read_text())
    options = [str(folder / o) if o.endswith(".json") else o for o in facts["options"]]
    student, model = folder / "student.onnx", onnx.load(folder / "model.onnx", load_external_data=False)
    of = session(folder / "model.onnx").get_inputs()[0]
    result = {
        "network": folder.name,
        "opset": next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")),
        "input": f"{of.type[7:-1]} {'×'.join(str(d) if isinstance(d, int) else 'n' for d in of.shape)}",
        "pictures": len(image_files(pictures / "train")),
        **facts,
    }
    words = ["--data", pictures / "train", "--views", "1", "--heads-share", "0.99", "--classes", folder / "classes.txt"]
    try:
        if not student.exists():
            seconds, log = edgekd("add-exits", folder / "model.onnx", *words, *options, "--out", student)
            (folder / "add-exits.txt").write_text(f"{seconds:.0f} s\n{log}")
        result["add_exits_s"] = (folder / "add-exits.txt").read_text().split()[0]
        metadata = read_student(student).metadata
        paths = {s: sorted(image_files(pictures / s)) for s in ("val", "test")}
        val, test = (load_batch(paths[s], metadata.preprocess) for s in ("val", "test"))
        names = [str(p.relative_to(pictures)) for p in paths["test"]]
        result |= {"exits": [e.boundary for e in metadata.exits]}
        result |= compare(folder, student, test, names)
        result["fp32"] = early_exit(student, val, test)
        if int8:
            result["int8"] = compiled(folder, pictures, val, test)
    except RuntimeError as error:
        result["error"] = re.sub(r"\s+", " ", str(error))
    return result


def compiled(folder: Path, pictures: Path, val: np.ndarray, test: np.ndarray) -> dict[str, Any]:
    """Compile a network to INT8 for the fastest backend here, and measure it like the FP32 one."""
    engine = folder / "int8.engine"
    options = ["--recipe", "int8", "--graphs", "all"]
    edgekd("compile", folder / "student.onnx", *options, "--data", pictures / "train", "--out", engine)
    return early_exit(engine, val, test)


def table(out: Path) -> str:
    """Return the Markdown table of all results."""
    columns = (
        "network, trained on",
        "framework, exporter",
        "opset, input, output",
        "right: framework / edgekd",
        "largest difference",
        "early exits",
        "add-exits",
        "changed",
        "exit early",
        "expected time",
        "FP32, plain / with exits",
        "INT8, plain / with exits",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for file in sorted(out.glob("*/result.json")):
        of = json.loads(file.read_text())
        cells = [
            f"{of['network']}: {of['trained']}",
            f"{of['framework']}, {of['exporter']}",
            f"{of['opset']}, {of['input']}",
        ]
        if "error" in of and "fp32" not in of:
            cells += [of["error"][-200:]]
        else:
            fp32, right = of["fp32"], "no labels"
            if "accuracy" in of:
                right = f"{of['framework_accuracy']:.1%} / {of['accuracy']:.1%}, {of['framework_changed']} differ"
            cells[2] += f", {of['output']}"
            cells += [right, f"{of['difference']:.1g}", f"{len(of['exits']) - 1}", f"{of['add_exits_s']} s"]
            cells += [f"{fp32['test_changed']:.1%}", f"{1 - fp32['shares'][-1]:.0%}", f"{fp32['expected_time']:.2f}"]
            cells += [_times(fp32), _times(of["int8"]) if "int8" in of else "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _times(of: dict[str, Any]) -> str:
    return f"{of['plain_ms']:.2f} / {of['cascade_ms']:.2f} ms"


def main() -> None:
    """Measure the networks named on the command line, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("pictures", type=Path, nargs="?")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--int8", action="store_true", help="compile to INT8, too")
    arguments = parser.parse_args()
    for name in arguments.names:
        result = measure(arguments.out / name, arguments.pictures, int8=arguments.int8)
        atomic_write(arguments.out / name / "result.json", json.dumps(result, indent=1).encode())
        print(name, result.get("error") or result["fp32"], flush=True)
    if not arguments.names:
        print(table(arguments.out), end="")


if __name__ == "__main__":
    main()
