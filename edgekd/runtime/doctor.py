"""Report of what is installed, and a test run of every backend."""

from __future__ import annotations

import json
import signal
import subprocess

from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import AnyBackend, all_backends
from edgekd.backends.report import describe_host
from edgekd.child import start_child
from edgekd.errors import EdgekdError
from edgekd.extras import extras
from edgekd.files import temporary_folder
from edgekd.host import installed_version
from edgekd.runtime.self_test import graphs, self_test

CHILD = "edgekd.runtime.self_test"
"""Module that tests a backend in a process of its own."""
TIMEOUT_S = 600
"""Time that it may take; TensorRT times kernels as it builds."""


def report() -> tuple[list[str], bool]:
    """Report on this machine and its packages, and run a small network with every backend.

    Returns:
        The lines of `edgekd doctor`, and True if every installed backend works.
    """
    lines = [str(describe_host())]
    groups = extras()
    groups |= {backend.name: backend.packages for backend in all_backends() if backend.extra not in groups}
    for group, packages in groups.items():
        lines.append(f"[{group}] " + ", ".join(f"{p} {installed_version(p) or 'missing'}" for p in packages))
    results = {backend.name: _try(backend) for backend in all_backends()}
    lines += [f"{name}: {result}" for name, (result, _) in results.items()]
    return lines, all(works for _, works in results.values())


def _try(backend: AnyBackend) -> tuple[str, bool]:
    """Build and run two small stages.

    Returns:
        A line about it, and False if the backend is installed and does not work.
    """
    if backend.version() is None:
        return f"not installed ({backend.install_command})", True
    recipe = Recipe("fp32", batch_sizes=(1,))
    if reason := backend.cannot_run(recipe):
        return _try_to_build(backend, recipe, reason)
    return _in_child(backend) if backend.may_crash else self_test(backend, ["fp32"])


def _try_to_build(backend: AnyBackend, recipe: Recipe, reason: str) -> tuple[str, bool]:
    with temporary_folder("doctor") as folder:
        try:
            backend.build(graphs(quantised=False)[0], folder / f"stage_0{backend.suffix}", recipe=recipe)
        except EdgekdError as error:
            return str(error).replace("\n", " "), False
    return f"{backend.version()} builds ahead of time; none of its engines can run here: {reason}", True


def _in_child(backend: AnyBackend) -> tuple[str, bool]:
    """Test a backend in a process of its own, and report how it ended if it crashed."""
    with temporary_folder("doctor") as folder:
        steps, errors = folder / "steps", folder / "stderr"
        steps.touch()
        with errors.open("wb") as stderr:
            child = start_child(CHILD, backend.name, str(steps), stdout=subprocess.DEVNULL, stderr=stderr)
            try:
                code: int | None = child.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                child.kill()
                child.communicate()
        rows = [json.loads(line) for line in steps.read_text(encoding="utf-8").splitlines()]
        printed = [line.strip() for line in errors.read_text(errors="replace").splitlines() if line.strip()]
    last = rows[-1] if rows else {}
    if code == 0 and "line" in last:
        return last["line"], last["works"]
    how = f"did not end in {TIMEOUT_S // 60} minutes" if code is None else f"ended with exit code {code}"
    if code is not None and code < 0:
        how = f"crashed with {signal.Signals(-code).name}"
    where = f" in the step '{last['step']}'" if "step" in last else ""
    words = f"; its last words: {printed[-1]}" if printed else ""
    return f"{backend.version()} {how}{where}{words}", False
