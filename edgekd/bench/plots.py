"""Plots of a record as self-contained SVG text. Needs matplotlib."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.bench.accuracy import Metrics
from edgekd.bench.record import Record, Variant
from edgekd.errors import ConfigError
from edgekd.files import atomic_write
from edgekd.text import code_point, visible

log = logging.getLogger(__name__)
FORMATS: dict[str, dict[str, None]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""Formats of plot files, and the metadata omitted from them so that the same numbers give the same file."""
LABEL = 48
"""Largest number of characters of a name in a plot."""
BLUE, GREY, ORANGE = "#2563a8", "#8a94a3", "#d9742b"
EXITS = ("#2a9d8f", "#8ab17d", "#e9c46a", "#e76f51", "#9b5de5", "#577590")
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#c3c9d1",
    "axes.labelcolor": "#39424e",
    "xtick.color": "#39424e",
    "ytick.color": "#39424e",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff3",
    "svg.hashsalt": "edgekd",
    "svg.fonttype": "path",
    "text.parse_math": False,  # a name may hold dollar signs
    "text.usetex": False,
}


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """Replace the user's matplotlibrc by our settings within the block."""
    try:
        from matplotlib import rc_context
    except ImportError:
        raise ConfigError("plots need matplotlib", fix="pip install 'edgekd[report]'") from None
    with rc_context(_STYLE):
        yield


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=FORMATS["svg"])
    return out.getvalue()[out.getvalue().index("<svg") :]


def _labels(names: Iterable[str]) -> list[str]:
    """Return the names as a figure made afterwards can draw them: in installed fonts, else as code points."""
    from matplotlib import rcParams

    names = [visible(name if len(name) <= LABEL else name[: LABEL - 1] + "…") for name in names]
    fonts, missing = _fonts(frozenset("".join(names)))
    rcParams["font.family"] = [_STYLE["font.family"], *fonts]
    return ["".join(code_point(c) if c in missing else c for c in name) for name in names]


@lru_cache
def _fonts(characters: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """Find installed fonts for the characters that the usual one lacks; return them and those that no font has."""
    from matplotlib.font_manager import findfont, fontManager, get_font

    missing = {c for c in characters if ord(c) not in get_font(findfont(_STYLE["font.family"])).get_charmap()}
    found = []
    for font in sorted(fontManager.ttflist, key=lambda f: (f.name, f.fname)):
        if not missing or "lastresort" in font.name.lower().replace(" ", ""):  # has a box for every character
            continue
        with contextlib.suppress(RuntimeError, OSError):  # bitmaps, and files that are gone
            if has := missing & set(map(chr, get_font(font.fname).get_charmap())):
                found.append(font.name)
                missing -= has
    if missing:
        log.warning("no installed font has %s: plots show the code points", " ".join(sorted(missing)))
    return found, frozenset(missing)


@_style()
def trade_off(record: Record) -> str:
    """Plot accuracy on the test images against mean latency at batch 1, and the trade-off curve of `edgekd tune`."""
    figure, axes = _figure(8.4, 4.6)
    if record.curve:
        xs, ys = [p.latency_ms for p in record.curve], [p.accuracy for p in record.curve]
        label = "thresholds tried by tune (validation images, expected latency)"
        axes.plot(xs, [100 * y for y in ys], "-", color="#b9cde3", marker=".", label=label, zorder=1)
        axes.legend(loc="lower right", fontsize=9, frameon=False)
    variants = sorted(record.variants, key=lambda v: v.latency(1).mean)
    for i, (v, name) in enumerate(zip(variants, _labels(v.name for v in variants))):
        colour = ORANGE if v.name == "cascade" else GREY if v.baseline else BLUE
        mean, (low, high) = v.latency(1).mean, v.latency(1).mean_interval
        axes.plot([low, high], [100 * v.metrics.accuracy] * 2, color=colour, lw=2, alpha=0.5)
        axes.plot(mean, 100 * v.metrics.accuracy, "o", color=colour, ms=9 if v.name == "cascade" else 6)
        place = (0, (8, -16, 20, -28)[i % 4])  # neighbours would write over each other
        axes.annotate(
            name, (mean, 100 * v.metrics.accuracy), place, textcoords="offset points", ha="center", fontsize=9
        )
    axes.set_xscale("log")
    axes.margins(0.12)
    ticks = _ticks(*axes.get_xlim())
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("mean latency of one image, ms (logarithmic)")
    axes.set_ylabel("accuracy, %")
    return _svg(figure)


def _ticks(low: float, high: float) -> list[float]:
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    return [t for d in decades for t in (10.0**d, 2 * 10.0**d, 5 * 10.0**d) if low <= t <= high]


@_style()
def distribution(variant: Variant) -> str:
    """Plot the histogram of all latencies at batch 1, coloured by exit."""
    figure, axes = _figure(8.4, 3.6)
    timing, summary = variant.timings[0], variant.latency(1)
    samples, exits = np.concatenate(timing.samples_ms), np.concatenate(timing.exits)
    used = np.unique(exits).tolist()
    end = float(np.quantile(samples, 0.995))
    beyond = int((samples > end).sum())
    bins = np.linspace(float(samples.min()), end, 61)
    axes.hist(
        [samples[exits == k] for k in used],
        bins=bins,
        stacked=True,
        color=[EXITS[k % len(EXITS)] for k in used],
        label=[f"exit {k}" for k in used],
    )
    for value, name in ((summary.p50, "p50"), (summary.mean, "mean"), (summary.p90, "p90")):
        axes.axvline(value, color="#39424e", lw=1, ls={"p50": "-", "mean": ":", "p90": "--"}[name], label=name)
    axes.set_xlabel(f"latency of one image, ms ({beyond} of {len(samples)} queries are beyond the right edge)")
    axes.set_ylabel("queries")
    axes.legend(fontsize=9, frameon=False)
    return _svg(figure)


@_style()
def exit_shares(variant: Variant, labels: Sequence[int], classes: Sequence[str]) -> str:
    """Plot the share of the test images that take each exit, in all and by true class."""
    names = _labels(classes)
    figure, axes = _figure(8.4, 0.9 + 0.42 * (len(classes) + 1))
    exits, truth = np.array(variant.exits), np.array(labels)
    used = range(int(exits.max()) + 1)
    rows = [("all", np.ones(len(truth), bool)), *((name, truth == c) for c, name in enumerate(names))]
    rows = [(name, chosen) for name, chosen in rows if chosen.any()]
    start = np.zeros(len(rows))
    for k in used:
        width = np.array([100 * float((exits[chosen] == k).mean()) for _, chosen in rows])
        bars = axes.barh(
            range(len(rows)), width, left=start, color=EXITS[k % len(EXITS)], label=f"exit {k}", height=0.7
        )
        axes.bar_label(bars, [f"{p:.0f}" if p >= 4 else "" for p in width], label_type="center", color="white")
        start += width
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(visible=False)
    axes.set_xlabel("share of the test images, %")
    figure.legend(loc="outside upper center", ncols=len(used), fontsize=9, frameon=False)
    return _svg(figure)


def _confusion(result: Metrics) -> Any:
    count = len(result.confusion)
    side = 2.4 + 0.55 * min(count, 24)
    names = _labels(result.per_class)
    figure, axes = _figure(side + 1.2, side)
    values = np.array(result.confusion)
    rates = values / np.maximum(values.sum(axis=1, keepdims=True), 1)
    axes.imshow(rates, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(count), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(count), names)
    axes.set_xlabel("prediction")
    axes.set_ylabel("truth")
    axes.grid(visible=False)
    if count <= 24:
        for row, column in np.argwhere(values):
            colour = "white" if rates[row, column] > 0.5 else "#39424e"
            axes.text(column, row, str(values[row, column]), ha="center", va="center", color=colour, fontsize=9)
    return figure


@_style()
def confusion_svg(result: Metrics) -> str:
    """Plot the confusion matrix, shaded by the share of each true class."""
    return _svg(_confusion(result))


def _reliability(result: Metrics) -> Any:
    figure, axes = _figure(5.2, 5.0)
    confidence, accuracy = (
        [100 * v for v in vs] for vs in zip(*((b.confidence, b.accuracy) for b in result.reliability))
    )
    shares = [100 * b.images / result.n for b in result.reliability]
    axes.plot([0, 100], [0, 100], "--", color=GREY, lw=1, label="perfect calibration")
    axes.bar(confidence, shares, width=3, color="#d5dbe3", label="share of the images")
    axes.plot(confidence, accuracy, "o-", color=BLUE, ms=5, label="accuracy")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 101)
    axes.set_xlabel(f"confidence, % (calibration error {100 * result.ece:.2f} points)")
    axes.set_ylabel("%")
    axes.legend(loc="upper left", fontsize=9, frameon=False)
    return figure


@_style()
def reliability_svg(result: Metrics) -> str:
    """Plot accuracy against confidence in bins of the confidence (reliability diagram)."""
    return _svg(_reliability(result))


def picture_format(path: Path) -> str:
    """Return the format given by a plot file's suffix: png, svg or pdf.

    Raises:
        ConfigError: The suffix is another one, or matplotlib is missing.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise ConfigError(f"{path} has no suffix of a plot", fix=f"end it in .{', .'.join(FORMATS)}")
    with _style():  # which needs matplotlib
        return kind


def write_confusion(result: Metrics, path: Path) -> None:
    """Write the confusion matrix as a plot file, in the format given by its suffix (see `picture_format`)."""
    _write(_confusion, result, path)


def write_reliability(result: Metrics, path: Path) -> None:
    """Write the reliability diagram as a plot file, in the format given by its suffix (see `picture_format`)."""
    _write(_reliability, result, path)


def _write(draw: Callable[[Metrics], Any], result: Metrics, path: Path) -> None:
    kind, out = picture_format(path), io.BytesIO()
    with _style():
        draw(result).savefig(out, format=kind, dpi=150, metadata=FORMATS[kind])
    atomic_write(path, out.getvalue())
