"""JSON artefacts: checked reading, the schema's version, and files that carry their own SHA-256."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from edgekd.errors import ArtifactError, ConfigError
from edgekd.schema import from_dict, parse_json

SCHEMA = 1
Fact: TypeAlias = str | bool | int | float | tuple[str | bool | int | float | None, ...] | None
"""A value of a flat table."""
T = TypeVar("T")


def read_bytes(path: Path, *, what: str, fix: str = "check the path") -> bytes:
    """A file's content.

    Raises:
        ArtifactError: missing, a folder, or not to be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"no {what} at {path}", fix=fix) from None
    except OSError as error:
        what = f"{path} cannot be read: {error.strerror}"
        raise ArtifactError(what, fix="check the path and its rights") from None


def read_json(path: Path, cls: type[T], *, what: str) -> T:
    """Read a dataclass from JSON.

    Raises:
        ArtifactError: missing, not JSON, another schema, or not a `what`.
    """
    data = read_bytes(path, what=what)
    try:
        table = parse_json(data.decode())
    except ValueError as error:
        raise ArtifactError(f"{path} is no {what}: {error}", fix="make it again") from None
    return from_table(cls, table, where=f"{path} is no {what} that this edgekd reads")


def from_table(cls: type[T], table: Any, *, where: str) -> T:
    """A dataclass from parsed JSON of our schema.

    Raises:
        ArtifactError: another schema, or keys and values that do not fit.
    """
    if isinstance(table, dict) and table.get("schema", SCHEMA) != SCHEMA:
        found = reprlib.repr(table["schema"])
        raise ArtifactError(f"{where}: schema {found}, known: {SCHEMA}", fix="use the edgekd that wrote it")
    try:
        return from_dict(cls, table, where=where)
    except ConfigError as error:
        raise ArtifactError(error.what, fix="make it again, or use the edgekd version that wrote it") from None


BLANK = "edgekd-sha256".ljust(64, "_")
"""What stands for a file's SHA-256 while it is computed."""


def seal(data: bytes) -> str:
    """The SHA-256 of a serialised file that holds `BLANK` where it will be written."""
    return _digest_with_blank(data, BLANK)


def check_seal(data: bytes, digest: str, *, path: Path, fix: str) -> None:
    """Whether a file is, to the last bit, the one that its `digest` was written into.

    Raises:
        ArtifactError: it has none or was changed.
    """
    if not digest:
        raise ArtifactError(f"{path} carries no SHA-256: an earlier edgekd wrote it", fix=fix)
    if data.count(digest.encode()) != 1 or _digest_with_blank(data, digest) != digest:
        raise ArtifactError(f"{path} is not what was written: its SHA-256 differs", fix=fix)


def _digest_with_blank(data: bytes, written: str) -> str:
    at = data.index(written.encode())
    digest = hashlib.sha256(memoryview(data)[:at])
    digest.update(BLANK.encode())
    digest.update(memoryview(data)[at + len(written) :])
    return digest.hexdigest()


def to_json(value: Any) -> bytes:
    """Indented JSON of a dataclass or dict."""
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    return (json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Fact]:
    """Flatten nested tables, as records keep what other versions of edgekd may name otherwise.

    Args:
        tree: Tables of values and lists of values.
        prefix: Put before each key.

    Returns:
        The keys joined by dots, and their values.
    """
    found: dict[str, Fact] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = tuple(value) if isinstance(value, list) else value
    return found
