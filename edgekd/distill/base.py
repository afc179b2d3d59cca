"""Distillation methods by name; several are joined with `+`, for example `kd+at`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from torch import Tensor

from edgekd.errors import ConfigError, nearest
from edgekd.models.base import Outputs

Need: TypeAlias = Literal["stages", "preact", "pooled"]


@dataclass(frozen=True, kw_only=True)
class Triplet:
    """Which triplets `hybrid` learns from, `all` or each anchor's `hard`est, their margin, and whether distances are
    squared."""

    mining: Literal["all", "hard"] = "all"
    margin: float = 1.0
    squared: bool = True

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise ValueError(f"margin: {self.margin} is negative")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the losses can be told.

    method: names joined with `+`; cross-entropy is always in. loss_weights: method (or `ce`) to its weight in the sum,
    instead of the method's own. temperature: tau of every softened softmax, where the method does not bring its own.
    feature_weight: lambda of self-distillation's feature term. literal_ce: count the deepest exit's cross-entropy once
    more for each exit, as paper A's formula is printed. triplet: for the method `hybrid`. init_epochs: how many of the
    epochs a method with two stages spends on its first one; -1 for the method's own number. student_points,
    teacher_points: feature points (`edgekd models show NAME --features`) for the methods that compare maps; the ends
    of the stages if empty.
    """

    method: str = "ce"
    temperature: float = 3.0
    loss_weights: dict[str, float] = field(default_factory=dict)
    feature_weight: float = 0.03
    label_smoothing: float = 0.0
    literal_ce: bool = False
    triplet: Triplet = Triplet()
    init_epochs: int = -1
    student_points: tuple[str, ...] = ()
    teacher_points: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature: {self.temperature} is not above 0")
        negative = {f"loss_weights.{k}": v for k, v in self.loss_weights.items()}
        for key, value in {**negative, "feature_weight": self.feature_weight}.items():
            if value < 0:
                raise ValueError(f"{key}: {value} is negative")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: {self.label_smoothing} is not in 0..1")


@dataclass(frozen=True)
class View:
    """One network's answer to a batch.

    stages: maps (B, D_k, H_k, W_k) of the feature points, shallow to deep. preact: the same before the stage's last
    activation. pooled: (B, D), what goes into the deepest classifier. stages and preact are empty, pooled is None
    unless a method needs them.
    """

    out: Outputs
    stages: tuple[Tensor, ...] = ()
    preact: tuple[Tensor, ...] = ()
    pooled: Tensor | None = None

    def first(self, count: int) -> View:
        """The view of the batch's first `count` images, without `out.maps`, which no method looks at."""
        logits, features, stages, preact = (
            tuple(t[:count] for t in part) for part in (self.out.logits, self.out.features, self.stages, self.preact)
        )
        pooled = None if self.pooled is None else self.pooled[:count]
        return View(Outputs(logits, features, ()), stages, preact, pooled)


@dataclass(frozen=True)
class Step:
    """What a method sees of a batch: targets (B,), index (B,) into the training part, and the epoch from 0."""

    student: View
    teacher: View | None
    target: Tensor
    index: Tensor
    epoch: int

    def pooled(self) -> tuple[Tensor, Tensor]:
        """What goes into the student's and the teacher's deepest classifier, for a method that needs both."""
        assert self.teacher is not None
        assert self.student.pooled is not None
        assert self.teacher.pooled is not None
        return self.student.pooled, self.teacher.pooled.detach()

    def stages(self) -> list[tuple[Tensor, Tensor]]:
        """The student's and the teacher's map at each feature point, for a method that needs both."""
        assert self.teacher is not None
        return [(s, t.detach()) for s, t in zip(self.student.stages, self.teacher.stages)]


@dataclass(frozen=True)
class Shapes:
    """What a network's views look like, without the batch: maps (D, H, W), pooled width, number of exits."""

    stages: tuple[tuple[int, int, int], ...] = ()
    preact: tuple[tuple[int, int, int], ...] = ()
    pooled: int = 0
    exits: int = 1


@dataclass(frozen=True)
class Setting:
    """What is known before training: both networks' shapes, the training images' labels by index, and class count."""

    student: Shapes = Shapes()
    teacher: Shapes | None = None
    labels: tuple[int, ...] = ()
    classes: int = 0


class Loss(Protocol):
    """A method at work: a batch to an unweighted scalar.

    One that owns parameters is an nn.Module. It may have `init_epochs: int` and `init(step) -> Tensor`: for so many
    epochs that is the whole loss; and `expand(images) -> Tensor`: (B, 3, H, W) to more images, of which the first B
    are the given ones and all that other methods see.
    """

    def __call__(self, step: Step) -> Tensor: ...


Factory = Callable[[Settings, Setting], Loss]


@dataclass(frozen=True)
class Method:
    """A registered method.

    weight, ce_weight: of it and of cross-entropy, when nothing else is asked for; own_ce: it brings its own
    cross-entropy. needs: parts of the views. exits: it compares exits, so the student needs two or more. anchors: its
    teacher is not the finished one, but the one of that stage of the teacher's own training.
    """

    make: Factory
    weight: float = 1.0
    ce_weight: float = 1.0
    own_ce: bool = False
    teacher: bool = False
    needs: frozenset[Need] = frozenset()
    exits: bool = False
    anchors: bool = False


METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    weight: float = 1.0,
    ce_weight: float = 1.0,
    own_ce: bool = False,
    teacher: bool = False,
    needs: tuple[Need, ...] = (),
    exits: bool = False,
    anchors: bool = False,
) -> Callable[[Factory], Factory]:
    """Register a method under a name; the flags are `Method`'s.

    Raises:
        ValueError: the name is taken.
    """

    def register(factory: Factory) -> Factory:
        if name in METHODS:
            raise ValueError(f"distillation method '{name}' is registered twice")
        METHODS[name] = Method(factory, weight, ce_weight, own_ce, teacher, frozenset(needs), exits, anchors)
        return factory

    return register


def names(text: str) -> list[str]:
    """`kd+sd` as `["ce", "kd", "sd"]`; without `ce` if a part brings its own.

    Raises:
        ConfigError: an unknown or repeated name.
    """
    parts = text.split("+")
    for part in parts:
        if part not in METHODS:
            raise ConfigError(f"no distillation method '{part}' in '{text}'", fix=nearest(part, METHODS))
    if len(set(parts)) < len(parts):
        raise ConfigError(f"method '{text}' names one part twice", fix="name each once, for example kd+sd")
    if "ce" not in parts and any(METHODS[p].own_ce for p in parts):
        return parts
    return ["ce", *(p for p in parts if p != "ce")]


def needs_teacher(text: str) -> bool:
    """Whether a method named like `kd+sd` learns from a teacher."""
    return any(METHODS[name].teacher for name in names(text))


def needs_anchors(text: str) -> bool:
    """Whether a method named like `multipart` learns from the weights that a teacher kept while it trained."""
    return any(METHODS[name].anchors for name in names(text))


def needs(text: str) -> frozenset[Need]:
    """Which parts of the views a method named like `kd+at` looks at."""
    return frozenset[Need]().union(*(METHODS[name].needs for name in names(text)))


def weights(settings: Settings) -> dict[str, float]:
    """Each part's weight in the sum.

    Raises:
        ConfigError: a weight for a part that is not in the method.
    """
    parts = names(settings.method)
    found = {name: METHODS[name].weight for name in parts}
    if "ce" in found:
        found["ce"] = min(METHODS[name].ce_weight for name in parts)
    if strange := sorted(settings.loss_weights.keys() - found.keys()):
        raise ConfigError(
            f"loss_weights.{strange[0]}: method '{settings.method}' has no such part", fix=nearest(strange[0], found)
        )
    return found | settings.loss_weights
