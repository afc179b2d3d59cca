"""Frozen dataclasses from parsed TOML and JSON: unknown keys, wrong types and bad values are errors, all at once."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import types
import typing
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from edgekd.errors import ConfigError, EdgekdError, closest, nearest

T = TypeVar("T")
MANY = 20
"""Problems that an error lists."""
DEPTH = 50
"""Lists and tables inside each other that are read, far more than any file has and far fewer than Python can."""


def parse_json(text: str) -> Any:
    """JSON as its standard has it: no NaN, no key twice, nothing that `plain` refuses.

    Raises:
        ValueError: it is not.
    """
    try:
        return plain(json.loads(text, object_pairs_hook=_unique))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {reprlib.repr(twice)} is there twice")
    return table


def plain(tree: Any) -> Any:
    """The tree, if a program that trusts what it reads can take it.

    Raises:
        ValueError: NaN, an infinity, an integer beyond 64 bits, text that is no Unicode or holds NUL, or deep nesting.
    """
    level = [tree]
    for _ in range(DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.keys()
                below += value.values()
            elif isinstance(value, (list, tuple)):
                below += value
            elif isinstance(value, str) and ("\0" in value or (not value.isascii() and _has_surrogates(value))):
                raise ValueError(f"{reprlib.repr(value)} is no text")
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{value} is no number")
            elif isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ValueError("a number of more than 64 bits")
        if not below:
            return tree
        level = below
    raise ValueError("nested too deeply")


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def from_dict(cls: type[T], table: Mapping[str, Any], *, where: str, error: type[EdgekdError] = ConfigError) -> T:
    """Build the frozen dataclass `cls` from a table; `where` names its source in errors.

    Fields may be bool, int, float, str, Path, Literal, tuples, dicts, unions, and nested dataclasses.

    Raises:
        ConfigError (or `error`): every unknown or missing key and every wrong value, in one message.
    """
    problems: list[str] = []
    value = _dataclass(cls, table, "", problems)
    if problems:
        more = [f"  and {len(problems) - MANY} more"] if len(problems) > MANY else []
        raise error("\n".join([f"{where}:", *(f"  {p}" for p in problems[:MANY]), *more]), fix="mend these keys")
    return typing.cast(T, value)


def _dataclass(cls: Any, table: Any, at: str, problems: list[str]) -> Any:
    if not isinstance(table, Mapping):
        return problems.append(f"{at or 'the file'}: expected a table, found {reprlib.repr(table)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    before = len(problems)
    for key in table.keys() - fields.keys():
        problems.append(f"{at}{key}: unknown key; {nearest(key, fields)}")
    values = {k: _value(hints[k], table[k], f"{at}{k}", problems) for k in fields if k in table}
    for key, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if key not in table and no_default:
            problems.append(f"{at}{key}: missing")
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        return problems.append(f"{at}{error}")


def _value(hint: Any, value: Any, at: str, problems: list[str]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _any_of(args, value, at, problems)
    if origin is Literal:
        if value in args:
            return value
        near = closest(value, map(str, args)) if isinstance(value, str) else ""
        known = ", ".join(map(str, args)) + (f". {near}" if near else "")
        return problems.append(f"{at}: {reprlib.repr(value)} is none of {known}")
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, f"{at}.", problems)
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(inner) != len(value):
            return problems.append(f"{at}: expected {len(inner)} values, found {len(value)}")
        return tuple(_value(h, v, f"{at}[{i}]", problems) for i, (h, v) in enumerate(zip(inner, value)))
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _value(args[1], v, f"{at}.{k}", problems) for k, v in value.items()}
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    return problems.append(f"{at}: expected {_name(hint)}, found {reprlib.repr(value)}")


def _any_of(arms: tuple[Any, ...], value: Any, at: str, problems: list[str]) -> Any:
    """The value as the first of a union's types that takes it."""
    arms = tuple(arm for arm in arms if arm is not type(None) or value is None)
    for arm in arms:
        found: list[str] = []
        fitting = _value(arm, value, at, found)
        if not found:
            return fitting
    if len(arms) == 1:  # an optional value: what is wrong inside it
        return problems.extend(found)
    return problems.append(f"{at}: expected {' or '.join(map(_name, arms))}, found {reprlib.repr(value)}")


def _name(hint: Any) -> str:
    return "a list" if typing.get_origin(hint) is tuple else getattr(hint, "__name__", str(hint))
