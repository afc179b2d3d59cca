"""`edgekd reproduce`: runs the missing jobs of a paper's table, and writes our numbers beside the printed ones."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgekd.data.folders import Checked, check, scan
from edgekd.reproduce import budget, table_spec
from edgekd.reproduce.plan import PlannedRun, RunOptions, missing_jobs, plan
from edgekd.reproduce.report import Result, write_result
from edgekd.reproduce.results import REPEATS, TableBuilder
from edgekd.reproduce.table_spec import Table
from edgekd.training.jobs import ChildJob, JobState, run_jobs
from edgekd.training.run_folder import RESUME
from edgekd.training.sweep import SweepMember, sweep_members
from edgekd.types import Progress

Say = Callable[[str], None]
OnEnd = Callable[[ChildJob, JobState], None]


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """The options of `edgekd reproduce`, besides those that decide each run.

    Attributes:
        out: Folder for the tables.
        rows: Labels of the rows to run; all if empty.
        seeds: Seeds, `0,1,2`; None for the default.
        folds: Folds, `all` or `0,1`; None for the default.
        budget: Time to cut the runs to, `1h30m`; empty for no limit.
        at_once: Number of runs at one time.
    """

    out: Path
    rows: tuple[str, ...] = ()
    seeds: str | None = None
    folds: str | None = None
    budget: str = ""
    at_once: int = 1


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A table and the runs that it needs.

    Attributes:
        name: Name of the table.
        table: The table.
        checked: The images.
        options: Options of the command.
        planned: Job name to its run.
        members: Seeds and folds.
        cut: Description of the reductions made for the budget.
    """

    name: str
    table: Table
    checked: Checked
    options: Options
    planned: Mapping[str, PlannedRun]
    members: list[SweepMember]
    cut: str = ""

    def selected(self) -> dict[str, PlannedRun]:
        """Return the jobs that the selected rows require."""
        return {name: self.planned[name] for name in self.table.order(self.options.rows)}


def reproduce(
    name: str, options: Options, *, say: Say, on_check: Progress | None = None, on_end: OnEnd
) -> tuple[Result, dict[str, Path]]:
    """Run the missing jobs of a table and write it to `options.out`.

    Args:
        name: Name of the table, or a TOML file.
        options: Options of the command.
        say: Called with the plan before it starts.
        on_check: Called with the number of images checked and their total.
        on_end: Called after each job.

    Returns:
        The result, and the logs of the jobs that failed.

    Raises:
        EdgekdError: A table, images or settings that cannot be used.
    """
    started, table = time.monotonic(), table_spec.read(name)
    options = dataclasses.replace(options, exclude_bad=options.exclude_bad or table.exclude_bad)
    checked = check(scan(options.data), exclude_bad=options.exclude_bad, progress=on_check)
    work, until = full_workload(name, table, options, checked), float("inf")
    if options.budget:
        until = started + budget.seconds(options.budget)
        work = within_budget(work, until, say)
    return carry_out(work, until, say, on_end)


def full_workload(name: str, table: Table, options: Options, checked: Checked) -> Workload:
    """Return all runs of a table.

    Args:
        name: Name of the table, or a TOML file.
        table: The table.
        options: Options of the command; without seeds and folds, three seeds, or all folds of one seed.
        checked: The images.
    """
    options = dataclasses.replace(
        options,
        data=options.data.resolve(),
        fingerprint=checked.fingerprint,
        runs=options.runs.resolve(),
        weights=options.weights and options.weights.resolve(),
    )
    planned = plan(table, options)
    protocol = next(iter(planned.values())).protocol
    kfold = protocol.split.startswith("kfold")
    seeds = options.seeds or ("0" if kfold else ",".join(map(str, range(REPEATS))))
    of = sweep_members(seeds, options.folds or ("all" if kfold else None), protocol)
    return Workload(name=Path(name).stem, table=table, checked=checked, options=options, planned=planned, members=of)


def within_budget(work: Workload, until: float, say: Say) -> Workload:
    """Reduce the workload to fit into the time, as decided at its first start.

    Args:
        work: The whole workload.
        until: End of the budget on `time.monotonic`.
        say: Called with messages.
    """
    options = work.options
    cuts = budget.choose_cuts(
        work.table,
        work.selected(),
        work.members,
        options,
        checked=work.checked,
        budget_s=budget.seconds(options.budget),
        until=until,
        at_once=options.at_once,
        say=say,
    )
    cut = (
        f"{options.budget}: {cuts.epochs} epochs, {cuts.image_size} pixels, {cuts.repeats} of {len(work.members)} "
        f"seeds and folds, estimated at {cuts.seconds / 60:.0f} minutes in all"
    )
    options = dataclasses.replace(options, epochs=cuts.epochs, image_size=cuts.image_size)
    members = work.members[: cuts.repeats]
    return dataclasses.replace(work, options=options, planned=plan(work.table, options), members=members, cut=cut)


def carry_out(work: Workload, until: float, say: Say, on_end: OnEnd) -> tuple[Result, dict[str, Path]]:
    """Run the missing jobs, and rewrite the table after each.

    Args:
        work: The workload.
        until: Time on `time.monotonic` after which no job is started.
        say: Called with messages.
        on_end: Called after each job.

    Returns:
        The result, and the logs of the failed jobs.
    """
    options, name = work.options, stem(work.name, work.options.group)
    jobs = missing_jobs(list(work.selected().values()), work.members, options)
    say(f"{f'budget {work.cut}; ' if work.cut else ''}{len(jobs)} runs to do")
    builder = TableBuilder(
        name=work.name,
        table=work.table,
        planned=work.planned,
        members=work.members,
        options=_options_text(work),
        differences=_data_differences(work.table, work.checked),
        classes=len(work.checked.folder.classes),
    )

    def end(job: ChildJob, state: JobState) -> None:
        if state == "done":  # resume.pt is two thirds of a finished run folder
            (options.runs / job.name / RESUME).unlink(missing_ok=True)
        write_result(options.out, name, builder.result())
        on_end(job, state)

    states = run_jobs(jobs, at_once=options.at_once, deadline=until, on_end=end)
    late = time.monotonic() >= until
    result = dataclasses.replace(builder, reasons=_reasons(states, late=late)).result()
    write_result(options.out, name, result)
    return result, {job.name: job.log for job in jobs if states[job.name] == "failed"}


def stem(name: str, group: str | None) -> str:
    """Return the name of a table's files without suffix."""
    return Path(name).stem + ("" if group in (None, "none") else f"-{group}")


def _reasons(states: Mapping[str, JobState], *, late: bool) -> dict[str, str]:
    skipped = "stopped by the budget" if late else "a run that it depends on failed"
    texts = {"failed": "a run failed", "skipped": skipped}
    return {name: texts[state] for name, state in states.items() if state != "done"}


def _data_differences(table: Table, checked: Checked) -> list[str]:
    count = len(checked.folder.items)
    excluded = f" ({len(checked.excluded)} excluded)" if checked.excluded else ""
    return [] if count == table.data.images else [f"{count} images{excluded}, not {table.data.images}"]


def _options_text(work: Workload) -> dict[str, str]:
    """Return the options as text, without paths."""
    options, checked = work.options, work.checked
    return {
        "data": f"{work.table.data.name}, {len(checked.folder.items)} images, fingerprint {checked.fingerprint[:12]}",
        "protocol": options.protocol or work.table.protocol,
        "runs": ", ".join(m.name for m in work.members),
        "rows": "; ".join(options.rows),
        "group": options.group or "none",
        "set": ", ".join(f"{k}={v}" for k, v in options.overrides.items()),
        "substitute": ", ".join(f"{k}={v}" for k, v in options.substitutes.items()),
        "weights": ", ".join(sorted({one.file.name for one in work.planned.values() if one.file})),
        "jobs at once": str(options.at_once),
        "budget": work.cut,
    }
