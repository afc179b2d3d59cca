"""Where the TOML files that users copy and change are: beside the checkout, or inside the wheel."""

from __future__ import annotations

from pathlib import Path

from edgekd.errors import ConfigError, nearest

_PACKAGE = Path(__file__).resolve().parent
_INSIDE = {"protocols": "training/protocols", "papers": "reproduce/tables"}


def folder(kind: str) -> Path:
    """The folder of shipped TOML files: `compile`, `devices`, `benchmarks/suites`, `protocols` or `papers`."""
    if kind in _INSIDE:
        return _PACKAGE / _INSIDE[kind]
    wheel = _PACKAGE / "_data" / kind
    return wheel if wheel.is_dir() else _PACKAGE.parent / kind


def names(kind: str) -> list[str]:
    """The shipped names of one kind, sorted."""
    return sorted(path.stem for path in folder(kind).glob("*.toml"))


def find(kind: str, name: str) -> Path:
    """The TOML file that `name` means: a path that exists, else a shipped name.

    Raises:
        ConfigError: neither; the known names and the nearest are given.
    """
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        return path
    shipped = folder(kind) / f"{name}.toml"
    if shipped.is_file():
        return shipped
    raise ConfigError(f"no '{name}' in {kind}/", fix=nearest(name, names(kind)) + " A path to a .toml file works too.")
