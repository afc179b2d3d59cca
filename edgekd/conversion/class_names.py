"""Names of a trained classifier's classes, from a file, from the network's own metadata, or numbered."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from edgekd.errors import ConfigError
from edgekd.schema import parse_json, plain
from edgekd.serialization import read_bytes

MAX_FILE = 64 << 20
"""Largest file of class names in bytes."""


def class_names(
    model: onnx.ModelProto, count: int, given: Path | Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the classes in the order of the logits.

    Args:
        model: The network; its `names` (Ultralytics) or `classes` in `metadata_props` are used where none are given.
        count: Number of its classes.
        given: Names, or a file: one name a line, or JSON (a list, an object from index to name, or Hugging Face's
            `config.json` with `id2label`).

    Returns:
        The names, and remarks for the user.

    Raises:
        ConfigError: Another number of names than of classes, or a file that holds none.
        ArtifactError: The file is missing.
    """
    notes: list[str] = []
    if isinstance(given, Path):
        names, source = read_class_names(given), str(given)
    elif given is not None:
        names, source = list(given), "the list of classes"
    elif (own := _own_names(model)) is not None:
        names, source = own, "the network's metadata"
        notes.append(f"class names are those of the network's metadata: {names[0]}, …, {names[-1]}")
    else:
        names, source = [f"class_{i}" for i in range(count)], ""
        notes.append(f"no class names are given: the {count} classes are called class_0, class_1, … (--classes)")
    if len(names) != count:
        more = "; a class for the background may be missing or too many" if abs(len(names) - count) == 1 else ""
        raise ConfigError(
            f"{source} has {len(names)} class names, the network {count} classes{more}",
            fix="give the names in the order of the network's outputs with --classes",
        )
    if twice := {name for name, times in Counter(names).items() if times > 1}:
        names = [f"{name} ({i})" if name in twice else name for i, name in enumerate(names)]
        notes.append(f"class names that occur twice have their index added: {', '.join(sorted(twice)[:3])}")
    if len(set(names)) != len(names) or not all(names):
        raise ConfigError(f"{source} has empty or repeated class names", fix="give each class a name of its own")
    return tuple(names), tuple(notes)


def read_class_names(path: Path) -> list[str]:
    """Read class names from a text or JSON file; see `class_names`.

    Raises:
        ConfigError: It holds no list of names.
        ArtifactError: It is missing.
    """
    data = read_bytes(path, what="file of class names")
    try:
        if len(data) > MAX_FILE:
            raise ValueError(f"{len(data) >> 20} MiB")
        text = data.decode("utf-8-sig")
        if path.suffix != ".json":
            names = [line.strip() for line in plain(text).strip().splitlines()]
            if not names:
                raise ValueError("it is empty")
            return names
        table = parse_json(text)
        if isinstance(table, dict):
            table = next((table[key] for key in ("id2label", "label_names", "classes", "names") if key in table), table)
        return _in_order(table)
    except ValueError as error:
        raise ConfigError(
            f"{path} holds no class names: {error}",
            fix='give one name a line, or JSON: ["cat", "dog"], {"0": "cat", "1": "dog"}, or config.json with id2label',
        ) from None


def _own_names(model: onnx.ModelProto) -> list[str] | None:
    """Return the names in the model's metadata: a Python dict or JSON as text."""
    for entry in model.metadata_props:
        if entry.key in ("names", "classes", "id2label", "labels"):
            try:
                return _in_order(ast.literal_eval(entry.value))
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
    return None


def _in_order(table: Any) -> list[str]:
    if isinstance(table, dict):
        try:
            by_index = {int(key): value for key, value in table.items()}
        except (TypeError, ValueError):
            raise ValueError("its keys are not the indices of classes") from None
        if sorted(by_index) != list(range(len(table))):
            raise ValueError(f"its indices are not 0 … {len(table) - 1}")
        table = [by_index[i] for i in range(len(table))]
    if not isinstance(table, (list, tuple)) or not table or not all(isinstance(name, str) for name in table):
        raise ValueError("neither a list of names nor names by index")
    return [name.strip() for name in table]
