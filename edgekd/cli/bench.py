"""edgekd bench."""

from __future__ import annotations

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.common import (
    DataOption,
    OutOption,
    SetOption,
    SplitFile,
    bar,
    echo,
    next_command,
    read_or_scan,
    reserve,
    say,
)
from edgekd.cli.pending import complete_pending
from edgekd.errors import ConfigError


def bench(
    engine: Annotated[Path, typer.Argument(metavar="STUDENT.ENGINE", help="Engine folder or student.onnx.")],
    data: DataOption,
    out: OutOption,
    split: SplitFile = None,
    suite: Annotated[str, typer.Option(help="quick, full, or a .toml file.")] = "quick",
    against: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Another network: ONNX (ONNX Runtime FP32) or engine.")
    ] = None,
    set_: SetOption = None,
    report: Annotated[bool, typer.Option(help="Write the HTML page (needs matplotlib).")] = True,
) -> None:
    """Measure latency, memory, size and accuracy on the test images: record.json, and .md, .csv and .html beside it."""
    from edgekd import config
    from edgekd.artifacts.manifest import read_metadata
    from edgekd.bench.measure import bench as measure
    from edgekd.bench.record import refuse_existing, write_record
    from edgekd.bench.suite import Suite
    from edgekd.bench.tables import markdown, to_csv
    from edgekd.files import CSV, MARKDOWN, PAGE, atomic_write

    if report and find_spec("matplotlib") is None:
        raise ConfigError("the HTML page needs matplotlib", fix="pip install 'edgekd[report]', or give --no-report")
    if out.suffix in (".md", ".csv", ".html"):
        raise ConfigError(f"--out {out}: the record is JSON, and a table would replace it", fix="give NAME.json")
    refuse_existing(out)
    reserve(out, data=data)
    for suffix, kind in ((".md", MARKDOWN), (".csv", CSV), (".html", PAGE)):
        if report or kind is not PAGE:
            reserve(out.with_suffix(suffix), kind)
    settings = config.load(Suite, "benchmarks/suites", suite, overrides=config.parse_overrides(set_ or []))
    others = dict(_named(pair) for pair in against or [])
    complete_pending(engine, data, split, threads=settings.threads)
    chosen = read_or_scan(data, split, read_metadata(engine).classes)
    with bar("bench") as progress:
        record = measure(
            engine,
            suite=settings,
            data=data,
            split=chosen,
            against=others,
            command=_command(),
            progress=progress,
            on_estimate=lambda seconds: say(f"measuring will take about {_about(seconds)}"),
        )
    write_record(out, record)
    text = markdown(record)
    atomic_write(out.with_suffix(".md"), text.encode())
    atomic_write(out.with_suffix(".csv"), to_csv(record).encode())
    echo(text)
    if report:
        from edgekd.bench.report import write_report

        write_report(record, out.with_suffix(".html"), data=data)
        echo(f"report: {out.with_suffix('.html')}")
    next_command("predict", engine, data)


def _about(seconds: float) -> str:
    """Format a duration as `40 s` or `3 min`."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _named(pair: str) -> tuple[str, Path]:
    name, sign, path = pair.partition("=")
    if not (name and sign and path):
        raise ConfigError(f"--against {pair} is not NAME=PATH", fix="for example --against plain=plain.onnx")
    return name, Path(path)


def _command() -> str:
    """Return the command line, with paths cut to their names, since records are shared."""
    pairs = (word.partition("=") for word in sys.argv[1:])
    words = [f"{name}={Path(path).name}" if sign else Path(name).name for name, sign, path in pairs]
    return shlex.join(["edgekd", *words])
