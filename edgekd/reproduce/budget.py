"""A table in the time there is: how fast each job trains, and what has to be cut."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekd import config
from edgekd.data.folders import Checked, Folder
from edgekd.data.splitting import make_split
from edgekd.errors import ConfigError, TrainingError
from edgekd.files import atomic_folder, atomic_write
from edgekd.reproduce.plan import Planned, Request, plan, tasks
from edgekd.reproduce.table_spec import Table
from edgekd.serialization import read_json, to_json
from edgekd.training import run_folder
from edgekd.training.jobs import run_jobs
from edgekd.training.protocol import Protocol
from edgekd.training.sweep import SweepMember

LADDER = (224, 160, 112, 96, 80)
"""Pixels to go down to. Below, the deepest maps are a pixel or two."""
FLOORS = 10, 3
"""Epochs that are kept while pixels can still be cut, and at least."""
PROBE_PIXELS = 112
"""Speed is measured on pictures of this size at most, and taken to fall with their area."""
PER_EVALUATED = 1 / 3
"""What an image costs that is evaluated, against one that is trained on."""
START_S = 30.0
"""What a run takes to begin and to end, beside training and evaluation."""
PROBES = "probe"
"""The folder under `runs` for what is trained to learn its speed."""


def seconds(text: str) -> float:
    """`30m`, `1h30m`, `45s` in seconds.

    Raises:
        ConfigError: no such time.
    """
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip())
    if not match or not any(match.groups()):
        raise ConfigError(f"--budget {text}: no time", fix="for example --budget 30m, 1h30m or 90s")
    return float(sum(int(n or 0) * unit for n, unit in zip(match.groups(), (3600, 60, 1))))


@dataclass(frozen=True)
class Load:
    """One job's work. train, val, test: images. images_per_s: trained, at `measured_at` pixels."""

    epochs: int
    pixels: int
    train: int
    val: int
    test: int
    images_per_s: float
    measured_at: int

    def seconds(self, epochs: int, pixels: int) -> float:
        """What one run takes in at most so many epochs and pixels."""
        images = min(epochs, self.epochs) * (self.train + PER_EVALUATED * self.val) + PER_EVALUATED * self.test
        return START_S + images / self.images_per_s * (min(pixels, self.pixels) / self.measured_at) ** 2


@dataclass(frozen=True)
class Cuts:
    """What fits: epochs and pixels at most, and how many of the seeds and folds. seconds: the estimate."""

    epochs: int
    pixels: int
    repeats: int
    seconds: float


def fit(loads: Sequence[Load], budget_s: float, *, repeats: int, at_once: int = 1) -> Cuts:
    """The largest cut of the work that fits into the time.

    Epochs go first, down to 10; then pixels, a step of the ladder at a time; then epochs down to 3; then repeats. What
    does not even fit then is returned with its estimate above the budget.
    """
    full, size = max(load.epochs for load in loads), max(load.pixels for load in loads)
    steps = [size, *(p for p in LADDER if p < size)] if size > min(LADDER) else [size]
    high, low = (min(floor, full) for floor in FLOORS)
    ranges = [(pixels, full, high) for pixels in steps] + [(steps[-1], high, low)]
    tries = [(pixels, epochs, repeats) for pixels, top, floor in ranges for epochs in range(top, floor - 1, -1)]
    tries += [(steps[-1], low, fewer) for fewer in range(repeats - 1, 0, -1)]
    each = (Cuts(e, p, r, r * sum(load.seconds(e, p) for load in loads) / at_once) for p, e, r in tries)
    for cuts in each:
        if cuts.seconds <= budget_s:
            return cuts
    return cuts


Key = tuple[str, str, str, int, str]
"""What decides a job's speed: network, method, teacher's network, batch size, precision."""
Speeds = dict[Key, tuple[float, int]]
"""Images a second, and at how many pixels."""


def key(planned: Planned) -> Key:
    p = planned.protocol
    teacher = planned.teacher.protocol.network if planned.teacher else ""
    return p.network, p.method, teacher, p.batch_size, p.precision


def known_speeds(runs: Path) -> Speeds:
    """The speeds of the last epochs of all runs of at least two; the first one's includes much that is done once."""
    found: Speeds = {}
    folders = {path.parent for path in runs.glob(f"**/{run_folder.METRICS}")}
    for folder in sorted(folders, key=lambda f: (PROBES not in f.parts, f)):  # real runs count more
        rows = list(csv.DictReader((folder / run_folder.METRICS).read_text().splitlines()))
        if len(rows) > 1:
            made = config.load(Protocol, "protocols", str(folder / run_folder.PROTOCOL))
            teacher = run_folder.read_metadata(folder).provenance.get("teacher") or ""
            speed = float(rows[-1]["images_per_s"]), made.preprocess.image_size
            for precision in (made.precision, "auto"):  # what was left to edgekd is kept as what it took
                found[made.network, made.method, teacher, made.batch_size, precision] = speed
    return found


def loads(planned: Mapping[str, Planned], speeds: Speeds, subsets: Mapping[str, int]) -> list[Load]:
    """The work of each distinct run folder whose speed is known. parts: images in train, val and test."""
    found = []
    for one in {one.folder: one for one in planned.values()}.values():
        if key(one) in speeds:
            own = one.protocol.epochs, one.protocol.preprocess.image_size
            found.append(Load(*own, subsets["train"], subsets["val"], subsets["test"], *speeds[key(one)]))
    return found


def few_images(folder: Folder, out: Path, *, batch_size: int) -> None:
    """A folder of links to as many images as a batch and its share of validation and test images need."""
    count = -(-(2 * batch_size) // len(folder.classes))
    taken: Counter[tuple[int, str | None]] = Counter()
    with atomic_folder(out) as made:
        for item in folder.items:
            taken[item.label, item.subset] += 1
            if taken[item.label, item.subset] <= max(count, 5):
                link = made / item.path
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to((folder.root / item.path).resolve())


def decide(
    table: Table,
    planned: Mapping[str, Planned],
    members: Sequence[SweepMember],
    request: Request,
    *,
    checked: Checked,
    budget_s: float,
    until: float,
    at_once: int,
    say: Callable[[str], None],
) -> Cuts:
    """What fits into the time: measured speeds, then `fit`. It is kept beside the runs, so that a second start goes on
    with the first one's runs whatever the machine is doing by then.

    Raises:
        TrainingError: no job could be tried.
    """
    content = [{"budget_s": budget_s, "at_once": at_once}, [one.digest for one in planned.values()], members]
    kept = request.runs / "plans" / f"{hashlib.sha256(repr(content).encode()).hexdigest()[:12]}.json"
    if kept.is_file():
        say(f"cut as when it was first begun; remove {kept} to decide anew")
        return read_json(kept, Cuts, what="plan")
    speeds = _measured(table, planned, request, checked=checked, until=until, at_once=at_once, say=say)
    protocol = next(iter(planned.values())).protocol
    split = make_split(checked, method=protocol.split, group=protocol.group, seed=members[0].seed, fold=members[0].fold)
    sizes = {subset: len(items) for subset, items in split.subsets.items()}
    work = loads(planned, speeds, sizes)
    if not work:
        raise TrainingError(
            "no job of this table could be tried", fix=f"give more time, or see the logs in {request.runs / PROBES}"
        )
    cuts = fit(work, until - time.monotonic(), repeats=len(members), at_once=at_once)
    atomic_write(kept, to_json(cuts))
    return cuts


def _measured(
    table: Table,
    planned: Mapping[str, Planned],
    request: Request,
    *,
    checked: Checked,
    until: float,
    at_once: int,
    say: Callable[[str], None],
) -> Speeds:
    """The speed of each job: from runs that are there, else from two epochs of a batch or so."""
    speeds = known_speeds(request.runs)
    unknown = [name for name, one in planned.items() if key(one) not in speeds]
    if not unknown:
        return speeds
    batch_size = max(one.protocol.batch_size for one in planned.values())
    few = f"{checked.fingerprint[:12]}-{batch_size}"
    data = request.runs / PROBES / f"images-{few}"
    if not data.is_dir():
        few_images(checked.folder, data, batch_size=batch_size)
    two = {**request.overrides, "epochs": 2}
    cut = dataclasses.replace(request, overrides=two, pixels=PROBE_PIXELS, group="none", weights=None)
    probe = dataclasses.replace(cut, data=data, fingerprint=f"few of {few}", runs=data.parent)
    tried = plan(table, probe)
    jobs = tasks([each for name in unknown for each in tried[name].needed()], [SweepMember(0, 0)], probe)
    say(f"measuring speed: {len(jobs)} short runs")
    run_jobs(jobs, at_once=at_once, deadline=until)
    return known_speeds(request.runs)
