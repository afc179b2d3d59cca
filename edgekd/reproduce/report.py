"""Our numbers beside the printed ones: as JSON with every run, as Markdown, as text; and the state of each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgekd.bench.tables import pipe_table
from edgekd.files import atomic_write
from edgekd.host import HostInfo
from edgekd.reproduce import table_spec
from edgekd.reproduce.table_spec import Row, Table
from edgekd.serialization import SCHEMA, read_json, to_json
from edgekd.text import aligned, plus_minus
from edgekd.text import markdown as escaped

State = Literal["reproduced", "partly", "open"]
RANK: tuple[State, ...] = ("reproduced", "partly", "open")


@dataclass(frozen=True)
class Cell:
    """One column of a row, in the column's unit: printed and its standard deviation; our mean and sd (n - 1)."""

    printed: float | None
    spread: float | None
    mean: float | None = None
    sd: float | None = None


@dataclass(frozen=True)
class Run:
    """One run behind a row. scores: exit to metric to fraction of the test images. host: which of `Result.hosts`."""

    seed: int
    fold: int
    folder: str
    scores: dict[str, dict[str, float | None]]
    images: int
    train_s: float
    device: str
    host: int


@dataclass(frozen=True)
class Line:
    """One row: its state and why; what differs from the paper; the settings of its runs."""

    label: str
    state: State
    why: str
    cells: dict[str, Cell]
    differs: tuple[str, ...] = ()
    settings: dict[str, Any] | None = None
    runs: tuple[Run, ...] = ()


@dataclass(frozen=True)
class Result:
    """A table as far as it is reproduced. asked: what the command was asked for, and what the budget cut."""

    table: str
    caption: str
    source: str
    notes: tuple[str, ...]
    created: str
    edgekd: str
    asked: dict[str, Any]
    lines: tuple[Line, ...]
    hosts: tuple[HostInfo, ...] = ()
    schema: int = SCHEMA


def blank(row: Row, table: Table) -> dict[str, Cell]:
    """The printed numbers alone."""
    return {title: Cell(row.printed.get(title), row.spread.get(title)) for title in table.columns}


def state_of(differs: Sequence[str], n: int, wanted: int, reasons: Sequence[str]) -> tuple[State, str]:
    """A row's state and why: reproduced with the paper's settings and all the runs that are wanted, else partly."""
    if not n:
        return "open", "; ".join(reasons) or "not run yet"
    few = [f"n = {n} of {wanted}"] if n < wanted else []
    why = "; ".join([*differs, *few, *reasons])
    return ("partly" if why else "reproduced"), why


def write(out: Path, name: str, result: Result) -> None:
    """OUT/NAME.json with everything, and OUT/NAME.md."""
    atomic_write(out / f"{name}.json", to_json(result))
    atomic_write(out / f"{name}.md", markdown(result).encode())


def _sides(result: Result) -> dict[str, bool]:
    """The columns, and whether the paper has numbers in them."""
    columns = result.lines[0].cells
    return {c: any(line.cells[c].printed is not None for line in result.lines) for c in columns}


def _header(result: Result) -> list[str]:
    pairs = [side for c, both in _sides(result).items() for side in ((f"{c}: paper", "ours") if both else (c,))]
    return ["", *pairs, "n", "state"]


def _rows(result: Result) -> list[list[str]]:
    """Label, paper and ours for each column, n, and the state with what is the row's own."""
    common, sides = _common(result), _sides(result)
    rows = []
    for line in result.lines:
        cells = [text for column, both in sides.items() for text in _texts(line.cells[column], both)]
        own = "; ".join(part for part in line.why.split("; ") if part and part not in common)
        rows.append([line.label, *cells, str(len(line.runs) or ""), line.state + (f": {own}" if own else "")])
    return rows


def _texts(cell: Cell, both: bool) -> list[str]:
    ours = plus_minus(cell.mean, cell.sd, scale=1)
    return [plus_minus(cell.printed, cell.spread, scale=1), ours] if both else [ours]


def _common(result: Result) -> list[str]:
    """What differs from the paper in every row that was run."""
    ran = [line.differs for line in result.lines if line.runs]
    return [text for text in (ran[0] if ran else ()) if all(text in other for other in ran)]


def text(result: Result) -> str:
    """The table for a terminal."""
    table = aligned([_header(result), *_rows(result)], remarks=True)
    return "\n".join([f"{result.table}: {result.caption}", table, *_said(result)])


def markdown(result: Result) -> str:
    """The table as a page of its own."""
    said = "\n".join(f"- {escaped(line)}" for line in _said(result))
    return "\n\n".join([f"## {escaped(result.caption)}", pipe_table((_header(result), _rows(result))), said]) + "\n"


def _said(result: Result) -> Iterator[str]:
    """What stands below the table."""
    yield f"{result.source}; ours: mean ± standard deviation (n - 1) over n runs, percent of the test images"
    if common := _common(result):
        yield f"All rows differ from the paper in: {'; '.join(common)}"
    yield from result.notes
    asked = "; ".join(f"{name} {value}" for name, value in result.asked.items() if value)
    yield f"Asked for: {asked}"
    for at, host in enumerate(result.hosts):
        devices = sorted({run.device for line in result.lines for run in line.runs if run.host == at})
        yield f"Run on {' and '.join(devices)}; {host}"
    yield f"edgekd {result.edgekd}, {result.created}"


def states(name: str, out: Path) -> list[tuple[str, State, str]]:
    """Label, state and why of each row of a table, by the files in `out`: the best of what was made of it."""
    table = table_spec.read(name)
    found = [read_json(path, Result, what="table") for path in sorted(out.glob(f"{name}*.json"))]
    return [_state(row, found) for row in table.rows]


def _state(row: Row, found: Sequence[Result]) -> tuple[str, State, str]:
    if row.open:
        return row.label, "open", row.open
    lines = [line for result in found for line in result.lines if line.label == row.label]
    best = min(lines, key=_distance, default=None)
    return (row.label, best.state, best.why) if best else (row.label, "open", "not run yet")


def _distance(line: Line) -> tuple[int, int, int]:
    """From the paper: state, then how much differs, then how few runs."""
    return RANK.index(line.state), len(line.differs), -len(line.runs)
