"""Options of `edgekd tune` and `edgekd certify` that state promises, and what is printed of certificates."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekd.errors import ConfigError, check_known

if TYPE_CHECKING:
    from edgekd.artifacts.certificate import Certificate, Evidence, Loss, Promise
    from edgekd.certification.losses import Floats
    from edgekd.runtime.certify import Certified
    from edgekd.runtime.tuning import PathPoint

_PANEL = "Promises"
SHOWN = 10
"""Largest number of certified settings that are printed beside the chosen one."""
MaxChangeOption = Annotated[
    float | None,
    typer.Option(metavar="%", help="Answers that may differ from the reference; no labels.", rich_help_panel=_PANEL),
]
MaxLostOption = Annotated[
    float | None,
    typer.Option(metavar="%", help="Images that may be wrong where the reference is right.", rich_help_panel=_PANEL),
]
MaxDropOption = Annotated[
    float | None, typer.Option(metavar="POINTS", help="Accuracy that may be lost, net.", rich_help_panel=_PANEL)
]
MaxMissOption = Annotated[
    list[str] | None,
    typer.Option(metavar="CLASS=%", help="The same as --max-lost among a class's images.", rich_help_panel=_PANEL),
]
MinSensitivityOption = Annotated[
    list[str] | None,
    typer.Option(metavar="CLASS=0.95", help="Sensitivity among the answered images.", rich_help_panel=_PANEL),
]
CostsOption = Annotated[
    Path | None,
    typer.Option(help="CSV file: a row of costs for each true class, a column for each.", rich_help_panel=_PANEL),
]
MaxCostOption = Annotated[
    float | None, typer.Option(help="Rise of the mean cost, in units of --costs.", rich_help_panel=_PANEL)
]
DeferOption = Annotated[
    float | None,
    typer.Option(metavar="%", help="Answered images that may be wrong; others are deferred.", rich_help_panel=_PANEL),
]
PerExitOption = Annotated[
    bool, typer.Option("--per-exit", help="Promise also for the images up to each exit.", rich_help_panel=_PANEL)
]
CertaintyOption = Annotated[float, typer.Option(help="Probability that all promises hold.", rich_help_panel=_PANEL)]
ReferenceOption = Annotated[
    Path | None,
    typer.Option(help="student.onnx to compare with; default: the engine without early exit.", rich_help_panel=_PANEL),
]


def promises_of(
    classes: tuple[str, ...],
    *,
    exits: int,
    max_change: float | None = None,
    max_lost: float | None = None,
    max_drop: float | None = None,
    max_miss: Sequence[str] | None = None,
    min_sensitivity: Sequence[str] | None = None,
    costs: Path | None = None,
    max_cost: float | None = None,
    defer: float | None = None,
    per_exit: bool = False,
) -> tuple[tuple[Promise, ...], Floats | None]:
    """Return the promises that options state, and the costs (C, C) of `cost`.

    Raises:
        ConfigError: A value out of range, an unknown class, or options that do not fit together.
    """
    from edgekd.artifacts.certificate import Promise
    from edgekd.certification.losses import largest_rise

    if (costs is None) != (max_cost is None):
        raise ConfigError("--costs and --max-cost belong together", fix="give both, or none")
    percentages: dict[Loss, float | None] = {
        "change": max_change, "lost": max_lost, "drop": max_drop, "defer": defer
    }  # fmt: skip
    found = [
        Promise(loss, _share(_option(loss), value / 100)) for loss, value in percentages.items() if value is not None
    ]
    for name, value in _of_classes("--max-miss", max_miss, classes):
        found.append(Promise("miss", _share("--max-miss", value / 100), name))
    for name, value in _of_classes("--min-sensitivity", min_sensitivity, classes):
        found.append(Promise("sensitivity", _share("--min-sensitivity", 1 - value), name))
    matrix = None
    if costs is not None and max_cost is not None:
        matrix = _read_costs(costs, classes)
        found.append(Promise("cost", _share("--max-cost", max_cost / largest_rise(matrix))))
    if per_exit:
        repeated = [p for p in found if p.loss in ("change", "lost", "miss")]
        if not repeated:
            raise ConfigError("--per-exit needs --max-change, --max-lost or --max-miss", fix="add one of them")
        found += [Promise(p.loss, p.limit, p.class_name, k) for p in repeated for k in range(exits - 1)]
    return tuple(found), matrix


def _option(loss: Loss) -> str:
    return "--defer" if loss == "defer" else f"--max-{loss}"


def _share(option: str, share: float) -> float:
    if not 0 < share < 1:
        most = "1, for example 0.95" if option == "--min-sensitivity" else "100 %"
        raise ConfigError(f"{option} is out of range", fix=f"give more than 0 and less than {most}")
    return share


def _of_classes(option: str, values: Sequence[str] | None, classes: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    for value in values or ():
        name, _, number = value.rpartition("=")
        try:
            amount = float(number)
        except ValueError:
            amount = math.nan
        if not name or not math.isfinite(amount):
            raise ConfigError(f"{option} {value} is not CLASS=NUMBER", fix=f"for example {option} {classes[0]}=0.95")
        check_known(option, name, classes)
        yield name, amount


def _read_costs(path: Path, classes: tuple[str, ...]) -> Floats:
    """Read costs (C, C): the first row names the answered classes, the first column the true ones.

    Raises:
        ConfigError: The file is missing, or not a number for each pair of classes.
    """
    import numpy as np

    fix = f"a table with a first row and a first column of the classes {', '.join(classes)}, and numbers"
    try:
        head, *rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
        table = {row[0]: dict(zip(head[1:], map(float, row[1:]))) for row in rows if row}
        costs = np.array([[table[true][answer] for answer in classes] for true in classes])
    except FileNotFoundError:
        raise ConfigError(f"no file of costs at {path}", fix="check the path") from None
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(f"{path} does not list the costs of all pairs of classes: {error}", fix=fix) from None
    if set(table) != set(classes) or not np.isfinite(costs).all() or costs.max() == costs.min():
        raise ConfigError(f"{path} does not list different costs of exactly these classes", fix=fix)
    return costs


def needs_labels(promises: Sequence[Promise]) -> bool:
    """Return True if one of the promises needs labels."""
    from edgekd.artifacts.certificate import WITHOUT_LABELS

    return any(promise.loss not in WITHOUT_LABELS for promise in promises)


def certified_table(found: Certified) -> str:
    """Format certified settings from slow to fast, the chosen one marked, and the setting that failed."""
    from edgekd.text import aligned

    others = [tested for tested in found.points if tested[0].policy != found.policy]
    shown = others[:: max(1, math.ceil(len(others) / SHOWN))]
    chosen = [tested for tested in found.points if tested[0].policy == found.policy]
    marked = [("", tested) for tested in shown] + [("chosen", tested) for tested in chosen]
    marked.sort(key=lambda row: -row[1][0].latency_ms)
    if found.failed:
        marked.append(("not certified", found.failed))
    head = ("expected ms", "exit share %", "thresholds", "losses", "upper bound %", "")
    return aligned([head, *(_row(*row) for row in marked)])


def _row(mark: str, tested: tuple[PathPoint, tuple[Evidence, ...]]) -> tuple[str, str, str, str, str, str]:
    from edgekd.artifacts.certificate import is_untested

    point, evidence = tested
    thresholds = " ".join("never" if t > 1 else f"{t:.4f}" for t in point.policy.thresholds)
    return (
        f"{point.latency_ms:.3f}",
        " / ".join(f"{100 * share:.0f}" for share in point.shares),
        thresholds + (f", defer below {point.policy.defer_below:.4f}" if point.policy.defer_below else ""),
        ", ".join(_losses(one) for one in evidence),
        ", ".join("–" if is_untested(one) else f"{100 * one.upper_bound:.2f}" for one in evidence),
        mark,
    )


def _losses(evidence: Evidence) -> str:
    from edgekd.artifacts.certificate import is_untested

    return "its own reference" if is_untested(evidence) else f"{evidence.losses:.4g} of {evidence.units}"


def certificate_lines(certificate: Certificate) -> list[str]:
    """Return the sentence of a certificate and its warnings, as lines."""
    from edgekd.artifacts.certificate import certificate_sentence

    return [certificate_sentence(certificate), *(f"warning: {warning}" for warning in certificate.warnings)]
