"""A paper's table as TOML: the printed numbers of each row, and the job that gives ours."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from edgekd import config
from edgekd.config import load
from edgekd.errors import ConfigError, nearest

IMAGENET, NONE = "imagenet", "none"
KIND = "papers"


@dataclass(frozen=True)
class Data:
    """The paper's images: name of the data set, and number of images."""

    name: str
    images: int


@dataclass(frozen=True)
class JobSpec:
    """A network to train under the table's protocol.

    Attributes:
        network: Name of the network.
        method: Distillation method.
        weights: Initial weights: `imagenet`, `none`, or another job.
        teacher: Another job; empty for none.
        settings: Protocol keys of its own.
        svm: Feature point whose features a support vector machine classifies in place of the network's own classifier.
    """

    network: str
    method: str = "ce"
    weights: str = NONE
    teacher: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    svm: str = ""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        label: The paper's label.
        job: The job that gives our numbers.
        network: Network of a row that counts costs and trains nothing.
        unsupported: Reason why edgekd cannot reproduce this row; empty if it can.
        printed: Column to the printed number, in the column's unit.
        spread: Column to its standard deviation.
    """

    label: str
    job: str = ""
    network: str = ""
    unsupported: str = ""
    printed: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table of a paper.

    Attributes:
        caption: Its caption.
        source: Where it is printed.
        protocol: Name of the protocol that all jobs use.
        data: The paper's images.
        columns: Title to measure: `EXIT.METRIC` on the test images, where EXIT is exit_0 …, ensemble, or
            prediction (the ensemble, or the only exit); `cost.FIELD` of the network; `NETWORK/cost.FIELD`, how many
            times smaller than NETWORK's it is.
        rows: The rows.
        jobs: Name to job.
        settings: Protocol keys of all jobs.
        notes: Remarks on the table.
        exclude_bad: Train without images that cannot be used.
    """

    caption: str
    source: str
    protocol: str
    data: Data
    columns: dict[str, str]
    rows: tuple[Row, ...]
    jobs: dict[str, JobSpec] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    exclude_bad: bool = False

    def __post_init__(self) -> None:
        if not self.jobs:
            raise ValueError("jobs: at least one is needed")
        known = {*self.jobs, NONE, IMAGENET, ""}
        for name, job in self.jobs.items():
            if strange := {job.teacher, job.weights} - known:
                raise ValueError(f"jobs.{name}: {min(strange)} is not a job")
        for row in self.rows:
            if row.job not in self.jobs and not row.unsupported and not row.network:
                raise ValueError(
                    f"row '{row.label}': {row.job or 'nothing'} is not a job, and the row is not unsupported"
                )
            if strange := (row.printed.keys() | row.spread.keys()) - self.columns.keys():
                raise ValueError(f"row '{row.label}': {min(strange)} is not a column")

    def network(self, row: Row) -> str:
        """Return the network whose cost a row counts."""
        return row.network or self.jobs[row.job].network

    def order(self, labels: Collection[str] = ()) -> list[str]:
        """Return the jobs required by the rows with these labels (default: all), in dependency order.

        Raises:
            ConfigError: No row has such a label, or jobs depend on each other.
        """
        known = [row.label for row in self.rows]
        for label in labels:
            if label not in known:
                raise ConfigError(f"no row '{label}'", fix=nearest(label, known))
        found: list[str] = []

        def add(name: str, above: tuple[str, ...]) -> None:
            if name in above:
                raise ConfigError(f"jobs depend on each other: {' < '.join((*above, name))}", fix="correct the table")
            for other in needs(self.jobs[name]):
                add(other, (*above, name))
            if name not in found:
                found.append(name)

        for row in self.rows:
            if row.job and (not labels or row.label in labels):
                add(row.job, ())
        return found


def needs(job: JobSpec) -> list[str]:
    """Return the jobs that a job depends on: its teacher, and the one that provides its initial weights."""
    return [name for name in (job.teacher, job.weights) if name not in (NONE, IMAGENET, "")]


def names() -> list[str]:
    """List the tables that come with edgekd."""
    return config.names(KIND)


def read(name: str) -> Table:
    """Read a table by name, or from a TOML file.

    Raises:
        ConfigError: No such table, or wrong keys or values.
    """
    table = load(Table, KIND, name)
    table.order()
    return table
