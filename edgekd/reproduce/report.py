"""Our numbers beside the printed ones: as JSON with every run, as Markdown, as text; and the state of each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgekd.bench.tables import pipe_table
from edgekd.files import atomic_write
from edgekd.host import HostInfo
from edgekd.reproduce import table_spec
from edgekd.reproduce.table_spec import Row, Table
from edgekd.serialization import SCHEMA, Fact, read_json, to_json
from edgekd.text import aligned, plus_minus
from edgekd.text import markdown as escaped

State = Literal["reproduced", "partly", "open"]
STATES: tuple[State, ...] = ("reproduced", "partly", "open")
"""Ordered from full to no reproduction."""


@dataclass(frozen=True)
class Cell:
    """One column of a row, in the column's unit.

    Attributes:
        printed: The paper's number.
        spread: Its standard deviation.
        mean: Our mean.
        sd: Our standard deviation (n - 1).
    """

    printed: float | None
    spread: float | None
    mean: float | None = None
    sd: float | None = None


@dataclass(frozen=True)
class Run:
    """One run behind a row.

    Attributes:
        seed: Seed.
        fold: Fold of the split.
        folder: Run folder, below the folder of all runs.
        scores: Exit to metric to fraction of the test images.
        images: Number of test images.
        train_s: Seconds of training.
        device: Device that it was evaluated on.
        host: Index of the machine in `Result.hosts`.
    """

    seed: int
    fold: int
    folder: str
    scores: dict[str, dict[str, float | None]]
    images: int
    train_s: float
    device: str
    host: int


@dataclass(frozen=True)
class RowResult:
    """One row.

    Attributes:
        label: The paper's label.
        state: Degree of reproduction.
        reason: Reason why it is not fully reproduced.
        cells: Column to numbers.
        differences: Differences from the paper's settings.
        settings: Settings shared by its runs, keys joined by dots.
        runs: The runs.
    """

    label: str
    state: State
    reason: str
    cells: dict[str, Cell]
    differences: tuple[str, ...] = ()
    settings: dict[str, Fact] | None = None
    runs: tuple[Run, ...] = ()


@dataclass(frozen=True)
class Result:
    """A table with its reproduced rows.

    Attributes:
        table: Name of the table.
        caption: Its caption.
        source: Where it is printed.
        notes: Remarks on the table.
        created: Date and time.
        edgekd: Version of edgekd.
        options: Options of the command, and what the budget cut.
        rows: The rows.
        hosts: Machines that the runs were evaluated on.
    """

    table: str
    caption: str
    source: str
    notes: tuple[str, ...]
    created: str
    edgekd: str
    options: dict[str, str]
    rows: tuple[RowResult, ...]
    hosts: tuple[HostInfo, ...] = ()
    schema: int = SCHEMA


def printed_cells(row: Row, table: Table) -> dict[str, Cell]:
    """Return the printed numbers alone."""
    return {title: Cell(row.printed.get(title), row.spread.get(title)) for title in table.columns}


def write_result(out: Path, name: str, result: Result) -> None:
    """Write OUT/NAME.json with everything, and OUT/NAME.md."""
    atomic_write(out / f"{name}.json", to_json(result))
    atomic_write(out / f"{name}.md", markdown(result).encode())


def text(result: Result) -> str:
    """Render the table for a terminal."""
    table = aligned([_header(result), *_rows(result)], remarks=True)
    return "\n".join([f"{result.table}: {result.caption}", table, *_notes(result)])


def markdown(result: Result) -> str:
    """Render the table as a page of its own."""
    notes = "\n".join(f"- {escaped(line)}" for line in _notes(result))
    return "\n\n".join([f"## {escaped(result.caption)}", pipe_table((_header(result), _rows(result))), notes]) + "\n"


def _header(result: Result) -> list[str]:
    pairs = [title for c, both in _has_printed(result).items() for title in ((f"{c}: paper", "ours") if both else (c,))]
    return ["", *pairs, "n", "state"]


def _rows(result: Result) -> list[list[str]]:
    """Format label, paper and ours for each column, n, and the state with remarks specific to the row."""
    common, columns = _common_differences(result), _has_printed(result)
    rows = []
    for row in result.rows:
        cells = [text for column, both in columns.items() for text in _cell_texts(row.cells[column], both)]
        own = "; ".join(item for item in row.reason.split("; ") if item and item not in common)
        rows.append([row.label, *cells, str(len(row.runs) or ""), row.state + (f": {own}" if own else "")])
    return rows


def _has_printed(result: Result) -> dict[str, bool]:
    """Return for each column whether the paper has numbers in it."""
    columns = result.rows[0].cells
    return {c: any(row.cells[c].printed is not None for row in result.rows) for c in columns}


def _cell_texts(cell: Cell, both: bool) -> list[str]:
    ours = plus_minus(cell.mean, cell.sd, scale=1)
    return [plus_minus(cell.printed, cell.spread, scale=1), ours] if both else [ours]


def _common_differences(result: Result) -> list[str]:
    """Return the differences from the paper that all rows with runs have."""
    found = [row.differences for row in result.rows if row.runs]
    return [text for text in (found[0] if found else ()) if all(text in other for other in found)]


def _notes(result: Result) -> Iterator[str]:
    yield f"{result.source}; ours: mean ± standard deviation (n - 1) over n runs, percent of the test images"
    if common := _common_differences(result):
        yield f"All rows differ from the paper in: {'; '.join(common)}"
    yield from result.notes
    yield f"Options: {'; '.join(f'{name} {value}' for name, value in result.options.items() if value)}"
    for at, host in enumerate(result.hosts):
        devices = sorted({run.device for row in result.rows for run in row.runs if run.host == at})
        yield f"Run on {' and '.join(devices)}; {host}"
    yield f"edgekd {result.edgekd}, {result.created}"


def row_states(name: str, out: Path) -> list[tuple[str, State, str]]:
    """Return label, state and reason of each row of a table, from the best of the results in `out`."""
    table = table_spec.read(name)
    found = [read_json(path, Result, what="table") for path in sorted(out.glob(f"{name}*.json"))]
    return [_row_state(row, found) for row in table.rows]


def _row_state(row: Row, found: Sequence[Result]) -> tuple[str, State, str]:
    if row.unsupported:
        return row.label, "open", row.unsupported
    results = [other for result in found for other in result.rows if other.label == row.label]
    best = min(results, key=_distance, default=None)
    return (row.label, best.state, best.reason) if best else (row.label, "open", "not run yet")


def _distance(row: RowResult) -> tuple[int, int, int]:
    """Order rows by state, then number of differences, then number of runs."""
    return STATES.index(row.state), len(row.differences), -len(row.runs)
