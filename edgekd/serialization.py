"""JSON artefacts: validated reading, schema version, and files that contain their own SHA-256."""

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
    """Read a file.

    Args:
        path: The file.
        what: Name of its kind in errors.
        fix: What to do if it is missing.

    Raises:
        ArtifactError: The file is missing, a folder, or not readable.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"no {what} at {path}", fix=fix) from None
    except OSError as error:
        what = f"{path} cannot be read: {error.strerror}"
        raise ArtifactError(what, fix="check the path and its permissions") from None


def read_json(path: Path, cls: type[T], *, what: str) -> T:
    """Read a dataclass from a JSON file.

    Args:
        path: The file.
        cls: The dataclass.
        what: Name of its kind in errors.

    Raises:
        ArtifactError: The file is missing, is not JSON, has another schema version, or does not fit the dataclass.
    """
    return from_table(cls, read_table(path, what=what), where=f"{path} is not a {what} that this edgekd can read")


def read_table(path: Path, *, what: str) -> Any:
    """Read and parse a JSON file.

    Args:
        path: The file.
        what: Name of its kind in errors.

    Raises:
        ArtifactError: The file is missing or is not JSON.
    """
    data = read_bytes(path, what=what)
    try:
        return parse_json(data.decode())
    except ValueError as error:
        raise ArtifactError(f"{path} is not a valid {what}: {error}", fix="create it again") from None


def from_table(cls: type[T], table: Any, *, where: str) -> T:
    """Build a dataclass from parsed JSON after checking the schema version.

    Args:
        cls: The dataclass.
        table: The parsed JSON.
        where: Start of the error message, with the name of the source.

    Raises:
        ArtifactError: Another schema version, or keys and values that do not fit.
    """
    if isinstance(table, dict) and table.get("schema", SCHEMA) != SCHEMA:
        found = reprlib.repr(table["schema"])
        raise ArtifactError(f"{where}: schema {found}, known: {SCHEMA}", fix="use the edgekd version that wrote it")
    try:
        return from_dict(cls, table, where=where)
    except ConfigError as error:
        raise ArtifactError(error.what, fix="create it again, or use the edgekd version that wrote it") from None


BLANK = "edgekd-sha256".ljust(64, "_")
"""Placeholder of a file's SHA-256 while the digest is computed."""


def seal(data: bytes) -> str:
    """Compute the SHA-256 of a serialised file that contains `BLANK` in the digest's place."""
    return _digest_with_blank(data, BLANK)


def check_seal(data: bytes, digest: str, *, path: Path, fix: str) -> None:
    """Check a file against the digest that it contains.

    Args:
        data: Content of the file.
        digest: The digest read from it.
        path: Its path, for errors.
        fix: What to do if it differs.

    Raises:
        ArtifactError: The digest is missing, or the file was changed.
    """
    if not digest:
        raise ArtifactError(f"{path} has no SHA-256: an earlier edgekd wrote it", fix=fix)
    if data.count(digest.encode()) != 1 or _digest_with_blank(data, digest) != digest:
        raise ArtifactError(f"{path} was changed after it was written: its SHA-256 differs", fix=fix)


def _digest_with_blank(data: bytes, written: str) -> str:
    at = data.index(written.encode())
    digest = hashlib.sha256(memoryview(data)[:at])
    digest.update(BLANK.encode())
    digest.update(memoryview(data)[at + len(written) :])
    return digest.hexdigest()


def to_json(value: Any) -> bytes:
    """Serialise a dataclass or dict as indented JSON."""
    tree = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    return (json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Fact]:
    """Flatten nested tables, as records keep what other versions of edgekd may name otherwise.

    Args:
        tree: Tables of values and lists; of a list of tables or lists, the index of each is a key.
        prefix: Put before each key.

    Returns:
        The keys joined by dots, and their values.
    """
    found: dict[str, Fact] = {}
    for key, value in tree.items():
        if isinstance(value, (list, tuple)) and any(isinstance(v, (Mapping, list, tuple)) for v in value):
            value = {str(i): v for i, v in enumerate(value)}
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = tuple(value) if isinstance(value, list) else value
    return found
