"""A table's jobs as runs: their settings, their run folders (named by a digest), their differences from the paper."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekd import config
from edgekd.distill.base import InitOptions
from edgekd.distill.methods import METHODS
from edgekd.errors import ConfigError
from edgekd.files import sha256
from edgekd.models.networks import hub_name
from edgekd.reproduce.table_spec import IMAGENET, JobSpec, Table
from edgekd.schema import to_table
from edgekd.training import jobs, sweep
from edgekd.training.protocol import RESUMABLE, Protocol
from edgekd.training.request import EvaluateRequest, TrainRequest
from edgekd.training.sweep import SweepMember

RECIPE = (
    *("epochs", "batch_size", "optimizer", "lr", "momentum", "weight_decay", "schedule", "milestones", "gamma"),
    *("warmup_epochs", "precision", "clip_norm", "ema"),
)
"""Protocol keys that `--protocol` replaces, besides augmentation and image size: those of the training schedule."""
NO_RESULT = (*RESUMABLE, "teacher", "network", "weights", "seed", "fold")
"""Protocol keys excluded from the digest: without influence on the result, or covered by another part of it."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options that decide a table's runs.

    Attributes:
        data: Folder of the images.
        fingerprint: Digest of the images, once they are read.
        runs: Folder of the run folders.
        weights: Folder of <network>.safetensors.
        protocol: Protocol that replaces the paper's training schedule; empty for none.
        overrides: Protocol keys.
        substitutes: Network to the one that replaces it.
        group: Grouping of the split.
        exclude_bad: Train without images that cannot be used.
        epochs: Number of epochs that the budget allows; 0 for no limit.
        image_size: Image size that the budget allows; 0 for no limit.
    """

    data: Path
    fingerprint: str = ""
    runs: Path
    weights: Path | None = None
    protocol: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    substitutes: Mapping[str, str] = field(default_factory=dict)
    group: str | None = None
    exclude_bad: bool = False
    epochs: int = 0
    image_size: int = 0


@dataclass(frozen=True)
class PlannedRun:
    """A job with the settings that it is run with.

    Attributes:
        job: The job.
        paper: The paper's settings.
        protocol: Ours.
        file: File of its initial weights.
        teacher: The teacher's job.
        start: The job that provides its initial weights.
        fingerprint: Digest of the images.
        runs: Folder of the run folders.
    """

    job: JobSpec
    paper: Protocol
    protocol: Protocol
    file: Path | None
    teacher: PlannedRun | None
    start: PlannedRun | None
    fingerprint: str
    runs: Path

    @functools.cached_property
    def digest(self) -> str:
        """Digest of everything that decides the result but seed, fold and edgekd's version.

        Settings equal to `Protocol`'s defaults are excluded, so that a setting added later changes no digest.
        """
        first = self.start.digest if self.start else sha256(self.file) if self.file else "none"
        teacher = self.teacher.digest if self.teacher else ""
        own = {k: v for k, v in dataclasses.asdict(self.protocol).items() if k not in NO_RESULT}
        defaults = Protocol(precision="32-true", options={name: METHODS[name].options() for name in own["options"]})
        beyond = _beyond(own, dataclasses.asdict(defaults))
        content = [self.protocol.network, beyond, first, teacher, self.fingerprint]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def folder(self) -> Path:
        """Folder of its runs, one for each seed and fold."""
        return self.runs / f"{self.protocol.network}-{self.protocol.method}-{self.digest}"

    def job_name(self, member: SweepMember) -> str:
        """Return the name of the job that writes a run's scores."""
        return f"{self.folder.name}/{member.name}" + (f"/svm-{self.job.svm}" if self.job.svm else "")

    def needed(self) -> Iterator[PlannedRun]:
        """Yield the runs that it depends on, and itself at the end."""
        for other in (self.teacher, self.start):
            if other:
                yield from other.needed()
        yield self

    def scores(self, member: SweepMember) -> Path:
        """Return the file with a run's test scores."""
        return self.folder / member.name / (f"svm-{self.job.svm}.json" if self.job.svm else sweep.TEST)

    def differences(self) -> list[str]:
        """List the differences from the paper as text."""
        own = list(_own_differences(self))
        for what, other in (("teacher", self.teacher), ("first weights", self.start)):
            own += [f"{what}: {text}" for text in (other.differences() if other else []) if text not in own]
        return own


def _beyond(own: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that differ from the defaults."""
    other = {k: v for k, v in own.items() if v != default.get(k)}
    return {k: _beyond(v, default.get(k, {})) if isinstance(v, dict) else v for k, v in other.items()}


def plan(table: Table, options: RunOptions) -> dict[str, PlannedRun]:
    """Return the runs that the table's rows require, in dependency order.

    Raises:
        ConfigError: Unknown keys or wrong values.
    """
    found: dict[str, PlannedRun] = {}
    for name in table.order():
        job = table.jobs[name]
        protocol = resolve_protocol(table, job, options)
        file = _file(protocol.network, options.weights) if job.weights == IMAGENET else None
        teacher, start = found.get(job.teacher), found.get(job.weights)
        paper = _paper(table, job)
        found[name] = PlannedRun(job, paper, protocol, file, teacher, start, options.fingerprint, options.runs)
    return found


def _paper(table: Table, job: JobSpec) -> Protocol:
    overrides = {"network": job.network, "method": job.method} | table.settings | job.settings
    return config.load(Protocol, "protocols", table.protocol, overrides=overrides)


def resolve_protocol(table: Table, job: JobSpec, options: RunOptions) -> Protocol:
    """Combine the settings of the paper, `--protocol`, the table, `--set` and the budget; later ones win.

    What is counted in epochs (milestones, warm-up, anchors, a method's initial stage) is scaled with them, unless set.
    """
    network = options.substitutes.get(job.network, job.network)
    overrides = {**table.settings, **job.settings}
    if options.protocol:
        recipe = config.load(Protocol, "protocols", options.protocol)
        cut = scaled(_paper(table, job), recipe.epochs)
        ways = {key: getattr(recipe, key) for key in RECIPE} | {"augment": dataclasses.asdict(recipe.augment)}
        ways["preprocess.image_size"] = recipe.preprocess.image_size
        overrides = ways | overrides | {"anchor_every": cut.anchor_every} | _init_epochs(cut)
    requested = {k: v for k, v in options.overrides.items() if k != "epochs"}
    overrides |= {"network": network, "method": job.method, "weights": "none"}
    overrides |= ({"group": options.group} if options.group else {}) | requested
    made = config.load(Protocol, "protocols", table.protocol, overrides=overrides)
    epochs = options.overrides.get("epochs", made.epochs)
    made = scaled(made, min(epochs, options.epochs) if options.epochs else epochs, keep=requested)
    size = min(made.preprocess.image_size, options.image_size or made.preprocess.image_size)
    return dataclasses.replace(made, preprocess=dataclasses.replace(made.preprocess, image_size=size))


def scaled(p: Protocol, epochs: int, *, keep: Collection[str] = ()) -> Protocol:
    """Scale a protocol to a number of epochs, and what is counted in epochs in proportion.

    Args:
        p: The protocol.
        epochs: Number of epochs.
        keep: Keys that are not scaled.

    Raises:
        ConfigError: Not a number of epochs.
    """
    if not isinstance(epochs, int) or epochs < 1:
        raise ConfigError(f"epochs: {epochs!r} is not a number of epochs", fix="for example --set epochs=20")
    share = epochs / p.epochs
    counts: dict[str, Any] = {
        "milestones": tuple(math.ceil(m * share - 1e-9) for m in p.milestones),
        "warmup_epochs": p.warmup_epochs * share,
        "anchor_every": max(1, round(p.anchor_every * share)) if p.anchor_every else 0,
    }
    options = {
        name: dataclasses.replace(own, init_epochs=max(1, round(own.init_epochs * share)))
        for name, own in p.options.items()
        if isinstance(own, InitOptions) and own.init_epochs and f"{name}.init_epochs" not in keep
    }
    counts["options"] = p.options | options
    return dataclasses.replace(p, epochs=epochs, **{k: v for k, v in counts.items() if k not in keep})


def _init_epochs(p: Protocol) -> dict[str, int]:
    """Return the given lengths of methods' initial stages, as protocol keys."""
    return {f"{name}.init_epochs": own.init_epochs for name, own in p.options.items() if isinstance(own, InitOptions)}


def _file(network: str, folder: Path | None) -> Path | None:
    """Return the file of the network's ImageNet weights; None if the folder does not have it."""
    try:
        file = folder / f"{hub_name(network)}.safetensors" if folder else None
    except ConfigError:  # one of edgekd's own, which has no such weights
        return None
    return file if file and file.is_file() else None


def _own_differences(planned: PlannedRun) -> Iterator[str]:
    ours, paper = planned.protocol, planned.paper
    if ours.network != paper.network:
        yield f"{ours.network} in place of {paper.network}"
    if planned.job.weights == IMAGENET and not planned.file:
        yield "random initial weights, not ImageNet's"
    if ours.epochs != paper.epochs:
        yield f"{ours.epochs} epochs, not {paper.epochs}"
    if ours.preprocess.image_size != paper.preprocess.image_size:
        yield f"{ours.preprocess.image_size} pixels, not {paper.preprocess.image_size}"
    if ours.group != paper.group:
        yield f"split grouped by {ours.group}"
    size = dataclasses.replace(paper.preprocess, image_size=ours.preprocess.image_size)
    same = dataclasses.replace(scaled(paper, ours.epochs), preprocess=size, group=ours.group)
    mine, other = to_table(ours), to_table(same)
    idle = () if ours.schedule == "step" else ("milestones", "gamma")
    for key in sorted((mine.keys() | other.keys()) - {*NO_RESULT, *idle, "precision"}):
        own, paper_s = mine.get(key, {}), other.get(key, {})
        if own != paper_s:
            yield f"{key} {_short(own, paper_s)}, not {_short(paper_s, own)}"


def _short(value: Any, other: Any) -> str:
    """Format a setting; of a table only the keys in which the other one differs."""
    if isinstance(value, dict):
        return " ".join(f"{k} {v}" for k, v in value.items() if other.get(k) != v) or "nothing"
    return str(list(value) if isinstance(value, tuple) else value)


def missing_jobs(
    planned: Collection[PlannedRun], members: Sequence[SweepMember], options: RunOptions
) -> list[jobs.ChildJob]:
    """Return the jobs that are missing, seed by seed, so that every row has one number before any has two."""
    found: dict[str, jobs.ChildJob] = {}
    for member in members:
        for one in planned:
            name, folder = f"{one.folder.name}/{member.name}", one.folder / member.name
            if not (folder / sweep.TEST).is_file() and name not in found:
                found[name] = _train(one, member, options)
            if one.job.svm and not one.scores(member).is_file():
                test = EvaluateRequest(run=folder, data=options.data, out=one.scores(member), svm=one.job.svm)
                log = one.folder / f"{one.scores(member).stem}-{member.name}.log"
                found[one.job_name(member)] = jobs.ChildJob(one.job_name(member), (test,), log, (name,))
    return list(found.values())


def _train(one: PlannedRun, member: SweepMember, options: RunOptions) -> jobs.ChildJob:
    above = [other for other in (one.teacher, one.start) if other]
    first = one.start.folder / member.name if one.start else one.file or "none"
    teacher = str((one.teacher.folder / member.name).resolve()) if one.teacher else ""
    own = {"seed": member.seed, "fold": member.fold, "weights": str(first), "teacher": teacher}
    protocol = dataclasses.replace(one.protocol, **own)  # type: ignore[arg-type]
    folder = one.folder / member.name
    return sweep.train_job(
        f"{one.folder.name}/{member.name}",
        protocol,
        TrainRequest(command="distill", data=options.data, out=folder, exclude_bad=options.exclude_bad),
        depends_on=tuple(f"{other.folder.name}/{member.name}" for other in above),
    )
