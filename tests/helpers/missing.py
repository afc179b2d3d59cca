"""Modules that a child process does not find, as if they were not installed."""

from __future__ import annotations

from collections.abc import Iterable


def hide(modules: Iterable[str]) -> str:
    """Return Python statements that hide modules. A None in `sys.modules` would do, but SciPy looks in there."""
    return (
        "from importlib.machinery import PathFinder; find = PathFinder.find_spec; PathFinder.find_spec = classmethod("
        f"lambda cls, name, *rest: None if name.split('.')[0] in {sorted(modules)!r} else find(name, *rest)); "
    )
