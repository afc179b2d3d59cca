"""All measures of a network's answers on one set of images, exit by exit and against another network's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgekd.bench.accuracy import Answered, ExitAccuracy, Metrics, answered, exit_accuracies, metrics
from edgekd.bench.paired import Paired, compare_answers, compare_classes, verdict, verdicts
from edgekd.bench.paired import method as test_method
from edgekd.bench.roc import SPECIFICITY
from edgekd.bench.text_tables import (
    answered_text,
    classes_text,
    confusion_text,
    exits_text,
    interval_method,
    text_table,
)
from edgekd.policy import Decision
from edgekd.types import Labels

CASCADE, NO_EARLY_EXIT = "cascade", "no-early-exit"
"""Rows of a tuned engine with and without early exit."""


@dataclass(frozen=True)
class Against:
    """Comparison with another network on the same images.

    Attributes:
        name: Name of the other network.
        rows: Row to the other network's row that it is compared with: the one of the same name, else its last one.
        paired: Row to the comparison.
        metrics: Metrics of the other's row that the last row is compared with.
        classes: Class name to the comparison of the last rows on the images of that class.
    """

    name: str
    rows: dict[str, str]
    paired: dict[str, Paired]
    metrics: Metrics
    classes: dict[str, Paired]


@dataclass(frozen=True)
class Evaluation:
    """Measures of every row of a network: its exits, their ensemble, and the cascade without and with early exit.

    Attributes:
        rows: Row to its metrics; the last row is the network's answer.
        exits: Exit to the images of the cascade that took it; empty without a cascade.
        answered: Images that the last row answers; None if it passes none on to a person.
        no_early_exit: Comparison of the cascade with the same network without early exit; None without a cascade.
        against: Comparison with another network, if there is one.
    """

    rows: dict[str, Metrics]
    exits: dict[str, ExitAccuracy]
    answered: Answered | None = None
    no_early_exit: Paired | None = None
    against: Against | None = None

    def table(self) -> dict[str, dict[str, Any]]:
        """Return everything for JSON: a table for each row."""
        found = {name: dataclasses.asdict(row) for name, row in self.rows.items()}
        last = list(found.values())[-1]
        if self.no_early_exit:
            last["exits"] = {exit: dataclasses.asdict(e) for exit, e in self.exits.items()}
            last["no_early_exit"] = dataclasses.asdict(self.no_early_exit)
        if self.answered:
            last["answered"] = dataclasses.asdict(self.answered)
        if self.against:
            for name, paired in self.against.paired.items():
                theirs = {"name": self.against.name, "row": self.against.rows[name]}
                found[name]["against"] = theirs | dataclasses.asdict(paired)
            last["against"]["classes"] = {c: dataclasses.asdict(p) for c, p in self.against.classes.items()}
        return found

    def text(self) -> str:
        """Format the measures as text of 100 columns, if names are short."""
        last = list(self.rows.values())[-1]
        parts = [f"{text_table(self.rows)}\n{interval_method(last)}", confusion_text(last)]
        if self.no_early_exit:
            parts.append(exits_text(self.exits))
        if self.answered:
            parts.append(answered_text(self.answered))
        if self.no_early_exit:
            compared = verdict(self.no_early_exit, self.no_early_exit.p_value)
            parts.append(f"{CASCADE} against {NO_EARLY_EXIT}: {compared}\n({test_method(last.groups, 1)})")
        if self.against:
            parts += _against_text(self.against, self.rows)
        return "\n\n".join(parts)


def evaluate_decisions(
    decisions: Mapping[str, Decision],
    labels: Labels,
    classes: tuple[str, ...],
    *,
    groups: Labels | None = None,
    specificity: float = SPECIFICITY,
    against: Mapping[str, Decision] | None = None,
    name: str = "",
) -> Evaluation:
    """Measure a network.

    Args:
        decisions: Row to the decisions on the N images; the last row is the network's answer.
        labels: True class indices (N,).
        classes: Class names.
        groups: Group of each image (N,); None if all images are independent.
        specificity: Specificity at which each class's sensitivity is read off its ROC curve.
        against: The same of another network with the same classes.
        name: Its name.
    """

    def measure(of: Decision) -> Metrics:
        return metrics(
            of.probabilities, labels, classes, groups=groups, confidences=of.confidence, specificity=specificity
        )

    answers = {row: of.probabilities.argmax(axis=1) for row, of in decisions.items()}
    row, last = list(decisions.items())[-1]
    right = answers[row] == labels
    found = Evaluation(
        rows={row: measure(of) for row, of in decisions.items()},
        exits={},
        answered=answered(last.deferred, right, groups) if last.defer_below else None,
    )
    if row == CASCADE:
        count = sum(name.startswith("exit_") for name in decisions)
        found = dataclasses.replace(
            found,
            exits=exit_accuracies(last.exits, right, count, groups),
            no_early_exit=compare_answers(labels, answers[row], answers[NO_EARLY_EXIT], groups=groups),
        )
    if against is None:
        return found
    theirs = {their: of.probabilities.argmax(axis=1) for their, of in against.items()}
    rows = {row: row if row in theirs else list(theirs)[-1] for row in answers}
    other = Against(
        name=name,
        rows=rows,
        paired={
            row: compare_answers(labels, answers[row], theirs[their], groups=groups) for row, their in rows.items()
        },
        metrics=measure(against[rows[row]]),
        classes=compare_classes(labels, answers[row], theirs[rows[row]], classes, groups=groups),
    )
    return dataclasses.replace(found, against=other)


def _against_text(against: Against, rows: Mapping[str, Metrics]) -> list[str]:
    found = {f"{row} against {against.rows[row]} of {against.name}": paired for row, paired in against.paired.items()}
    name, last = list(rows.items())[-1]
    lines = [f"{pair}: {text}" for pair, text in verdicts(found).items()]
    lines.append(f"({test_method(last.groups, len(found))})")
    columns = (f"{against.name}", name)
    return ["\n".join(lines), classes_text(against.classes, against.metrics, last, columns)]
