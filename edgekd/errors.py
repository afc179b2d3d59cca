"""The errors that edgekd raises on purpose.

EdgekdError            what, where, and what to do; the CLI prints it without a traceback
├── ConfigError        an invalid flag, protocol, recipe or suite
├── DataError          unusable images, folders or splits
├── ArtifactError      a run folder, student.onnx, engine or record that is missing, foreign, edited or incomplete
├── TrainingError      a run that cannot continue (NaN, wrong teacher)
├── BackendError       an engine that cannot be built or run here
└── GateError          an engine or export outside the requested tolerance
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgekdError(Exception):
    """Base class.

    Attributes:
        what: What happened, and where.
        fix: What to do about it.
    """

    def __init__(self, what: str, *, fix: str = "") -> None:
        super().__init__(f"{what}\n{fix}" if fix else what)
        self.what = what
        self.fix = fix


class ConfigError(EdgekdError):
    """An invalid flag, protocol, recipe, suite or device."""


class DataError(EdgekdError):
    """Unusable images, folders or splits."""


class ArtifactError(EdgekdError):
    """A run folder, student.onnx, engine or record that is missing, foreign, edited or incomplete."""


class TrainingError(EdgekdError):
    """A training run that cannot continue."""


class BackendError(EdgekdError):
    """An engine that cannot be built or run on this machine."""


class GateError(EdgekdError):
    """An export or engine that deviates from its source by more than the tolerance."""


def closest(name: str, known: Iterable[str]) -> str:
    """Return `Did you mean 'a'?` with the nearest known name, or an empty text if none is similar."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"Did you mean '{close[0]}'?" if close else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `known: a, b. Did you mean 'a'?` for an error's fix."""
    known = sorted(known)
    return f"known: {', '.join(known)}. {closest(name, known)}".rstrip()


def check_known(what: str, value: str, known: Iterable[str]) -> None:
    """Check that a value is one of the known names.

    Args:
        what: The option or key, for the error.
        value: The given value.
        known: Its valid values.

    Raises:
        ConfigError: It is not; the message lists the known values and the nearest.
    """
    known = tuple(known)
    if value not in known:
        raise ConfigError(f"unknown {what} '{value}'", fix=nearest(value, known))
