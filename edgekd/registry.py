"""Named implementations: edgekd's own, and those that installed packages provide through entry points."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, cast

from edgekd.errors import ConfigError, nearest

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Maps names to implementations of one kind; each is imported on first use.

    A package adds one with an entry point in the group `edgekd.<group>`, in its pyproject.toml:

        [project.entry-points."edgekd.backends"]
        mine = "my_package.backend:MyBackend"

    Args:
        kind: Name of the kind in errors, for example `backend`.
        group: Entry-point group without `edgekd.`.
        base: Class that the entries are instances or subclasses of.
        builtin: edgekd's own entries, from name to `module:attribute`.
    """

    def __init__(self, kind: str, group: str, base: type, builtin: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = f"edgekd.{group}"
        self._base = base
        self._builtin = dict(builtin)
        self._loaded: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        """Return the implementation called `name`.

        Raises:
            ConfigError: The name is unknown (the message has the nearest), or the package's entry is unusable.
        """
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._builtin
        yield from self._entry_points

    def __len__(self) -> int:
        return len(self._builtin) + len(self._entry_points)

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in self._entry_points

    @functools.cached_property
    def _entry_points(self) -> dict[str, EntryPoint]:
        """Entry points by name, sorted.

        Raises:
            ConfigError: Two packages provide the same name, or one provides a name of edgekd's own.
        """
        found: dict[str, EntryPoint] = {}
        for point in sorted(entry_points(group=self.group)):
            if point.name in self._builtin or point.name in found:
                other = found[point.name].value if point.name in found else "edgekd's own"
                raise ConfigError(
                    f"two packages provide the {self.kind} '{point.name}': {point.value} and {other}",
                    fix="uninstall one of them",
                )
            found[point.name] = point
        return found

    def _load(self, name: str) -> T:
        if name in self._builtin:
            module, _, attribute = self._builtin[name].partition(":")
            return cast(T, getattr(importlib.import_module(module), attribute))
        if name not in self._entry_points:
            raise ConfigError(f"no {self.kind} '{name}'", fix=nearest(name, self))
        point = self._entry_points[name]
        package = point.dist.name if point.dist else point.module
        try:
            value = point.load()
        except Exception as error:  # importing foreign code may raise anything
            what = f"the {self.kind} '{name}' of {package} cannot be imported: {type(error).__name__}: {error}"
            raise ConfigError(what, fix=f"repair or uninstall {package}") from error
        if not (isinstance(value, self._base) or (isinstance(value, type) and issubclass(value, self._base))):
            what = f"the {self.kind} '{name}' of {package} is not a {self._base.__name__}: {point.value}"
            raise ConfigError(what, fix=f"repair or uninstall {package}")
        return cast(T, value)
