"""Fits a table's runs into a time budget: measures how fast each job trains, and chooses what to cut."""

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
from edgekd.reproduce.plan import PlannedRun, RunOptions, missing_jobs, plan
from edgekd.reproduce.table_spec import Table
from edgekd.serialization import read_json, to_json
from edgekd.training import run_folder
from edgekd.training.jobs import run_jobs
from edgekd.training.protocol import Protocol
from edgekd.training.sweep import SweepMember

LADDER = (224, 160, 112, 96, 80)
"""Image sizes to choose from. Below them, the deepest feature maps are one or two pixels wide."""
FLOORS = 10, 3
"""Smallest number of epochs while the image size can still be cut, and after that."""
PROBE_IMAGE_SIZE = 112
"""Largest image size at which speed is measured; it is assumed to fall with the area."""
PER_EVALUATED = 1 / 3
"""Cost of evaluating an image, as a fraction of training on it."""
START_S = 30.0
"""Seconds that a run takes besides training and evaluation."""
PROBES = "probe"
"""Folder below `runs` for the runs that measure speed."""


def seconds(text: str) -> float:
    """Parse `30m`, `1h30m`, `45s` into seconds.

    Raises:
        ConfigError: Another format.
    """
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip())
    if not match or not any(match.groups()):
        raise ConfigError(f"--budget {text}: not a time", fix="for example --budget 30m, 1h30m or 90s")
    return float(sum(int(n or 0) * unit for n, unit in zip(match.groups(), (3600, 60, 1))))


@dataclass(frozen=True)
class JobCost:
    """The cost of one job.

    Attributes:
        epochs: Number of epochs.
        image_size: Image size.
        train: Number of training images.
        val: Number of validation images.
        test: Number of test images.
        images_per_s: Training speed.
        measured_at: Image size at which it was measured.
    """

    epochs: int
    image_size: int
    train: int
    val: int
    test: int
    images_per_s: float
    measured_at: int

    def seconds(self, epochs: int, image_size: int) -> float:
        """Return the seconds of one run at these numbers of epochs and image size, or its own if they are smaller."""
        images = min(epochs, self.epochs) * (self.train + PER_EVALUATED * self.val) + PER_EVALUATED * self.test
        return START_S + images / self.images_per_s * (min(image_size, self.image_size) / self.measured_at) ** 2


@dataclass(frozen=True)
class Cuts:
    """Epochs, image size and repeats that fit into the budget.

    Attributes:
        epochs: Largest number of epochs.
        image_size: Largest image size.
        repeats: Number of seeds and folds.
        seconds: Estimated total time.
    """

    epochs: int
    image_size: int
    repeats: int
    seconds: float


def fit(costs: Sequence[JobCost], budget_s: float, *, repeats: int, at_once: int = 1) -> Cuts:
    """Choose the smallest reduction that fits into the time.

    Epochs are reduced first, down to 10; then the image size, one step of the ladder at a time; then epochs down to 3;
    then repeats. If even that does not fit, it is returned with an estimate above the budget.

    Args:
        costs: Cost of one run of each job.
        budget_s: Available time in seconds.
        repeats: Number of seeds and folds.
        at_once: Number of runs at one time.
    """
    full, size = max(cost.epochs for cost in costs), max(cost.image_size for cost in costs)
    steps = [size, *(p for p in LADDER if p < size)] if size > min(LADDER) else [size]
    high, low = (min(floor, full) for floor in FLOORS)
    ranges = [(size, full, high) for size in steps] + [(steps[-1], high, low)]
    tries = [(size, epochs, repeats) for size, top, floor in ranges for epochs in range(top, floor - 1, -1)]
    tries += [(steps[-1], low, fewer) for fewer in range(repeats - 1, 0, -1)]
    each = (Cuts(e, p, r, r * sum(cost.seconds(e, p) for cost in costs) / at_once) for p, e, r in tries)
    for cuts in each:
        if cuts.seconds <= budget_s:
            return cuts
    return cuts


Key = tuple[str, str, str, int, str]
"""Determinants of a job's speed: network, method, teacher's network, batch size, precision."""
Speeds = dict[Key, tuple[float, int]]
"""Images per second, and the image size."""


def key(planned: PlannedRun) -> Key:
    p = planned.protocol
    teacher = planned.teacher.protocol.network if planned.teacher else ""
    return p.network, p.method, teacher, p.batch_size, p.precision


def known_speeds(runs: Path) -> Speeds:
    """Return the speed of the last epoch of each run of two or more; the first epoch includes one-time work."""
    found: Speeds = {}
    folders = {path.parent for path in runs.glob(f"**/{run_folder.METRICS}")}
    for folder in sorted(folders, key=lambda f: (PROBES not in f.parts, f)):  # real runs count more
        rows = list(csv.DictReader((folder / run_folder.METRICS).read_text().splitlines()))
        if len(rows) > 1:
            made = config.load(Protocol, "protocols", str(folder / run_folder.PROTOCOL))
            teacher = run_folder.read_metadata(folder).provenance.get("teacher") or ""
            speed = float(rows[-1]["images_per_s"]), made.preprocess.image_size
            for precision in (made.precision, "auto"):  # `auto` settings are stored as resolved
                found[made.network, made.method, teacher, made.batch_size, precision] = speed
    return found


def job_costs(planned: Mapping[str, PlannedRun], speeds: Speeds, subsets: Mapping[str, int]) -> list[JobCost]:
    """Return the cost of each distinct run folder whose speed is known; `subsets` has the numbers of images."""
    found = []
    for one in {one.folder: one for one in planned.values()}.values():
        if key(one) in speeds:
            own = one.protocol.epochs, one.protocol.preprocess.image_size
            found.append(JobCost(*own, subsets["train"], subsets["val"], subsets["test"], *speeds[key(one)]))
    return found


def few_images(folder: Folder, out: Path, *, batch_size: int) -> None:
    """Make a folder of links to the images that one batch and its validation and test images require."""
    count = -(-(2 * batch_size) // len(folder.classes))
    taken: Counter[tuple[int, str | None]] = Counter()
    with atomic_folder(out) as made:
        for item in folder.items:
            taken[item.label, item.subset] += 1
            if taken[item.label, item.subset] <= max(count, 5):
                link = made / item.path
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to((folder.root / item.path).resolve())


def choose_cuts(
    table: Table,
    planned: Mapping[str, PlannedRun],
    members: Sequence[SweepMember],
    options: RunOptions,
    *,
    checked: Checked,
    budget_s: float,
    until: float,
    at_once: int,
    say: Callable[[str], None],
) -> Cuts:
    """Measure the speed of each job, and choose epochs, image size and repeats that fit into the time.

    The choice is kept beside the runs, so that a second start continues the same runs regardless of the machine's load.

    Args:
        table: The table.
        planned: Job name to its run.
        members: Seeds and folds.
        options: Options that decide each run.
        checked: The images.
        budget_s: The whole budget in seconds.
        until: Its end on `time.monotonic`.
        at_once: Number of runs at one time.
        say: Called with messages.

    Raises:
        TrainingError: The speed of no job could be measured.
    """
    content = [{"budget_s": budget_s, "at_once": at_once}, [one.digest for one in planned.values()], members]
    kept = options.runs / "plans" / f"{hashlib.sha256(repr(content).encode()).hexdigest()[:12]}.json"
    if kept.is_file():
        say(f"reduced as at the first start; remove {kept} to choose again")
        return read_json(kept, Cuts, what="plan")
    speeds = _measured(table, planned, options, checked=checked, until=until, at_once=at_once, say=say)
    protocol = next(iter(planned.values())).protocol
    split = make_split(checked, method=protocol.split, group=protocol.group, seed=members[0].seed, fold=members[0].fold)
    sizes = {subset: len(items) for subset, items in split.subsets.items()}
    work = job_costs(planned, speeds, sizes)
    if not work:
        raise TrainingError(
            "the speed of no job could be measured", fix=f"give more time, or see the logs in {options.runs / PROBES}"
        )
    cuts = fit(work, until - time.monotonic(), repeats=len(members), at_once=at_once)
    atomic_write(kept, to_json(cuts))
    return cuts


def _measured(
    table: Table,
    planned: Mapping[str, PlannedRun],
    options: RunOptions,
    *,
    checked: Checked,
    until: float,
    at_once: int,
    say: Callable[[str], None],
) -> Speeds:
    """Return the speed of each job: from finished runs, else from two epochs of about one batch."""
    speeds = known_speeds(options.runs)
    unknown = [name for name, one in planned.items() if key(one) not in speeds]
    if not unknown:
        return speeds
    batch_size = max(one.protocol.batch_size for one in planned.values())
    few = f"{checked.fingerprint[:12]}-{batch_size}"
    data = options.runs / PROBES / f"images-{few}"
    if not data.is_dir():
        few_images(checked.folder, data, batch_size=batch_size)
    two = {**options.overrides, "epochs": 2}
    cut = dataclasses.replace(options, overrides=two, image_size=PROBE_IMAGE_SIZE, group="none", weights=None)
    probe = dataclasses.replace(cut, data=data, fingerprint=f"few of {few}", runs=data.parent)
    tried = plan(table, probe)
    jobs = missing_jobs([each for name in unknown for each in tried[name].needed()], [SweepMember(0, 0)], probe)
    say(f"measuring speed: {len(jobs)} short runs")
    run_jobs(jobs, at_once=at_once, deadline=until)
    return known_speeds(options.runs)
