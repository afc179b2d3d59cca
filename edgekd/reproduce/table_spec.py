"""A paper's table as TOML: what is printed in each row, and which run gives our number."""

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
    """The paper's images: the set's name and how many there are."""

    name: str
    images: int


@dataclass(frozen=True)
class Job:
    """A network to train under the table's protocol.

    weights: what it starts from: `imagenet`, `none`, or another job. teacher: another job. settings: protocol keys of
    its own. svm: a feature point, on which a support vector machine answers instead of the network's classifier.
    """

    network: str
    method: str = "ce"
    weights: str = NONE
    teacher: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    svm: str = ""


@dataclass(frozen=True)
class Row:
    """One row: printed and spread (standard deviation) by column, in the column's unit.

    job: what gives our numbers. network: of a row that counts costs and trains nothing. open: why edgekd has no such
    row.
    """

    label: str
    job: str = ""
    network: str = ""
    open: str = ""
    printed: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table of a paper.

    columns: title to measure: `EXIT.METRIC` of the test images, where EXIT is exit_0 …, ensemble, or answer (the
    ensemble, or the only exit); `cost.FIELD` of the network; `NETWORK/cost.FIELD`, how many times less than NETWORK's
    it is. settings: protocol keys of all jobs. exclude_bad: train without images that cannot be used.
    """

    caption: str
    source: str
    protocol: str
    data: Data
    columns: dict[str, str]
    rows: tuple[Row, ...]
    jobs: dict[str, Job] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    exclude_bad: bool = False

    def __post_init__(self) -> None:
        if not self.jobs:
            raise ValueError("jobs: there is none")
        known = {*self.jobs, NONE, IMAGENET, ""}
        for name, job in self.jobs.items():
            if strange := {job.teacher, job.weights} - known:
                raise ValueError(f"jobs.{name}: {min(strange)} is no job")
        for row in self.rows:
            if row.job not in self.jobs and not row.open and not row.network:
                raise ValueError(f"row '{row.label}': {row.job or 'nothing'} is no job, and it is not open")
            if strange := (row.printed.keys() | row.spread.keys()) - self.columns.keys():
                raise ValueError(f"row '{row.label}': {min(strange)} is no column")

    def network(self, row: Row) -> str:
        """Whose cost a row counts."""
        return row.network or self.jobs[row.job].network

    def order(self, labels: Collection[str] = ()) -> list[str]:
        """The jobs that the rows with these labels, or all, ask for and those that they need, each after what it needs.

        Raises:
            ConfigError: no row has such a label; jobs that need each other.
        """
        known = [row.label for row in self.rows]
        for label in labels:
            if label not in known:
                raise ConfigError(f"no row '{label}'", fix=nearest(label, known))
        found: list[str] = []

        def add(name: str, above: tuple[str, ...]) -> None:
            if name in above:
                raise ConfigError(f"jobs need each other: {' < '.join((*above, name))}", fix="mend the table")
            for other in needs(self.jobs[name]):
                add(other, (*above, name))
            if name not in found:
                found.append(name)

        for row in self.rows:
            if row.job and (not labels or row.label in labels):
                add(row.job, ())
        return found


def needs(job: Job) -> list[str]:
    """The jobs that a job starts from and learns from."""
    return [name for name in (job.teacher, job.weights) if name not in (NONE, IMAGENET, "")]


def names() -> list[str]:
    """The tables that edgekd knows."""
    return config.names(KIND)


def read(name: str) -> Table:
    """A table by name, or from a TOML file.

    Raises:
        ConfigError: no such table, or one that cannot be.
    """
    table = load(Table, KIND, name)
    table.order()
    return table
