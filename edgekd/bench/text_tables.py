"""Measures of classifiers as aligned text for a terminal: few columns; the rest is in JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from edgekd.bench.accuracy import Answered, ExitAccuracy, Metrics
from edgekd.bench.intervals import Interval
from edgekd.bench.paired import ALPHA, Paired, holm, p_text
from edgekd.bench.roc import Discrimination
from edgekd.text import aligned, percent

SHOWN_CLASSES = 20
"""Largest number of classes in a table."""


def text_table(results: Mapping[str, Metrics]) -> str:
    """Format results: a row for each, then two tables of the classes of the last one.

    Accuracy, rates, F1 and calibration error are in percent; kappa and areas are not. Of many classes, those with the
    lowest sensitivity are shown.
    """
    rows = [["", "accuracy [95 %]", "balanced", "F1", "kappa", "ROC-AUC", "confidence AUC", "ECE"]]
    for name, result in results.items():
        shares = [percent(v) for v in (result.balanced_accuracy, result.macro.f1)]
        areas = [_decimal(v) for v in (result.kappa, result.roc_auc, result.confidence_auc)]
        accuracy = with_interval(result.accuracy, result.accuracy_interval)
        rows.append([name, accuracy, *shares, *areas, percent(result.ece)])
    name, last = list(results.items())[-1]
    shown = _shown(last)
    more = f"the {len(shown)} of {len(last.per_class)} classes with the lowest sensitivity; --json prints all\n"
    tables = [aligned(rows), aligned(rate_rows(name, last)), aligned(discrimination_rows(name, last))]
    return "\n\n".join(tables) + "\n" + (more if len(shown) < len(last.per_class) else "")


def exits_text(exits: Mapping[str, ExitAccuracy]) -> str:
    """Format where the images of a cascade exited, and how many of them are right."""
    rows = [["exit", "images", "share", "accuracy [95 %]"]]
    for name, e in exits.items():
        rows.append([name, str(e.images), percent(e.share), with_interval(e.accuracy, e.accuracy_interval)])
    return aligned(rows)


def answered_text(answered: Answered) -> str:
    """Format coverage, and error among the images that are answered."""
    coverage = with_interval(answered.coverage, answered.coverage_interval)
    error = with_interval(answered.error, answered.error_interval)
    return f"{coverage} % of the images are answered, {error} % of these wrongly; the others are deferred to a person"


def classes_text(classes: Mapping[str, Paired], first: Metrics, second: Metrics, names: tuple[str, str]) -> str:
    """Format the sensitivities of two classifiers on the same images, with a test for each class.

    Args:
        classes: Class name to the comparison of the second with the first on the images of the class.
        first: Metrics of the first classifier.
        second: Metrics of the second classifier.
        names: Their names.
    """
    adjusted = dict(zip(classes, holm([paired.p_value for paired in classes.values()])))
    rows = [["sensitivity", "images", *names, "lost", "gained", "p"]]
    shown = [name for name in _shown(second) if name in classes]
    for name in shown:
        paired, both = classes[name], (percent(m.per_class[name].sensitivity) for m in (first, second))
        counts = (str(paired.images), *both, str(paired.lost), str(paired.gained))
        rows.append([name, *counts, p_text(adjusted[name])])
    found = [name for name, p in adjusted.items() if p <= ALPHA]
    beyond = f"classes that differ: {', '.join(found)}" if found else "no class differs beyond noise"
    return f"{aligned(rows)}\n{beyond}"


def _shown(result: Metrics) -> list[str]:
    """List the classes to show: all, or of many the least sensitive ones that have images."""
    if len(result.per_class) <= SHOWN_CLASSES:
        return list(result.per_class)
    rates = {name: r.sensitivity for name, r in result.per_class.items() if r.sensitivity is not None}
    return sorted(rates, key=lambda name: rates[name])[:SHOWN_CLASSES]


def rate_rows(name: str, result: Metrics) -> list[list[str]]:
    """Make a table of sensitivity, specificity and precision of each class; the header first."""
    rows = [[f"class ({name})", "images", "sensitivity [95 %]", "specificity [95 %]", "precision"]]
    for class_ in _shown(result):
        r = result.per_class[class_]
        sensitivity = with_interval(r.sensitivity, r.sensitivity_interval)
        specificity = with_interval(r.specificity, r.specificity_interval)
        rows.append([class_, str(r.images), sensitivity, specificity, percent(r.precision)])
    return rows


def discrimination_rows(name: str, result: Metrics) -> list[list[str]]:
    """Make a table of the areas of each class, and of its sensitivity at the fixed specificity; the header first."""
    at = f"sensitivity at {100 * result.specificity:g} % spec."
    rows = [[f"class ({name})", "ROC-AUC [95 %]", "PR-AUC [95 %]", at]]
    for class_ in _shown(result):
        d = result.discrimination.get(class_, Discrimination())
        areas = ((d.roc_auc, d.roc_auc_interval), (d.pr_auc, d.pr_auc_interval))
        cells = [with_interval(*area, _decimal) for area in areas]
        rows.append([class_, *cells, with_interval(d.sensitivity, d.sensitivity_interval)])
    return rows


def _decimal(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def with_interval(value: float | None, interval: Interval | None, form: Callable[[float | None], str] = percent) -> str:
    """Format a value and, if there is one, its interval: `93.94 [92.07, 95.48]`."""
    return form(value) + (f" [{form(interval[0])}, {form(interval[1])}]" if interval else "")


def interval_method(result: Metrics) -> str:
    """Describe how the intervals were computed."""
    unit = "images" if result.groups is None else f"{result.groups} groups of images"
    return (
        f"95 % intervals, of independent {unit}: Clopper-Pearson for rates, DeLong for ROC-AUC,\n"
        "bootstrap for PR-AUC and for sensitivity at a fixed specificity. Confidence AUC: ROC-AUC of the\n"
        "confidence against whether the answer is right. ECE: expected calibration error."
    )


def confusion_text(result: Metrics) -> str:
    """Format the confusion matrix: rows are true classes, columns (numbered) predicted ones.

    Of many classes, the most frequent confusions are listed.
    """
    names = list(result.per_class)
    if len(names) > SHOWN_CLASSES:
        counts = np.array(result.confusion)
        np.fill_diagonal(counts, 0)
        worst = np.argsort(-counts, axis=None, kind="stable")[: min(SHOWN_CLASSES, np.count_nonzero(counts))]
        pairs = [divmod(int(at), len(names)) for at in worst]
        listed = [[names[truth], names[answer], str(counts[truth, answer])] for truth, answer in pairs]
        return aligned([["truth", "prediction", "images"], *listed])
    rows = [["truth \\ prediction", *(f"[{c}]" for c in range(len(names)))]]
    for c, (name, row) in enumerate(zip(names, result.confusion)):
        rows.append([f"[{c}] {name}", *(str(v) if v else "." for v in row)])
    return aligned(rows)
