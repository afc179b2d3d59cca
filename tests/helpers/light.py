"""Which tests run where torch and its kin are not installed, told from what they import.

Where a package of one of edgekd's extras is missing, the tests that reach it by an import are left out: an import of
their module, of a function of tests/ that they name, or of a fixture, and through edgekd's modules, too. A test that
needs it in another way, such as by a command, says so by `pytest.importorskip("torch")`. All that is left has to pass:
a test that comes to need torch without a sign of it fails in `make test-pythons`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from edgekd.extras import DISTRIBUTIONS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
FAKED = ("tensorrt", "jetson", "pycuda")
"""Extras that the tests bring fakes of."""


@functools.cache
def missing() -> frozenset[str]:
    """Modules of the extras that cannot be imported here."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    names = {re.split(r"[<>=\[]", line)[0] for extra, lines in extras.items() if extra not in FAKED for line in lines}
    modules = {name: module for module, name in DISTRIBUTIONS.items()}
    return frozenset(m for m in (modules.get(name, name.replace("-", "_")) for name in names) if find_spec(m) is None)


def needed(names: Iterable[str]) -> set[str]:
    """Which of the missing modules an import of these names needs, directly or through files of the project."""
    found: set[str] = set()
    seen: set[Path] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        found |= {name.partition(".")[0]} & missing()
        for path in set(_files(name)) - seen:
            seen.add(path)
            waiting += imported_by(path)
    return found


def _files(module: str) -> Iterator[Path]:
    """Files of the project that are run when a module is imported: its packages' and its own."""
    parts = module.split(".")
    for folder in (ROOT, TESTS):
        for path in (folder.joinpath(*parts[:k]) for k in range(1, len(parts) + 1)):
            yield from (file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file())


@functools.cache
def imported_by(path: Path) -> tuple[str, ...]:
    """What a file imports when it is imported itself."""
    return tuple(_imports(ast.parse(path.read_text(encoding="utf-8")), inside=False))


def _imports(tree: ast.AST, *, inside: bool) -> Iterator[str]:
    """Modules, or names in them, that some code imports; `inside` its functions, too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif inside or not isinstance(node, ast.FunctionDef):
            yield from _imports(node, inside=inside)


def of_test(item: pytest.Function) -> set[str]:
    """Which missing modules a test needs by its imports and those of its fixtures."""
    fixtures = [fixture.func for found in item._fixtureinfo.name2fixturedefs.values() for fixture in found]
    return needed(name for tree in _trees([item.function, *fixtures]) for name in _imports(tree, inside=True))


def _trees(functions: Iterable[Callable[..., Any]]) -> Iterator[ast.AST]:
    """Code of functions and of the functions of tests/ that they name."""
    waiting, seen = list(functions), set()
    while waiting:
        function = inspect.unwrap(waiting.pop())
        if (
            not inspect.isfunction(function)
            or function in seen
            or TESTS not in Path(function.__code__.co_filename).parents
        ):
            continue
        seen.add(function)
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        yield tree
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        waiting += [value for name in names if callable(value := function.__globals__.get(name))]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out a module that imports what is missing."""
    if not missing() or collection_path.suffix != ".py":
        return None
    return True if needed(imported_by(collection_path)) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need what is missing."""
    if missing():
        for item in items:
            if isinstance(item, pytest.Function) and (found := of_test(item)):
                item.add_marker(pytest.mark.skip(reason=f"not installed here: {', '.join(sorted(found))}"))
