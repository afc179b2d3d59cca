"""Distillation methods by name; several are joined with `+`, for example `kd+sd`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from edgekd.errors import ConfigError, nearest
from edgekd.models.multi_exit import Outputs


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the losses can be told. Total = ce_weight * CE + kd_weight * KD + sd_weight * SD.

    feature_weight: lambda of self-distillation's feature term. literal_ce: count the deepest exit's
    cross-entropy once more for each exit, as paper A's formula is printed.
    """

    method: str = "ce"
    temperature: float = 3.0
    ce_weight: float = 1.0
    kd_weight: float = 1.0
    sd_weight: float = 1.0
    feature_weight: float = 0.03
    label_smoothing: float = 0.0
    literal_ce: bool = False

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature: {self.temperature} is not above 0")
        for key in ("ce_weight", "kd_weight", "sd_weight", "feature_weight"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}: {getattr(self, key)} is negative")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: {self.label_smoothing} is not in 0..1")


class Loss(Protocol):
    """A method at work: outputs, teacher's logits (B, C) or None, and targets (B,) to a scalar."""

    def __call__(self, out: Outputs, teacher: Tensor | None, target: Tensor) -> Tensor: ...


Factory = Callable[[Settings], Loss]
METHODS: dict[str, Factory] = {}
NEED_TEACHER: set[str] = set()


def method(name: str, *, teacher: bool = False) -> Callable[[Factory], Factory]:
    """Register a method under a name.

    Raises:
        ValueError: the name is taken.
    """

    def register(factory: Factory) -> Factory:
        if name in METHODS:
            raise ValueError(f"distillation method '{name}' is registered twice")
        METHODS[name] = factory
        if teacher:
            NEED_TEACHER.add(name)
        return factory

    return register


def names(text: str) -> list[str]:
    """`kd+sd` as `["ce", "kd", "sd"]`: cross-entropy is always in.

    Raises:
        ConfigError: an unknown or repeated name.
    """
    parts = text.split("+")
    for part in parts:
        if part not in METHODS:
            raise ConfigError(f"no distillation method '{part}' in '{text}'", fix=nearest(part, METHODS))
    if len(set(parts)) < len(parts):
        raise ConfigError(f"method '{text}' names one part twice", fix="name each once, for example kd+sd")
    return ["ce", *(p for p in parts if p != "ce")]


def needs_teacher(text: str) -> bool:
    """Whether a method named like `kd+sd` learns from a teacher."""
    return not NEED_TEACHER.isdisjoint(names(text))


class Criterion(nn.Module):
    """The sum of the methods that `settings.method` names; `terms` holds each one's last value."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.losses = {name: METHODS[name](settings) for name in names(settings.method)}
        self.terms: dict[str, Tensor] = {}
        for name, loss in self.losses.items():
            if isinstance(loss, nn.Module):  # a method that owns parameters
                self.add_module(name, loss)

    def forward(self, out: Outputs, teacher: Tensor | None, target: Tensor) -> Tensor:
        values = {name: loss(out, teacher, target) for name, loss in self.losses.items()}
        self.terms = {name: value.detach() for name, value in values.items()}
        return sum(values.values(), start=target.new_zeros((), dtype=out.logits[-1].dtype))


from edgekd.distill import ce, kd, sd  # noqa: E402, F401  (each registers itself)
