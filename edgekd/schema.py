"""Frozen dataclasses from parsed TOML and JSON; every unknown key, wrong type and bad value is reported at once."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import types
import typing
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from edgekd.errors import ConfigError, EdgekdError, closest, nearest

T = TypeVar("T")
MANY = 20
"""Largest number of problems that an error lists."""
DEPTH = 50
"""Largest nesting depth of lists and tables: more than any artefact has, less than Python's recursion limit."""
_TABLES = "tables"
TABLES = {_TABLES: None}
"""Metadata of a `dict` field that takes, unchanged, the tables whose keys are not fields of the dataclass."""


def parse_json(text: str) -> Any:
    """Parse JSON strictly: no NaN, no duplicate keys, nothing that `plain` rejects.

    Raises:
        ValueError: The text is not valid JSON in this sense.
    """
    try:
        return plain(json.loads(text, object_pairs_hook=_unique))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {reprlib.repr(twice)} occurs twice")
    return table


def plain(tree: Any) -> Any:
    """Return parsed TOML or JSON unchanged after checking that it contains only ordinary values.

    Raises:
        ValueError: NaN, an infinity, an integer of more than 64 bits, text with surrogates or NUL, or deep nesting.
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
                raise ValueError(f"{reprlib.repr(value)} is not valid text")
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{value} is not a finite number")
            elif isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ValueError("an integer of more than 64 bits")
        if not below:
            return tree
        level = below
    raise ValueError("nested too deeply")


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def from_dict(
    cls: type[T], table: Mapping[str, Any], *, where: str, at: str = "", error: type[EdgekdError] = ConfigError
) -> T:
    """Build the frozen dataclass `cls` from a table.

    Fields may be bool, int, float, str, Path, Literal, tuples, dicts, unions, and nested dataclasses; see `TABLES` and
    `option_tables` for tables that are not fields.

    Args:
        cls: The dataclass.
        table: Parsed TOML or JSON.
        where: Name of the source in errors.
        at: Prefix of the keys in errors.
        error: Type of the error.

    Raises:
        ConfigError (or `error`): every unknown or missing key and every wrong value, in one message.
    """
    problems: list[str] = []
    value = _dataclass(cls, table, at, problems)
    if problems:
        more = [f"  and {len(problems) - MANY} more"] if len(problems) > MANY else []
        raise error("\n".join([f"{where}:", *(f"  {p}" for p in problems[:MANY]), *more]), fix="correct these keys")
    return typing.cast(T, value)


def option_tables(registry: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata of a `dict` field from names of a registry's entries to their options.

    In TOML each entry has a table of its own beside the other keys, for example `[hybrid]`. It is read strictly into
    the dataclass `registry[name].options`; only tables that are given are in the dict.
    """
    return {_TABLES: registry}


def to_table(spec: Any) -> dict[str, Any]:
    """Return a dataclass as the table from which `from_dict` builds it; None, which TOML lacks, is omitted."""
    values = {k: v for k, v in dataclasses.asdict(spec).items() if v is not None}
    for field in dataclasses.fields(spec):
        if _TABLES in field.metadata:
            values |= values.pop(field.name)
    return values


def _dataclass(cls: Any, table: Any, at: str, problems: list[str]) -> Any:
    if not isinstance(table, Mapping):
        return problems.append(f"{at or 'the file'}: expected a table, found {reprlib.repr(table)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    before = len(problems)
    table = _with_tables(table, fields)
    known = [*fields, *(name for field in fields.values() for name in field.metadata.get(_TABLES) or ())]
    for key in table.keys() - fields.keys():
        problems.append(f"{at}{key}: unknown key; {nearest(key, known)}")
    values = {}
    for key, field in fields.items():
        if key in table and field.metadata.get(_TABLES):
            values[key] = _options(field.metadata[_TABLES], table[key], known, at, problems)
        elif key in table:
            values[key] = _value(hints[key], table[key], f"{at}{key}", problems)
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


def _with_tables(table: Mapping[str, Any], fields: Mapping[str, dataclasses.Field[Any]]) -> Mapping[str, Any]:
    """Return the table with the inner tables that are not fields moved into the field for them, if there is one."""
    name = next((name for name, field in fields.items() if _TABLES in field.metadata), None)
    moved = {k: v for k, v in table.items() if k not in fields and isinstance(v, Mapping)} if name else {}
    if name is None or not moved or not isinstance(table.get(name, {}), Mapping):
        return table
    return {**{k: v for k, v in table.items() if k not in moved}, name: {**table.get(name, {}), **moved}}


def _options(registry: Mapping[str, Any], tables: Any, known: Collection[str], at: str, problems: list[str]) -> Any:
    if not isinstance(tables, Mapping):
        return problems.append(f"{at}: expected a table for each entry, found {reprlib.repr(tables)}")
    for key in tables.keys() - registry.keys():
        problems.append(f"{at}{key}: unknown key; {nearest(key, known)}")
    given = [key for key in tables if key in registry]
    return {key: _dataclass(registry[key].options, tables[key], f"{at}{key}.", problems) for key in given}


def _value(hint: Any, value: Any, at: str, problems: list[str]) -> Any:
    """Convert a parsed value to the type `hint`; what does not fit is added to `problems`, with its key `at`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _union(args, value, at, problems)
    if origin is Literal:
        return _literal(args, value, at, problems)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, f"{at}.", problems)
    if origin is tuple and isinstance(value, (list, tuple)):
        return _tuple(args, value, at, problems)
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _value(args[1], v, f"{at}.{k}", problems) for k, v in value.items()}
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and _is_scalar(hint, value):
        return float(value) if hint is float else value
    return problems.append(f"{at}: expected {_name(hint)}, found {reprlib.repr(value)}")


def _is_scalar(hint: type, value: Any) -> bool:
    """Return True if `value` is a `hint`. An integer is also a float; a bool is nothing but a bool."""
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _literal(known: tuple[Any, ...], value: Any, at: str, problems: list[str]) -> Any:
    if value in known:
        return value
    near = closest(value, map(str, known)) if isinstance(value, str) else ""
    names = ", ".join(map(str, known)) + (f". {near}" if near else "")
    return problems.append(f"{at}: {reprlib.repr(value)} is none of {names}")


def _tuple(hints: tuple[Any, ...], values: Sequence[Any], at: str, problems: list[str]) -> Any:
    each = [hints[0]] * len(values) if hints[-1] is Ellipsis else list(hints)
    if len(each) != len(values):
        return problems.append(f"{at}: expected {len(each)} values, found {len(values)}")
    return tuple(_value(h, v, f"{at}[{i}]", problems) for i, (h, v) in enumerate(zip(each, values)))


def _union(hints: tuple[Any, ...], value: Any, at: str, problems: list[str]) -> Any:
    """Convert to the first type of a union that accepts the value."""
    hints = tuple(hint for hint in hints if hint is not type(None) or value is None)
    for hint in hints:
        unfit: list[str] = []
        converted = _value(hint, value, at, unfit)
        if not unfit:
            return converted
    if len(hints) == 1:  # an optional value: report the faults inside it
        return problems.extend(unfit)
    return problems.append(f"{at}: expected {' or '.join(map(_name, hints))}, found {reprlib.repr(value)}")


def _name(hint: Any) -> str:
    return "a list" if typing.get_origin(hint) is tuple else getattr(hint, "__name__", str(hint))
