"""Settings from TOML: files that ship with edgekd, files of the user's, and values from the command line."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from edgekd.errors import ConfigError, nearest
from edgekd.files import atomic_write
from edgekd.schema import from_dict, plain

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


T = TypeVar("T")


def load(
    cls: type[T],
    kind: str,
    name: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    flags: Mapping[str, str] | None = None,
) -> T:
    """Read the protocol, recipe, suite or device called `name` (or the TOML file at that path).

    overrides: keys that replace the file's. flags: key to the flag that gave it, where that was not `--set`.

    Raises:
        ConfigError: no such name, no TOML, or keys and values that do not fit `cls`.
    """
    path, table = find(kind, name), read_table(kind, name)
    if not overrides:
        return from_dict(cls, table, where=str(path))
    from_dict(cls, copy.deepcopy(table), where=str(path))  # what is wrong in the file itself
    for key, value in overrides.items():
        _set(table, key, value)
    try:
        return from_dict(cls, table, where="")
    except ConfigError as error:
        given = {key: _given(key, value, flags or {}) for key, value in overrides.items()}
        problems = [_blamed(line.strip(), given) for line in error.what.splitlines() if line.strip(" :")]
        raise ConfigError("\n".join(problems), fix="mend what was given") from None


def read_table(kind: str, name: str) -> dict[str, Any]:
    """Return the keys and values of a TOML file, unchecked.

    Raises:
        ConfigError: No such name, or no TOML.
    """
    path = find(kind, name)
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", fix="check the path and its rights") from None
    except ValueError as error:  # both TOMLDecodeError and UnicodeDecodeError are
        raise ConfigError(f"{path} is not TOML: {error}", fix="mend that line") from error


def _given(key: str, value: Any, flags: Mapping[str, str]) -> str:
    text = value if isinstance(value, str) else _toml(value)
    return f"{flags[key]} {text}" if key in flags else f"--set {key}={text}"


def _blamed(problem: str, given: Mapping[str, str]) -> str:
    """A problem with what was given on the command line for its key, or with all of it if none was."""
    at, _, what = problem.partition(": ")
    for key, text in given.items():
        if at == key:
            return f"{text}: {what}"
        if at.startswith((f"{key}.", f"{key}[")):
            return f"{text}: {problem}"
    return f"{', '.join(given.values())}: {problem}"


def _parsed(text: str) -> dict[str, Any]:
    """TOML, read by tomllib or, below Python 3.11, by tomli, which a bare device may lack: only TOML files need it.

    Raises:
        ValueError: no TOML, or values that no file of ours holds (see `plain`).
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        table: dict[str, Any] = tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return typing.cast(dict[str, Any], plain(table))


def _set(table: dict[str, Any], key: str, value: Any) -> None:
    """Put a value under a dotted key, `augment.hflip`."""
    head, dot, rest = key.partition(".")
    if not dot:
        table[key] = value
    elif isinstance(table.setdefault(head, {}), dict):
        _set(table[head], rest, value)
    else:
        raise ConfigError(f"'{key}': '{head}' is no table", fix=f"set {head} itself")


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["lr=0.1", "exits=[1,4]", "schedule=cosine"]` as a dict; values are TOML, bare words are strings."""
    overrides = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"--set {pair} is not key=value", fix="for example --set lr=0.05")
        try:
            overrides[key.strip()] = _parsed(f"value = {value}")["value"]
        except ValueError:
            overrides[key.strip()] = value.strip()
    return overrides


def write_toml(path: Path, spec: Any) -> None:
    """Write a dataclass (its nested ones as tables) as TOML that `load` reads back."""
    values = {k: v for k, v in dataclasses.asdict(spec).items() if v is not None}
    lines = [f"{k} = {_toml(v)}" for k, v in values.items() if not isinstance(v, dict)]
    for name, table in values.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]", *(f"{_key(k)} = {_toml(v)}" for k, v in table.items() if v is not None)]
    atomic_write(path, ("\n".join(lines) + "\n").encode())


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's escapes are JSON's
    return repr(value)
