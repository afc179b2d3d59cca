"""Runs the steps of benchmarks/gpu/run.sh, each in its own process, so that a crash costs a single step.

Steps run in order of importance; none starts after the time budget, and the table lists what is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import steps
from gpu import NotMeasured
from table import table

from edgekd.errors import EdgekdError
from edgekd.files import atomic_write
from edgekd.serialization import to_json

ORDER = ("fp16", "int8-fp16", "fp32", "int8")
"""Recipes, the most important first."""
SANITIZER_S = 60
"""Time limit of compute-sanitizer, in seconds."""
STEPS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "check": steps.check,
    "build": steps.build,
    "records": steps.records,
    "device": steps.on_device,
    "layers": steps.layers,
    "one-launch": steps.one_launch,
    "launches": steps.launches,
    "build-times": steps.build_times,
    "short": steps.short,
}


def main() -> int:
    args = _arguments()
    if args.step:
        return _child(args)
    args.out.mkdir(parents=True, exist_ok=True)
    cache = args.out / "cache"
    shutil.copytree(args.models / "calibration", cache / "edgekd" / "calibration", dirs_exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(cache.resolve())
    end = time.monotonic() + args.budget
    able = _run(args, "check", "student", "fp16", end)
    if able["outcome"] != "done":
        sys.stderr.write(f"  fix: {able['fix']}\n" if able.get("fix") else "")
        return 1
    done = _all(args, end)
    atomic_write(args.out / "steps.json", to_json({"steps": done}))
    text = table(done, args.out, dry_run=args.dry_run)
    atomic_write(args.out / "table.md", text.encode())
    sys.stdout.write(text)
    return 1 if any(step["outcome"] == "failed" for step in done) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.sh", description="TensorRT engines from prepared folders to a table.")
    parser.add_argument("models", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--budget", type=float, default=450, help="seconds; no step starts later or runs over by more than 30"
    )
    parser.add_argument("--recipes", default=",".join(ORDER), help="comma-separated: " + ", ".join(ORDER))
    parser.add_argument(
        "--batch-sizes", default="1,8,64", help="ascending from 1; fp32 and int8 use only the first and the last"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="duration of each measurement")
    parser.add_argument("--optimization-level", type=int, default=3, help="0 builds fastest, 5 searches longest")
    parser.add_argument("--no-library-tactics", action="store_true", help="without cuBLAS, cuBLASLt and cuDNN")
    parser.add_argument("--dry-run", action="store_true", help="ONNX Runtime on the CPU in place of TensorRT")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--network", help=argparse.SUPPRESS)
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batch_sizes = tuple(map(int, args.batch_sizes.split(",")))
    args.recipes = tuple(args.recipes.split(","))
    if unknown := set(args.recipes) - set(ORDER):
        parser.error(f"no recipe {', '.join(unknown)}; known: {', '.join(ORDER)}")
    for path in (args.models / "student.onnx", args.models / "calibration", args.images / "split.json"):
        if not path.exists():
            parser.error(f"no {path}: make both folders with benchmarks/gpu/prepare.py")
    return args


def _all(args: argparse.Namespace, end: float) -> list[dict[str, Any]]:
    networks = [name for name in ("student", "plain", "light") if (args.models / f"{name}.onnx").is_file()]
    done: list[dict[str, Any]] = []
    for group in (["student", "plain"], ["light"]):
        for recipe in args.recipes:
            for name in (n for n in group if n in networks):
                done.append(_run(args, "build", name, recipe, end))
            if group[0] == "student" and _built(done, "student", recipe):
                done.append(_run(args, "layers", "student", recipe, end))
            for name in (n for n in group if _built(done, n, recipe)):
                if name != "plain":
                    done.append(_run(args, "records", name, recipe, end))
                done.append(_run(args, "device", name, recipe, end))
            if recipe == "fp16" and _built(done, "student", recipe) and group[0] == "student":
                done.append(_run(args, "one-launch", "student", recipe, end))
    for recipe in args.recipes[:1]:  # last: instrumenting TensorRT's kernels takes minutes
        if _built(done, "student", recipe):
            done += [_run(args, step, "student", recipe, end) for step in ("launches", "build-times")]
            done.append(_run(args, "short", "student", recipe, end, before=_sanitizer(), limit=SANITIZER_S))
    return done


def _built(done: list[dict[str, Any]], network: str, recipe: str) -> bool:
    return any((s["step"], s["network"], s["recipe"], s["outcome"]) == ("build", network, recipe, "done") for s in done)


def _sanitizer() -> list[str] | None:
    """Return the command prefix of compute-sanitizer; None where it is not installed."""
    path = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not path:
        return None
    options = ["--error-exitcode=9", "--target-processes=all", "--report-api-errors=no"]  # TensorRT provokes some
    return ["env", "CUDA_MODULE_LOADING=LAZY", path, *options]


def _run(
    args: argparse.Namespace,
    step: str,
    network: str,
    recipe: str,
    end: float,
    *,
    before: Sequence[str] | None = (),
    limit: float = math.inf,
) -> dict[str, Any]:
    """Run one step in its own process, prefixed by `before`, for at most `limit` seconds; return its outcome."""
    began = time.monotonic()
    fact = {"step": step, "network": network, "recipe": recipe, "seconds": 0.0}
    if before is None:
        return {**fact, "outcome": "skipped", "why": "compute-sanitizer is not installed"}
    if began > end:
        return {**fact, "outcome": "skipped", "why": "the time budget was used up"}
    words = ["--step", step, "--network", network, "--recipe", recipe]
    path = _result(args, step, network, recipe)
    path.unlink(missing_ok=True)  # from an earlier run
    command = [*before, sys.executable, *sys.argv, *words]
    try:
        code = subprocess.run(command, stdout=sys.stderr, check=False, timeout=min(end + 30 - began, limit)).returncode
    except subprocess.TimeoutExpired:
        return {**fact, "outcome": "failed", "why": f"took longer than {min(end + 30 - began, limit):.0f} s"}
    fact["seconds"] = round(time.monotonic() - began, 1)
    if code in (0, 1) and path.is_file():
        fact.update(json.loads(path.read_text()))
    else:
        why = f"ended by signal {-code}" if code < 0 else f"exit code {code}" + (", errors above" if code == 9 else "")
        fact.update(outcome="failed", why=why)
    sys.stderr.write(f"{step} {network} {recipe}: {fact['outcome']} in {fact['seconds']} s {fact.get('why', '')}\n")
    return fact


def _result(args: argparse.Namespace, step: str, network: str, recipe: str) -> Path:
    return Path(args.out / "steps" / f"{step}-{network}-{recipe}.json")


def _child(args: argparse.Namespace) -> int:
    """Carry out a step and write its outcome beside the others."""
    try:
        found = {"outcome": "done", **STEPS[args.step](args)}
    except NotMeasured as error:
        found = {"outcome": "skipped", "why": str(error)}
    except EdgekdError as error:
        found = {"outcome": "refused", "why": error.what, "fix": error.fix}
    except Exception:
        found = {"outcome": "failed", "why": traceback.format_exc()}
    atomic_write(_result(args, args.step, args.network, args.recipe), to_json(found))
    return 1 if found["outcome"] == "failed" else 0


if __name__ == "__main__":
    sys.exit(main())
