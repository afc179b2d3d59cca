"""`edgekd reproduce`: run what is missing of a paper's table, and write it beside the printed one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgekd.data.folders import Checked, check, scan
from edgekd.reproduce import budget, report, table_spec
from edgekd.reproduce.plan import Planned, Request, plan, tasks
from edgekd.reproduce.results import REPEATS, Collection
from edgekd.reproduce.table_spec import Table
from edgekd.training.jobs import ChildJob, JobState, run_jobs
from edgekd.training.run_folder import RESUME
from edgekd.training.sweep import SweepMember, sweep_members

Say = Callable[[str], None]
OnEnd = Callable[[ChildJob, JobState], None]


@dataclass(frozen=True, kw_only=True)
class Asked(Request):
    """The options of `edgekd reproduce`. rows: labels of those to run, all if empty."""

    out: Path
    rows: tuple[str, ...] = ()
    seeds: str | None = None
    folds: str | None = None
    budget: str = ""
    at_once: int = 1


@dataclass(frozen=True, kw_only=True)
class Work:
    """A table with what is to be done for it. cut: what the budget made of it, in words."""

    name: str
    table: Table
    checked: Checked
    asked: Asked
    planned: Mapping[str, Planned]
    members: list[SweepMember]
    cut: str = ""

    def wanted(self) -> dict[str, Planned]:
        """The jobs that the rows which were asked for need."""
        return {name: self.planned[name] for name in self.table.order(self.asked.rows)}


def reproduce(
    name: str, asked: Asked, *, say: Say, on_check: Callable[[int, int], None] | None = None, on_end: OnEnd
) -> tuple[report.Result, dict[str, Path]]:
    """Run what is missing of a table and write it to asked.out; the result, and the logs of runs that failed.

    say: told the plan before it starts. on_end: called after each run.

    Raises:
        EdgekdError: a table, images or settings that cannot be.
    """
    started, table = time.monotonic(), table_spec.read(name)
    asked = dataclasses.replace(asked, exclude_bad=asked.exclude_bad or table.exclude_bad)
    checked = check(scan(asked.data), exclude_bad=asked.exclude_bad, progress=on_check)
    work, until = work_of(name, table, asked, checked), float("inf")
    if asked.budget:
        until = started + budget.seconds(asked.budget)
        work = within_budget(work, until, say)
    return carry_out(work, until, say, on_end)


def work_of(name: str, table: Table, asked: Asked, checked: Checked) -> Work:
    """The whole of a table: three seeds, or all folds of one, unless others are asked for."""
    asked = dataclasses.replace(
        asked,
        data=asked.data.resolve(),
        fingerprint=checked.fingerprint,
        runs=asked.runs.resolve(),
        weights=asked.weights and asked.weights.resolve(),
    )
    planned = plan(table, asked)
    protocol = next(iter(planned.values())).protocol
    kfold = protocol.split.startswith("kfold")
    seeds = asked.seeds or ("0" if kfold else ",".join(map(str, range(REPEATS))))
    of = sweep_members(seeds, asked.folds or ("all" if kfold else None), protocol)
    return Work(name=Path(name).stem, table=table, checked=checked, asked=asked, planned=planned, members=of)


def within_budget(work: Work, until: float, say: Say) -> Work:
    """The work cut to what fits into the time, as it was decided when it was first begun."""
    cuts = budget.decide(
        work.table,
        work.wanted(),
        work.members,
        work.asked,
        checked=work.checked,
        budget_s=budget.seconds(work.asked.budget),
        until=until,
        at_once=work.asked.at_once,
        say=say,
    )
    asked = dataclasses.replace(work.asked, epochs=cuts.epochs, pixels=cuts.pixels)
    cut = (
        f"{asked.budget}: {cuts.epochs} epochs, {cuts.pixels} pixels, {cuts.repeats} of {len(work.members)} seeds and "
        f"folds, estimated at {cuts.seconds / 60:.0f} minutes in all"
    )
    members = work.members[: cuts.repeats]
    return dataclasses.replace(work, asked=asked, planned=plan(work.table, asked), members=members, cut=cut)


def stem(name: str, group: str | None) -> str:
    """What the files of a table are called, without their suffixes."""
    return Path(name).stem + ("" if group in (None, "none") else f"-{group}")


def carry_out(work: Work, until: float, say: Say, on_end: OnEnd) -> tuple[report.Result, dict[str, Path]]:
    """Run what is missing, writing the table anew after each run."""
    asked, name = work.asked, stem(work.name, work.asked.group)
    jobs = tasks(list(work.wanted().values()), work.members, asked)
    say(f"{f'budget {work.cut}; ' if work.cut else ''}{len(jobs)} runs to do")
    collection = Collection(
        name=work.name,
        table=work.table,
        planned=work.planned,
        members=work.members,
        asked=_in_words(work),
        differs=_data_differs(work.table, work.checked),
        classes=len(work.checked.folder.classes),
    )

    def end(job: ChildJob, state: JobState) -> None:
        if state == "done":  # of what would be needed to go on with a run there are two thirds of its folder
            (asked.runs / job.name / RESUME).unlink(missing_ok=True)
        report.write(asked.out, name, collection.result())
        on_end(job, state)

    states = run_jobs(jobs, at_once=asked.at_once, deadline=until, on_end=end)
    late = time.monotonic() >= until
    result = dataclasses.replace(collection, reasons=_reasons(states, late=late)).result()
    report.write(asked.out, name, result)
    return result, {job.name: job.log for job in jobs if states[job.name] == "failed"}


def _reasons(states: Mapping[str, JobState], *, late: bool) -> dict[str, str]:
    skipped = "stopped by the budget" if late else "what it needs failed"
    words = {"failed": "a run failed", "skipped": skipped}
    return {name: words[state] for name, state in states.items() if state != "done"}


def _data_differs(table: Table, checked: Checked) -> list[str]:
    count = len(checked.folder.items)
    left = f" ({len(checked.excluded)} left out)" if checked.excluded else ""
    return [] if count == table.data.images else [f"{count} images{left}, not {table.data.images}"]


def _in_words(work: Work) -> dict[str, str]:
    """What was asked for, without paths."""
    asked, checked = work.asked, work.checked
    return {
        "data": f"{work.table.data.name}, {len(checked.folder.items)} images, fingerprint {checked.fingerprint[:12]}",
        "protocol": asked.protocol or work.table.protocol,
        "runs": ", ".join(m.name for m in work.members),
        "rows": "; ".join(asked.rows),
        "group": asked.group or "none",
        "set": ", ".join(f"{k}={v}" for k, v in asked.overrides.items()),
        "instead": ", ".join(f"{k}={v}" for k, v in asked.substitutes.items()),
        "weights": ", ".join(sorted({one.file.name for one in work.planned.values() if one.file})),
        "jobs at once": str(asked.at_once),
        "budget": work.cut,
    }
