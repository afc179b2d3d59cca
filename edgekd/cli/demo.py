"""`edgekd demo`: the whole workflow on synthetic cells, in minutes."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.common import echo, reserve
from edgekd.errors import ArtifactError

STEPS = """
data synthetic --out {out}/cells --count 3000 --size 80
train --data {out}/cells --model resnet18 --protocol demo --split ratio:3,1,1,5 --group cluster --out {out}/teacher
distill --data {out}/cells --teacher {out}/teacher --protocol demo --weights {out}/teacher --out {out}/student
evaluate {out}/student
export {out}/teacher --out {out}/teacher.onnx
export {out}/student --out {out}/student.onnx
compile {out}/student.onnx --recipe int8 --data {out}/cells --split {out}/student/split.json \
--out {out}/student.engine
tune {out}/student.engine --data {out}/cells --split {out}/student/split.json --max-accuracy-drop 1
bench {out}/student.engine --data {out}/cells --split {out}/student/split.json \
--against plain-resnet18={out}/teacher.onnx --out {out}/record.json
"""


def demo(out: Annotated[Path, typer.Option(help="New folder for all results.")] = Path("demo")) -> None:
    """Run the whole workflow on synthetic cells; each command is printed before it runs."""
    if out.exists() and any(out.iterdir()):
        raise ArtifactError(f"{out} is not empty", fix="remove it, or choose another --out")
    reserve(out)
    for step in STEPS.strip().splitlines():
        words = [word.format(out=out) for word in shlex.split(step)]
        echo(f"\n$ edgekd {shlex.join(words)}", bold=True)
        if code := _run([sys.executable, "-m", "edgekd", *words]):
            raise typer.Exit(code if code > 0 else 128 - code)
    echo(f"\nopen {out}/record.html")


def _run(command: list[str]) -> int:
    """Run a command and return its exit code; if this process is stopped, the command can remove unfinished output."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    finally:
        process.terminate()
        process.wait()
