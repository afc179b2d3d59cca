"""From run folders to a table's result."""

from __future__ import annotations

import csv
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgekd import config, schema
from edgekd._version import __version__
from edgekd.data.split import read_split
from edgekd.errors import ArtifactError
from edgekd.host import HostInfo
from edgekd.models.cost import Cost, cost
from edgekd.reproduce.plan import PlannedRun
from edgekd.reproduce.report import Cell, Result, RowResult, Run, State, printed_cells
from edgekd.reproduce.table_spec import Row, Table
from edgekd.serialization import Fact, flat
from edgekd.training import run_folder, sweep
from edgekd.training.protocol import Protocol
from edgekd.training.sweep import SweepMember

REPEATS = 3
"""Number of seeds required to reproduce a row on a random split; a k-fold split requires all folds."""
COSTS = {"parameters": 1e-6, "macs": 1e-6, "activation_mib": 1.0, "checkpoint_mb": 1.0}
"""Field of `Cost` to the factor that brings it to its column's unit."""
NOT_SETTINGS = ("data", "weights", "seed", "fold")
"""Protocol keys that the runs of a row do not share, or that are paths."""
cached_cost = functools.cache(cost)


@dataclass(frozen=True)
class Evaluation:
    """A finished run read from its files (see `Run`), and the machine that evaluated it."""

    scores: sweep.Scores
    images: int
    train_s: float
    device: str
    host: HostInfo


@dataclass(frozen=True, kw_only=True)
class TableBuilder:
    """Makes a table's result from the run folders that exist.

    Attributes:
        name: Name of the table.
        table: Its rows as printed.
        planned: Job name to its run.
        members: Seeds and folds.
        options: Options of the command, as text.
        differences: Differences of the images from the paper's.
        classes: Number of classes.
        reasons: Name of a job (see `PlannedRun.job_name`) to the reason why it has no result.
    """

    name: str
    table: Table
    planned: Mapping[str, PlannedRun]
    members: Sequence[SweepMember]
    options: Mapping[str, str]
    differences: Sequence[str]
    classes: int
    reasons: Mapping[str, str] = field(default_factory=dict)

    def result(self) -> Result:
        """Make the table from the finished runs."""
        found = {row.label: self._evaluations(row) for row in self.table.rows}
        hosts: list[HostInfo] = []
        for evaluation in (each for runs in found.values() for each in runs.values()):
            if evaluation.host not in hosts:
                hosts.append(evaluation.host)
        return Result(
            table=self.name,
            caption=self.table.caption,
            source=self.table.source,
            notes=self.table.notes,
            created=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            edgekd=__version__,
            options=dict(self.options),
            rows=tuple(self._row(row, found[row.label], hosts) for row in self.table.rows),
            hosts=tuple(hosts),
        )

    def _evaluations(self, row: Row) -> dict[SweepMember, Evaluation]:
        if row.unsupported or not row.job:
            return {}
        one = self.planned[row.job]
        return {m: _read(one.scores(m)) for m in self.members if one.scores(m).is_file()}

    def _row(self, row: Row, found: Mapping[SweepMember, Evaluation], hosts: Sequence[HostInfo]) -> RowResult:
        if row.unsupported:
            return RowResult(row.label, "open", row.unsupported, printed_cells(row, self.table))
        cells = printed_cells(row, self.table) | self._costs(row)
        if not row.job:
            return RowResult(row.label, "reproduced", "", cells)
        one = self.planned[row.job]
        differences = [*one.differences(), *self.differences]
        reasons = [self.reasons[one.job_name(m)] for m in self.members if one.job_name(m) in self.reasons]
        state, reason = state_of(differences, len(found), required_runs(one.paper), list(dict.fromkeys(reasons)))
        runs = tuple(
            Run(
                seed=member.seed,
                fold=member.fold,
                folder=f"{one.folder.name}/{member.name}",
                scores=evaluation.scores,
                images=evaluation.images,
                train_s=evaluation.train_s,
                device=evaluation.device,
                host=hosts.index(evaluation.host),
            )
            for member, evaluation in found.items()
        )
        return RowResult(row.label, state, reason, self._scores(cells, runs), tuple(differences), _settings(one), runs)

    def _costs(self, row: Row) -> dict[str, Cell]:
        """Fill in the columns that count costs, at the paper's image size."""
        one, printed = self.planned.get(row.job), printed_cells(row, self.table)
        paper = one.paper if one else config.load(Protocol, "protocols", self.table.protocol)
        size, name = paper.preprocess.image_size, one.protocol.network if one else row.network
        found = {}
        for title, measure in self.table.columns.items():
            if "cost." in measure:
                value = _cost(measure, cached_cost(name, classes=self.classes, image_size=size))
                found[title] = dataclasses.replace(printed[title], mean=value)
        return found

    def _scores(self, cells: Mapping[str, Cell], runs: Sequence[Run]) -> dict[str, Cell]:
        """Fill in the other columns."""
        found = dict(cells)
        for title, measure in self.table.columns.items():
            if "cost." not in measure:
                mean, sd = sweep.mean_and_sd([_measured(r.scores, measure) for r in runs])
                found[title] = dataclasses.replace(cells[title], mean=_percent(mean), sd=_percent(sd))
        return found


def state_of(differences: Sequence[str], n: int, required: int, reasons: Sequence[str]) -> tuple[State, str]:
    """Return a row's state and the reason for it.

    Args:
        differences: Differences from the paper's settings.
        n: Number of finished runs.
        required: Number of runs that make the row reproduced.
        reasons: Reasons why runs are missing.
    """
    if not n:
        return "open", "; ".join(reasons) or "not run yet"
    few = [f"n = {n} of {required}"] if n < required else []
    reason = "; ".join([*differences, *few, *reasons])
    return ("partly" if reason else "reproduced"), reason


def required_runs(paper: Protocol) -> int:
    """Return the number of runs that make a row reproduced."""
    kind, _, count = paper.split.partition(":")
    return int(count) if kind == "kfold" else REPEATS


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _measured(scores: sweep.Scores, measure: str) -> float | None:
    """Look up `exit_0.accuracy` in a run's scores; None if it has no such exit.

    `prediction` is the ensemble, or the only exit, which has no other name.
    """
    exit_, _, metric = measure.partition(".")
    if exit_ == "prediction":
        return list(scores.values())[-1][metric]
    return scores[exit_][metric] if len(scores) > 1 and exit_ in scores else None


def _cost(measure: str, own: Cost) -> float:
    """Return `cost.macs` in the column's unit, or `OTHER/cost.macs`: how many times smaller it is than OTHER's."""
    other, _, field = measure.rpartition("cost.")
    value = float(getattr(own, field))
    if not other:
        return value * COSTS[field]
    return float(getattr(cached_cost(other.rstrip("/"), classes=own.classes, image_size=own.image_size), field)) / value


def _settings(one: PlannedRun) -> dict[str, Fact]:
    """Return what a row's runs share, without paths."""
    shared = {k: v for k, v in dataclasses.asdict(one.protocol).items() if k not in NOT_SETTINGS}
    first = one.start.folder.name if one.start else one.file.name if one.file else "none"
    own = {"weights": first, "teacher": one.teacher.folder.name if one.teacher else None, "svm": one.job.svm}
    return flat(shared | own)


@functools.cache
def _read(path: Path) -> Evaluation:
    scores = sweep.scores(path)
    table = schema.parse_json(path.read_text(encoding="utf-8"))
    try:
        host = schema.from_dict(HostInfo, table["host"], where=str(path), error=ArtifactError)
        images = int(next(iter(table["metrics"].values()))["n"])
        return Evaluation(scores, images, _train_s(path.parent), str(table["device"]), host)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, StopIteration) as error:
        what = f"{path} or the {run_folder.METRICS} beside it is damaged ({error!r})"
        raise ArtifactError(what, fix="remove the folder and run the same command again") from None


def _train_s(folder: Path) -> float:
    """Return the seconds of training, without validation."""
    rows = csv.DictReader((folder / run_folder.METRICS).read_text().splitlines())
    return len(read_split(folder).subset("train")) * sum(1 / float(row["images_per_s"]) for row in rows)
