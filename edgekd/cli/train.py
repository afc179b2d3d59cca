"""edgekd train, and what it shares with edgekd distill."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgekd.cli.common import (
    BadOption,
    BatchOption,
    DataOption,
    DevicesOption,
    EpochsOption,
    FoldOption,
    FoldsOption,
    GroupOption,
    JobsOption,
    LabelsOption,
    LrOption,
    OutOption,
    PrecisionOption,
    ProtocolOption,
    ResumeOption,
    SeedOption,
    SeedsOption,
    SetOption,
    SizeOption,
    SplitOption,
    WeightsOption,
    WorkersOption,
    bar,
    echo,
    next_command,
    outside,
    reserve,
    resumable,
    say,
)
from edgekd.errors import ConfigError

if TYPE_CHECKING:
    from edgekd.training.protocol import Protocol


STUDENT = "multi-exit-resnet18"
SAME = ("weights", "epochs", "lr", "batch_size", "seed", "split", "fold", "group", "precision", "workers")
"""Options of train and distill that are called like the protocol's key."""
SETTINGS = (
    *("protocol", "weights", "epochs", "lr", "batch_size", "image_size", "precision", "workers", "set_"),
    *("labels", "exclude_bad"),
)
"""Options of train that hold for its student, too."""
NETWORKS_OWN = ("network=", "method=", "exits=", "weights=")
"""What is set for a network and not for its student."""


def train(
    data: DataOption,
    out: OutOption,
    model: Annotated[
        str | None, typer.Option(help="Any timm or torchvision classifier, or a student; else the protocol's.")
    ] = None,
    protocol: ProtocolOption = None,
    weights: WeightsOption = None,
    epochs: EpochsOption = None,
    lr: LrOption = None,
    batch_size: BatchOption = None,
    image_size: SizeOption = None,
    seed: SeedOption = None,
    split: SplitOption = None,
    fold: FoldOption = None,
    group: GroupOption = None,
    precision: PrecisionOption = None,
    workers: WorkersOption = None,
    set_: SetOption = None,
    labels: LabelsOption = None,
    resume: ResumeOption = False,
    exclude_bad: BadOption = False,
    devices: DevicesOption = 1,
    seeds: SeedsOption = None,
    folds: FoldsOption = None,
    jobs: JobsOption = 1,
) -> None:
    """Train a teacher or a plain network on labels alone: images to a run folder, or to one for each seed and fold."""
    given = locals()
    _, made = _run(given, {"network": ("--model", model)}, method="ce")
    many = ("split", "group", "fold", "seeds", "folds", "jobs") if seeds or folds else ()
    first = _first_weights(made, out)
    again = _again(given | {"weights": first}, *SETTINGS, *many)
    student = out.with_name("student" if out.name != "student" else "student-2")
    next_command("distill", "--data", data, "--teacher", out, *again, "--out", student)


def _run(given: dict[str, Any], flags: dict[str, tuple[str, Any]], *, method: str = "") -> tuple[Path, Protocol]:
    """What `train` and `distill` do with their options: one run, or a sweep; a run folder and what was asked for.

    flags: protocol key to the option that gives it, and its value. method: the command's own, whatever the protocol
    says, unless `--set` does.
    """
    from edgekd import config
    from edgekd.training.protocol import refuse_other_settings

    data, out, name = given["data"], given["out"], given["protocol"]
    outside(out, data)
    flags |= {key: (f"--{key.replace('_', '-')}", given[key]) for key in SAME}
    flags |= {"data": ("--data", str(data.resolve())), "preprocess.image_size": ("--image-size", given["image_size"])}
    values = {key: value for key, (_, value) in flags.items() if value is not None}
    values |= config.parse_overrides(given["set_"] or [])
    many = given["seeds"] or given["folds"]
    own = out / "protocol.toml"
    resumed = given["resume"] and not many and own.is_file()
    if resumed and name is None:
        asked = _load(str(own), values, flags)
    else:
        asked = _fresh(name, values, flags, method)
        as_teacher = asked.teacher and not {"split", "group"} & values.keys() and not Path(asked.split).is_file()
        if many:
            reserve(out)
            with resumable(out):
                return _sweep(given, asked, as_teacher=bool(as_teacher)), asked
        if as_teacher:
            asked = dataclasses.replace(asked, split=f"{asked.teacher}/split.json")
    if resumed:
        made = _load(str(own), {}, {})
        refuse_other_settings(out, made, asked)
        asked = dataclasses.replace(made, data=asked.data, workers=asked.workers)
    with resumable(own):
        _train(asked, given)
    return out, asked


def _load(name: str, values: dict[str, Any], flags: dict[str, tuple[str, Any]]) -> Protocol:
    from edgekd import config
    from edgekd.training.protocol import Protocol

    flag_of = {key: flag for key, (flag, value) in flags.items() if value is not None}
    return config.load(Protocol, "protocols", name, overrides=values, flags=flag_of)


def _fresh(name: str | None, values: dict[str, Any], flags: dict[str, tuple[str, Any]], method: str) -> Protocol:
    """The protocol with what was given on top; the command's own method and student where nothing else says."""
    asked = _load(name or "finetune", values, flags)
    if method and "method" not in values:
        if asked.method != method and Path(name or "").suffix:
            say(f"train learns from labels alone; the method {asked.method} in {name} is for edgekd distill")
        asked = dataclasses.replace(asked, method=method)
    if method and not asked.network:
        raise ConfigError("no network is named", fix="give one with --model, or as the protocol's network")
    return asked if asked.network else dataclasses.replace(asked, network=STUDENT)


def _again(given: dict[str, Any], *names: str) -> list[str]:
    """The options with these names as they were given."""
    words = []
    for name in names:
        value = given.get(name)
        for one in value if isinstance(value, list) else [value]:
            if one is None or one is False or str(one).startswith(NETWORKS_OWN):
                continue
            words += [f"--{name.strip('_').replace('_', '-')}", *([] if one is True else [str(one)])]
    return words


def _first_weights(made: Protocol, run: Path) -> str | None:
    """What a student starts from after such a run: its weights if they fit the student's backbone, else as it did."""
    from edgekd.models.networks import hub_name

    if made.network and made.network.removeprefix("multi-exit-") == hub_name(STUDENT):
        return str(run)
    return made.weights if made.weights in ("none", "hub") else None


def _sweep(given: dict[str, Any], protocol: Protocol, *, as_teacher: bool) -> Path:
    from edgekd.errors import TrainingError
    from edgekd.training import sweep

    for flag, many, default in (("seed", "seeds", None), ("fold", "folds", None), ("devices", "seeds", 1)):
        if given[flag] != default and (given[many] or flag == "devices"):
            raise ConfigError(f"--{flag} does not go with --{many}", fix="give one of them")
    out, of = given["out"], sweep.members(given["seeds"], given["folds"], protocol)
    states = sweep.sweep(
        given["data"],
        out,
        protocol=protocol,
        of=of,
        teacher=Path(protocol.teacher) if protocol.teacher else None,
        keep_split=not as_teacher,
        labels=given["labels"],
        resume=given["resume"],
        exclude_bad=given["exclude_bad"],
        at_once=given["jobs"],
        on_end=lambda job, state: echo(f"{out / job.name}: {state}"),
    )
    echo(sweep.summary_text(json.loads((out / sweep.SUMMARY).read_text())))
    if failed := [name for name, state in states.items() if state == "failed"]:
        raise TrainingError(
            "\n".join([f"{len(failed)} of {len(of)} runs failed; each log ends with the reason:", *_logs(out, failed)]),
            fix="mend it and run the same command with --resume: what is done is kept",
        )
    return Path(out / of[0].name)


def _logs(out: Path, names: list[str]) -> list[str]:
    from edgekd.training.jobs import reason

    return [f"  {path}: {reason(path)}" for path in (out / f"{name}.log" for name in names)]


def _exits(text: str | None) -> list[int | str] | None:
    """`2,blocks.6,final` as stage numbers and names of feature points."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"--exits {text}: an exit without a name", fix="for example --exits 1,2,3,4")
    return [int(part) if part.isdecimal() else part for part in parts]


def _train(protocol: Protocol, given: dict[str, Any]) -> None:
    from edgekd.data.splitting import summary
    from edgekd.training.train import train

    with bar("check images") as checked, bar("train") as trained:
        history = train(
            given["data"],
            given["out"],
            protocol=protocol,
            **{name: given[name] for name in ("labels", "resume", "exclude_bad", "devices")},
            on_check=checked,
            on_split=lambda split: echo(summary(split)),
            progress=trained,
        )
    best = max(history, key=lambda row: (row["val_ensemble"], row["epoch"]))
    echo(f"{given['out']}: best epoch {best['epoch']:.0f}, validation accuracy {best['val_ensemble']:.2%}")


def _data(run: Path, data: Path | None) -> Path:
    """The images given, or those that a run folder was trained on."""
    if data is None and (run / "protocol.toml").is_file():
        data = Path(_load(str(run / "protocol.toml"), {}, {}).data)
    if data is None or not data.is_dir():
        raise ConfigError(f"no images at {data}", fix="give their folder with --data")
    return data
