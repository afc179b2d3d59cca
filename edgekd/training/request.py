"""Requests to train and to evaluate, as the commands and the child processes of a sweep pass them on; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from edgekd import config

PROTOCOL_KEYS = (
    *("network", "method", "exits", "weights", "epochs", "lr", "batch_size", "precision", "workers"),
    *("seed", "split", "fold", "group"),
)
"""Fields of a `TrainRequest` that have the name of the protocol's key."""


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """The options of `edgekd train` or `edgekd distill`: one run, or a sweep of runs.

    A field that is None was not given and overrides neither the protocol file nor the run that is resumed.

    Attributes:
        command: `train` learns from labels alone and has no default network; `distill` has one.
        data: Folder of the images.
        out: Run folder, or folder of the sweep's run folders.
        protocol: Name of a shipped protocol or path of a TOML file; `finetune` if neither given nor resumed.
        teacher: Run folder of the teacher, or its sweep.
        image_size: The protocol's `preprocess.image_size`, in pixels.
        overrides: Any other protocol keys, as `KEY=VALUE`; they win over the fields.
        labels: CSV file in place of class folders.
        resume: Continue the run or sweep in `out`.
        exclude_bad: Train without the images that cannot be used.
        devices: GPUs, or processes under torchrun.
        seeds: Seeds of a sweep, `0,1,2`.
        folds: Folds of a sweep, `all` or `0,1`.
        jobs: Runs of a sweep that are trained at the same time.

    The remaining fields replace the protocol key of their name.
    """

    command: Literal["train", "distill"]
    data: Path
    out: Path
    protocol: str | None = None
    network: str | None = None
    method: str | None = None
    exits: tuple[int | str, ...] | None = None
    teacher: Path | None = None
    weights: str | None = None
    epochs: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    image_size: int | None = None
    seed: int | None = None
    split: str | None = None
    fold: int | None = None
    group: str | None = None
    precision: str | None = None
    workers: int | None = None
    overrides: tuple[str, ...] = ()
    labels: Path | None = None
    resume: bool = False
    exclude_bad: bool = False
    devices: int = 1
    seeds: str | None = None
    folds: str | None = None
    jobs: int = 1

    @property
    def is_sweep(self) -> bool:
        """True if several runs are requested, by seeds or folds."""
        return bool(self.seeds or self.folds)

    def protocol_values(self) -> dict[str, Any]:
        """Return the protocol keys that were given, dotted where nested, with their values."""
        return self._field_values() | config.parse_overrides(self.overrides)

    def flags(self) -> dict[str, str]:
        """Return the flag of each protocol key that a flag, not `--set`, decides."""
        overridden = config.parse_overrides(self.overrides)
        return {key: self._flag(key.rpartition(".")[2]) for key in self._field_values() if key not in overridden}

    def words(self, *names: str) -> list[str]:
        """Return the command-line words of those of the fields `names` that were given."""
        defaults = {field.name: field.default for field in fields(self)}
        given = {name: getattr(self, name) for name in names if getattr(self, name) != defaults[name]}
        return [word for name, value in given.items() for word in _words(self._flag(name), value)]

    def _field_values(self) -> dict[str, Any]:
        values: dict[str, Any] = {key: getattr(self, key) for key in PROTOCOL_KEYS}
        values["preprocess.image_size"] = self.image_size
        values["teacher"] = str(self.teacher.resolve()) if self.teacher else None
        values["data"] = str(self.data.resolve())
        return {key: value for key, value in values.items() if value is not None}

    def _flag(self, name: str) -> str:
        own = {"network": "--model" if self.command == "train" else "--student", "overrides": "--set"}
        return own.get(name, f"--{name.replace('_', '-')}")


def _words(flag: str, value: Any) -> Iterator[str]:
    for one in value if isinstance(value, tuple) else (value,):
        yield flag
        if one is not True:
            yield str(one)


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """Test metrics of a run folder.

    Attributes:
        run: The run folder.
        data: Folder of the images.
        out: JSON file to write.
        svm: Feature point at which a linear SVM takes the place of the exit heads.
    """

    run: Path
    data: Path
    out: Path
    svm: str | None = None


Request = TrainRequest | EvaluateRequest
