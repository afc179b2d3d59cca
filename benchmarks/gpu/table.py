"""Renders the outcomes of the steps as Markdown: figures, and verdicts on the targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekd.bench.tables import pipe_table

Steps = list[dict[str, Any]]


def table(steps: Steps, out: Path, *, dry_run: bool) -> str:
    """Render all outcomes on one page."""
    parts = ["# TensorRT benchmark", _where(steps, dry_run), _builds(steps), _latencies(steps), _device(steps)]
    parts += [_targets(steps), _missing(steps)]
    return "\n\n".join(filter(None, parts)) + "\n"


def find(steps: Steps, step: str, network: str, recipe: str) -> dict[str, Any] | None:
    """Return the step's outcome; None unless it was done."""
    for s in steps:
        if (s["step"], s["network"], s["recipe"], s["outcome"]) == (step, network, recipe, "done"):
            return s
    return None


def _done(steps: Steps, step: str) -> Steps:
    return [s for s in steps if s["step"] == step and s["outcome"] == "done"]


def _where(steps: Steps, dry_run: bool) -> str:
    warning = "**Dry run: ONNX Runtime on the CPU in place of TensorRT. No figure here describes a GPU.**\n\n"
    built = _done(steps, "build")
    if not built:
        return warning * dry_run + "Nothing was built."
    host = built[0]["host"]
    reported, gpu = next(iter(host["backends"].values()), {}), next(iter(_done(steps, "device")), {})
    facts = [
        reported.get("gpu", host["cpu"]),
        f"SM {reported['sm']}" if "sm" in reported else "",
        f"{built[0]['backend_version']}",
    ]
    facts += (
        [f"CUDA {gpu['cuda']['runtime']}, driver {gpu['cuda']['driver']}, {gpu['bindings']}"] if "cuda" in gpu else []
    )
    energy = gpu.get("energy", {})
    facts += [f"{energy['sm_mhz']} MHz, limit {energy['limit_watts']:.0f} W"] if "sm_mhz" in energy else []
    return warning * dry_run + "; ".join(filter(None, facts))


def _rows(head: list[str], rows: list[list[str]]) -> str:
    return pipe_table((head, rows)) if rows else ""


def _numbers(values: Any, form: str) -> str:
    return " / ".join(f"{v:{form}}" for v in values)


def _builds(steps: Steps) -> str:
    head = ["engine", "build s", "MiB", "precision read back", "largest logit difference", "accuracy drop (points)"]
    rows = []
    for s in _done(steps, "build"):
        ran = ", ".join(f"{name} {share:.0%}" for name, share in s["precision"].items())
        accuracy = s["accuracy"]
        lost = [100 * (a - b) for a, b in zip(accuracy["reference"], accuracy["engine"])]
        off, size = s["parity"]["max_abs_logit_difference"], sum(s["bytes"].values()) / 2**20
        name = f"{s['network']} {s['recipe']}"
        rows.append([name, f"{s['build_seconds']}", f"{size:.1f}", ran, _numbers(off, ".1e"), _numbers(lost, ".2f")])
    return "## Engines\n\nEvery exit against ONNX Runtime FP32.\n\n" + _rows(head, rows) if rows else ""


def _latencies(steps: Steps) -> str:
    rows = []
    sizes = sorted(
        {int(size) for s in _done(steps, "records") for v in s["variants"].values() for size in v["mean_ms"]}
    )
    for s in _done(steps, "records"):
        for name, v in s["variants"].items():
            means = [f"{v['mean_ms'][str(b)]:.3f}" if str(b) in v["mean_ms"] else "" for b in sizes]
            shares = _numbers((100 * share for share in v["shares"]), ".0f") if name == "cascade" else ""
            rows.append([f"{s['network']} {s['recipe']}: {name}", *means, f"{100 * v['accuracy']:.2f}", shares])
    head = ["wall clock, mean ms per batch", *(f"batch {b}" for b in sizes), "accuracy %", "exit share %"]
    scope = "From float32 images in host memory to the decision there, including transfers and CUDA graphs.\n\n"
    return "## Latency\n\n" + scope + _rows(head, rows) if rows else ""


def _device(steps: Steps) -> str:
    rows = []
    for s in _done(steps, "device"):
        for graph, times in s["device_ms"].items():
            rows.append([f"{s['network']} {s['recipe']}: {graph}", _numbers(times.values(), ".4f")])
        rows.append([f"{s['network']} {s['recipe']}: memory on the GPU, MiB", f"{s['device_mib']:.0f}"])
        for kind, e in s["energy"].items():
            if isinstance(e, dict):
                rows.append(
                    [f"{s['network']} {s['recipe']}: {kind}, mJ per image above idle", f"{e['mj_an_image']:.2f}"]
                )
    return "## Device clock\n\n" + _rows(["median ms by batch size", ""], rows) if rows else ""


def _targets(steps: Steps) -> str:
    lines = [f"- {name}: {_verdict(value, limit)}" for name, value, limit in _figures(steps)]
    return "## Targets\n\n" + "\n".join(lines)


def _verdict(value: float | None, limit: float) -> str:
    if value is None:
        return f"not measured (target: at most {limit:g})"
    return f"{value:.3g} (target: at most {limit:g}): {'met' if value <= limit else 'NOT met'}"


def _figures(steps: Steps) -> list[tuple[str, float | None, float]]:
    """List name, value (None where a step is missing) and limit of every target."""
    found = [
        ("fp16 cascade's mean latency / plain fp16 network's, batch 1", _ratio(steps, "fp16", "cascade", "plain"), 0.6),
        ("accuracy drop of the fp16 cascade from the plain network, points", _points(steps, "fp16"), 0.5),
        (
            "cascade without early exit / monolithic, fp16, batch 1",
            _ratio(steps, "fp16", "no-early-exit", "full"),
            1.15,
        ),
        ("host work between stages, fp16, microseconds", _gap(steps), 25.0),
        ("int8-fp16 / fp16, last exit, batch 1", _against_fp16(steps, "final"), 1.0),
        ("int8-fp16 / fp16, cascade, batch 1", _against_fp16(steps, "cascade"), 1.0),
    ]
    for s in _done(steps, "build"):
        name = f"{s['network']} {s['recipe']}: "
        if s["recipe"] == "fp16":
            found.append((name + "largest logit difference", max(s["parity"]["max_abs_logit_difference"]), 2e-2))
        accuracy = s["accuracy"]
        lost = max(100 * (a - b) for a, b in zip(accuracy["reference"], accuracy["engine"]))
        found.append((name + "accuracy drop of the worst exit, points", lost, 0.5))
    return found


def _variant(steps: Steps, recipe: str, name: str) -> dict[str, Any] | None:
    record = find(steps, "records", "student", recipe)
    return record["variants"].get(name) if record else None


def _ratio(steps: Steps, recipe: str, name: str, other: str) -> float | None:
    a, b = (_variant(steps, recipe, n) for n in (name, other))
    return float(a["mean_ms"]["1"] / b["mean_ms"]["1"]) if a and b else None


def _points(steps: Steps, recipe: str) -> float | None:
    cascade, plain = (_variant(steps, recipe, n) for n in ("cascade", "plain"))
    return round(100 * float(plain["accuracy"] - cascade["accuracy"]), 6) if cascade and plain else None


def _against_fp16(steps: Steps, name: str) -> float | None:
    a, b = (_variant(steps, recipe, name) for recipe in ("int8-fp16", "fp16"))
    return float(a["mean_ms"]["1"] / b["mean_ms"]["1"]) if a and b else None


def _gap(steps: Steps) -> float | None:
    found = find(steps, "device", "student", "fp16")
    return found["gap_us"] if found else None


def _missing(steps: Steps) -> str:
    lines = [
        f"- {s['step']} {s['network']} {s['recipe']}: {s['outcome']}: {_line(s)}"
        for s in steps
        if s["outcome"] != "done"
    ]
    return "## Not done\n\n" + "\n".join(lines) if lines else ""


def _line(step: dict[str, Any]) -> str:
    """Return the most informative line: the last of a traceback, else the first."""
    return str(step["why"]).strip().splitlines()[-1 if step["outcome"] == "failed" else 0]
