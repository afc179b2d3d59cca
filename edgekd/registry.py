"""Named implementations: edgekd's own, and those that installed packages offer through entry points."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, cast

from edgekd.errors import ConfigError, nearest

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Maps names to implementations of one kind, each imported when first asked for.

    A package adds one by an entry point in the group `edgekd.<group>`, for example in its pyproject.toml:

        [project.entry-points."edgekd.backends"]
        mine = "my_package.backend:MyBackend"

    Args:
        kind: What errors call an entry, for example `backend`.
        group: The entry-point group without `edgekd.`.
        base: The class that entries are instances of, or that they subclass if they are classes.
        builtin: Name to `module:attribute` of edgekd's own.
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
            ConfigError: The name is unknown (the nearest is given), or a package offers something that cannot be used.
        """
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._builtin
        yield from self._offered

    def __len__(self) -> int:
        return len(self._builtin) + len(self._offered)

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in self._offered

    @functools.cached_property
    def _offered(self) -> dict[str, EntryPoint]:
        """Entry points by name, sorted; edgekd's own names cannot be taken."""
        found: dict[str, EntryPoint] = {}
        for point in sorted(entry_points(group=self.group)):
            if point.name in self._builtin or point.name in found:
                other = found[point.name].value if point.name in found else "edgekd's own"
                raise ConfigError(
                    f"two packages offer the {self.kind} '{point.name}': {point.value} and {other}",
                    fix="uninstall one of them",
                )
            found[point.name] = point
        return found

    def _load(self, name: str) -> T:
        if name in self._builtin:
            module, _, attribute = self._builtin[name].partition(":")
            return cast(T, getattr(importlib.import_module(module), attribute))
        if name not in self._offered:
            raise ConfigError(f"no {self.kind} '{name}'", fix=nearest(name, self))
        point = self._offered[name]
        package = point.dist.name if point.dist else point.module
        try:
            value = point.load()
        except Exception as error:  # whatever importing foreign code raises
            what = f"the {self.kind} '{name}' of {package} cannot be imported: {type(error).__name__}: {error}"
            raise ConfigError(what, fix=f"mend or uninstall {package}") from error
        if not (isinstance(value, self._base) or (isinstance(value, type) and issubclass(value, self._base))):
            what = f"the {self.kind} '{name}' of {package} is no {self._base.__name__}: {point.value}"
            raise ConfigError(what, fix=f"mend or uninstall {package}")
        return cast(T, value)
