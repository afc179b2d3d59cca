"""Settings from TOML: files shipped with edgekd, files of the user, and values from the command line."""

from __future__ import annotations

import copy
import json
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from edgekd.errors import ConfigError, nearest
from edgekd.files import atomic_write
from edgekd.schema import from_dict, plain, to_table

_PACKAGE = Path(__file__).resolve().parent
_INSIDE = {"protocols": "training/protocols", "papers": "reproduce/tables"}


def folder(kind: str) -> Path:
    """Return the folder of the shipped TOML files of one kind.

    Args:
        kind: `compile`, `devices`, `benchmarks/suites`, `protocols` or `papers`.
    """
    if kind in _INSIDE:
        return _PACKAGE / _INSIDE[kind]
    wheel = _PACKAGE / "_data" / kind
    return wheel if wheel.is_dir() else _PACKAGE.parent / kind


def names(kind: str) -> list[str]:
    """List the shipped names of one kind, sorted."""
    return sorted(path.stem for path in folder(kind).glob("*.toml"))


def find(kind: str, name: str) -> Path:
    """Find a TOML file by its path or its shipped name.

    Raises:
        ConfigError: Neither exists; the message lists the known names and the nearest.
    """
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        return path
    shipped = folder(kind) / f"{name}.toml"
    if shipped.is_file():
        return shipped
    raise ConfigError(
        f"no '{name}' in {kind}/", fix=nearest(name, names(kind)) + " A path to a .toml file is accepted, too."
    )


T = TypeVar("T")


def load(
    cls: type[T],
    kind: str,
    name: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    flags: Mapping[str, str] | None = None,
    check: Callable[[T, str], None] = lambda value, where: None,
) -> T:
    """Read the protocol, recipe, suite or device called `name` (or the TOML file at that path).

    Args:
        cls: The dataclass of its settings.
        kind: See `folder`.
        name: Shipped name or path.
        overrides: Values that replace the file's, by dotted key.
        flags: The flag that gave each of them, where that was not `--set`.
        check: Called with the result and the name of its source; may raise ConfigError in the form of `from_dict`.

    Raises:
        ConfigError: Unknown name, invalid TOML, or keys and values that do not fit `cls`.
    """
    path, table = find(kind, name), read_table(kind, name)

    def read(where: str) -> T:
        value = from_dict(cls, copy.deepcopy(table), where=where)
        check(value, where)
        return value

    found = read(str(path))  # faults of the file itself
    if not overrides:
        return found
    for key, value in overrides.items():
        _set(table, key, copy.deepcopy(value))
    try:
        return read("")
    except ConfigError as error:
        given = {key: _given(key, value, flags or {}) for key, value in overrides.items()}
        problems = [_blamed(line.strip(), given) for line in error.what.splitlines() if line.strip(" :")]
        raise ConfigError("\n".join(problems), fix="correct these values") from None


def read_table(kind: str, name: str) -> dict[str, Any]:
    """Read a TOML file without checking its keys.

    Raises:
        ConfigError: Unknown name, or invalid TOML.
    """
    path = find(kind, name)
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        what = f"{path} cannot be read: {error.strerror}"
        raise ConfigError(what, fix="check the path and its permissions") from None
    except ValueError as error:  # both TOMLDecodeError and UnicodeDecodeError are
        raise ConfigError(f"{path} is not TOML: {error}", fix="correct that line") from error


def _given(key: str, value: Any, flags: Mapping[str, str]) -> str:
    text = value if isinstance(value, str) else _toml(value)
    return f"{flags[key]} {text}" if key in flags else f"--set {key}={text}"


def _blamed(problem: str, given: Mapping[str, str]) -> str:
    """Attribute a problem to the command-line value of its key, or to all of them if its key was not given."""
    at, _, what = problem.partition(": ")
    for key, text in given.items():
        if at == key:
            return f"{text}: {what}"
        if at.startswith((f"{key}.", f"{key}[")):
            return f"{text}: {problem}"
    return f"{', '.join(given.values())}: {problem}"


def _parsed(text: str) -> dict[str, Any]:
    """Parse TOML with tomllib or, before Python 3.11, with tomli, which is imported only when a file is read.

    Raises:
        ValueError: The text is not TOML, or has values that `plain` rejects.
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
    """Set the value of a dotted key such as `augment.hflip`."""
    head, dot, rest = key.partition(".")
    if not dot:
        table[key] = value
    elif isinstance(table.setdefault(head, {}), dict):
        _set(table[head], rest, value)
    else:
        raise ConfigError(f"'{key}': '{head}' is not a table", fix=f"set {head} itself")


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse `["lr=0.1", "exits=[1,4]", "schedule=step"]` to a dict; values are TOML, bare words are strings.

    Raises:
        ConfigError: A pair without key or equals sign.
    """
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
    """Write a dataclass as TOML that `load` can read; nested dataclasses become tables."""
    values = to_table(spec)
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
