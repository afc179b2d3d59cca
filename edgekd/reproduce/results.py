"""From run folders to a table's result."""

from __future__ import annotations

import csv
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekd import config, schema
from edgekd._version import __version__
from edgekd.data.split import read_split
from edgekd.errors import ArtifactError
from edgekd.host import HostInfo
from edgekd.models.cost import Cost, cost
from edgekd.reproduce.plan import Planned
from edgekd.reproduce.report import Cell, Line, Result, Run, blank, state_of
from edgekd.reproduce.table_spec import Row, Table
from edgekd.training import run_folder, sweep
from edgekd.training.protocol import Protocol
from edgekd.training.sweep import SweepMember

REPEATS = 3
"""Seeds that make a row of a random split reproduced; of a k-fold it is all folds."""
COSTS = {"parameters": 1e-6, "macs": 1e-6, "activation_mib": 1.0, "checkpoint_mb": 1.0}
"""Fields of `Cost`, and what brings them to a column's unit."""
counted = functools.cache(cost)


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What a table is made of. asked: what the command was asked for. differs: what of the data is not the paper's.

    classes: how many. reasons: why runs (by `Planned.task`) are not there. hosts: filled while lines are made.
    """

    name: str
    table: Table
    planned: Mapping[str, Planned]
    members: Sequence[SweepMember]
    asked: Mapping[str, Any]
    differs: Sequence[str]
    classes: int
    reasons: Mapping[str, str] = field(default_factory=dict)
    hosts: list[HostInfo] = field(default_factory=list)

    def result(self) -> Result:
        """The table as far as its runs are there."""
        table, created = self.table, time.strftime("%Y-%m-%d %H:%M:%S %Z")
        lines = tuple(map(self._line, table.rows))
        head = (self.name, table.caption, table.source, table.notes, created, __version__)
        return Result(*head, dict(self.asked), lines, tuple(self.hosts))

    def _line(self, row: Row) -> Line:
        if row.open:
            return Line(row.label, "open", row.open, blank(row, self.table))
        costs = blank(row, self.table) | self._costs(row)
        if not row.job:
            return Line(row.label, "reproduced", "", costs)
        one = self.planned[row.job]
        runs = [self._run(one, m) for m in self.members if one.scores(m).is_file()]
        differs = [*one.differs(), *self.differs]
        reasons = [self.reasons[one.task(m)] for m in self.members if one.task(m) in self.reasons]
        state, why = state_of(differs, len(runs), wanted(one.paper), list(dict.fromkeys(reasons)))
        return Line(row.label, state, why, self._scored(costs, runs), tuple(differs), _settings(one), tuple(runs))

    def _costs(self, row: Row) -> dict[str, Cell]:
        """The columns that count costs, at the paper's image size."""
        one, printed = self.planned.get(row.job), blank(row, self.table)
        paper = one.paper if one else config.load(Protocol, "protocols", self.table.protocol)
        size, name = paper.preprocess.image_size, one.protocol.network if one else row.network
        found = {}
        for title, measure in self.table.columns.items():
            if "cost." in measure:
                value = _cost(measure, counted(name, classes=self.classes, image_size=size))
                found[title] = dataclasses.replace(printed[title], mean=value)
        return found

    def _scored(self, cells: Mapping[str, Cell], runs: Sequence[Run]) -> dict[str, Cell]:
        """The cells with the other columns filled in."""
        found = dict(cells)
        for title, measure in self.table.columns.items():
            if "cost." not in measure:
                mean, sd = sweep.mean_and_sd([_measured(r.scores, measure) for r in runs])
                found[title] = dataclasses.replace(cells[title], mean=_percent(mean), sd=_percent(sd))
        return found

    def _run(self, one: Planned, member: SweepMember) -> Run:
        found, host = _read(one.scores(member))
        if host not in self.hosts:
            self.hosts.append(host)
        where = f"{one.folder.name}/{member.name}"
        at = self.hosts.index(host)
        return dataclasses.replace(found, folder=where, seed=member.seed, fold=member.fold, host=at)


def wanted(paper: Protocol) -> int:
    """How many runs make a row."""
    kind, _, count = paper.split.partition(":")
    return int(count) if kind == "kfold" else REPEATS


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _measured(scores: sweep.Scores, measure: str) -> float | None:
    """`exit_0.accuracy` of a run; `answer` is the ensemble, or the only exit, which is called nothing else; None where
    there is no such exit."""
    exit_, _, metric = measure.partition(".")
    if exit_ == "answer":
        return list(scores.values())[-1][metric]
    return scores[exit_][metric] if len(scores) > 1 and exit_ in scores else None


def _cost(measure: str, own: Cost) -> float:
    """`cost.macs` of a network in the column's unit, or `OTHER/cost.macs`, how many times less than OTHER's."""
    other, _, field = measure.rpartition("cost.")
    value = float(getattr(own, field))
    if not other:
        return value * COSTS[field]
    return float(getattr(counted(other.rstrip("/"), classes=own.classes, image_size=own.image_size), field)) / value


def _settings(one: Planned) -> dict[str, Any]:
    """What a row's runs share, without paths."""
    plain = {k: v for k, v in dataclasses.asdict(one.protocol).items() if k not in ("data", "weights", "seed", "fold")}
    first = one.start.folder.name if one.start else one.file.name if one.file else "none"
    return plain | {"weights": first, "teacher": one.teacher.folder.name if one.teacher else None, "svm": one.job.svm}


@functools.cache
def _read(path: Path) -> tuple[Run, HostInfo]:
    scores = sweep.scores(path)
    table = schema.parse_json(path.read_text(encoding="utf-8"))
    try:
        host = schema.from_dict(HostInfo, table["host"], where=str(path), error=ArtifactError)
        images = int(next(iter(table["metrics"].values()))["n"])
        return Run(0, 0, "", scores, images, _train_s(path.parent), str(table["device"]), 0), host
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, StopIteration) as error:
        what = f"{path} or the {run_folder.METRICS} beside it is damaged ({error!r})"
        raise ArtifactError(what, fix="remove the folder and run the same command again") from None


def _train_s(folder: Path) -> float:
    """Seconds of training, without validation."""
    rows = csv.DictReader((folder / run_folder.METRICS).read_text().splitlines())
    return len(read_split(folder).subset("train")) * sum(1 / float(row["images_per_s"]) for row in rows)
