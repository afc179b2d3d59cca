"""Everything edgekd raises on purpose.

EdgekdError            what, where, and what to do; the CLI prints it without a traceback
├── ConfigError        a flag, protocol, recipe or suite that cannot be
├── DataError          images, folders and splits
├── ArtifactError      a run folder, student.onnx, engine or record: missing, foreign, edited, half-written
├── TrainingError      a run that cannot go on (NaN, wrong teacher)
├── BackendError       an engine that cannot be built or run here
└── GateError          an engine or export that is not as exact as was asked
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgekdError(Exception):
    """Base of all. `what` happened (with where), and `fix`: what to do about it."""

    def __init__(self, what: str, *, fix: str = "") -> None:
        super().__init__(f"{what}\n{fix}" if fix else what)
        self.what = what
        self.fix = fix


class ConfigError(EdgekdError):
    """A flag, protocol, recipe, suite or device that cannot be."""


class DataError(EdgekdError):
    """Images, folders and splits that cannot be used."""


class ArtifactError(EdgekdError):
    """A run folder, student.onnx, engine or record that is missing, foreign, edited or half-written."""


class TrainingError(EdgekdError):
    """A training run that cannot go on."""


class BackendError(EdgekdError):
    """An engine that cannot be built or run on this machine."""


class GateError(EdgekdError):
    """An export or engine that is further from its source than was allowed."""


def closest(name: str, known: Iterable[str]) -> str:
    """`Did you mean 'a'?` for an error's fix where all that is known would be too long; empty if nothing is near."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"Did you mean '{close[0]}'?" if close else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """`known: a, b. Did you mean 'a'?` for an error's fix."""
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
