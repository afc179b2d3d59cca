"""Which names of TensorRT a source file touches, by reading it: with `hasattr` decided as one version decides it.

A value's class is told by what made it (the signatures of the bindings say what a method returns), else by its name.
A branch behind `hasattr` is read only in versions that take it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from helpers.bindings import Api

MODULE, OTHER = "tensorrt", "other"
NAMES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "others": "ITimingCache",
    "engine": "ICudaEngine",
    "_runtime": "Runtime",
    "context": "IExecutionContext",
    "_context": "IExecutionContext",
    "inspector": "EngineInspector",
    "refitter": "Refitter",
    "logging": OTHER,
}
"""What a variable or attribute of that name holds, where nothing else tells."""
ONLY_IN = {
    "builder": {"tensor": "ITensor", "layer": "ILayer", "error": "ParserError"},
    "runner": {"shapes": "IExecutionContext"},
}
COMMON = {"name", "log", "node", "precision", "allocate"} | set(dir(list) + dir(dict) + dir(np.ndarray))
"""Words that TensorRT's classes share with everything else."""


@dataclass(frozen=True)
class Touch:
    """A name that is used: of a class, or of the module itself (kind ""), and where."""

    kind: str
    name: str
    where: str

    def __str__(self) -> str:
        return f"{self.where}: {'.'.join(filter(None, (self.kind, self.name)))}"


@dataclass
class Reading:
    """What was found in the sources, for one version. unclear: looks like TensorRT's, and nobody knows whose it is."""

    touches: set[Touch] = field(default_factory=set)
    unclear: set[str] = field(default_factory=set)

    def missing(self, api: Api) -> list[str]:
        """What the version does not have."""
        gone = [t for t in self.touches if not (api.has(t.kind, t.name) if t.kind else t.name in api.names)]
        return sorted(map(str, gone))


def read(sources: dict[str, str], api: Api, *, unneeded: Iterable[str] = ()) -> Reading:
    """Read modules, name to source. unneeded: private functions that nobody calls in this version, for reasons that are
    not in the sources that call them.
    """
    functions: dict[str, list[tuple[str, ast.FunctionDef]]] = {}
    for module, text in sources.items():
        for node in ast.parse(text).body:
            for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
                if isinstance(inner, ast.FunctionDef):
                    functions.setdefault(inner.name, []).append((module, inner))
    reader = _Reader(api, functions, set(unneeded))
    for name in functions:
        if not name.startswith("_") or name.endswith("__"):
            reader.function(name)
    return reader.found


class _Reader:
    def __init__(self, api: Api, functions: dict[str, list[tuple[str, ast.FunctionDef]]], assume: set[str]) -> None:
        self.api = api
        self.functions = functions
        self.found = Reading()
        self._seen = assume
        self._words = {m for members in api.names.values() for m in members} - COMMON - functions.keys()
        self._module = ""
        self._env: dict[str, str] = {}
        self._facts: dict[str, bool | None] = {}

    def function(self, name: str) -> None:
        """Read the functions and methods of that name once, when something live mentions it."""
        if name in self._seen:
            return
        self._seen.add(name)
        outer = self._module, self._env, self._facts
        for module, node in self.functions.get(name, []):
            self._module, self._env, self._facts = module, {}, {}
            self._block(node.body)
        self._module, self._env, self._facts = outer

    # statements

    def _block(self, body: list[ast.stmt]) -> bool:
        """Whether the block certainly ends its function."""
        return any(self._statement(statement) for statement in body)

    def _statement(self, node: ast.stmt) -> bool:
        if isinstance(node, ast.If):
            truth = self._truth(node.test)
            ends = [
                self._block(part)
                for part, live in ((node.body, truth is not False), (node.orelse, truth is not True))
                if live
            ]
            return all(ends)
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                self._overridden(node, self._value(base))
        if isinstance(node, ast.FunctionDef):
            self._block(node.body)
            return False
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            self._assign(node)
            return False
        if isinstance(node, ast.Expr) and self._refuses(node.value):
            return True
        self._parts(node)
        return isinstance(node, ast.Return | ast.Raise)

    def _parts(self, node: ast.AST) -> None:
        if isinstance(node, ast.ExceptHandler) and node.name:
            self._env[node.name] = OTHER
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                self._statement(child)
            elif isinstance(child, ast.ExceptHandler | ast.withitem | ast.match_case):
                self._parts(child)
            else:
                self._visit(child)

    def _assign(self, node: ast.Assign | ast.AnnAssign) -> None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        assert node.value is not None
        kind, truth = self._value(node.value), self._truth(node.value, quiet=True)
        for target in targets:
            if isinstance(target, ast.Name):
                self._env.pop(target.id, None)
                self._facts[target.id] = truth
                if kind:
                    self._env[target.id] = kind
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for one, value in zip(target.elts, node.value.elts):
                    if isinstance(one, ast.Name) and (inner := self._value(value)):
                        self._env[one.id] = inner
            else:
                self._visit(target)

    def _overridden(self, node: ast.ClassDef, base: str | None) -> None:
        """Methods of a subclass must be what the base calls."""
        if base and base.startswith("class "):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    self._touch(base.removeprefix("class "), method.name, method)

    def _refuses(self, node: ast.expr) -> bool:
        """`_need(hasattr(...), ...)` in a version that has not."""
        is_need = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_need"
        return is_need and self._truth(node.args[0]) is False  # type: ignore[attr-defined]

    # expressions

    def _visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.expr):
            self._value(node)
            return
        for child in ast.iter_child_nodes(node):
            self._visit(child)

    def _value(self, node: ast.expr) -> str | None:
        """Visit an expression; "tensorrt", "class Builder", "Builder" for an instance, or None for anything else."""
        if isinstance(node, ast.Name):
            self.function(node.id)
            return self._env.get(node.id) or self._named(node.id)
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.BoolOp | ast.IfExp):
            return self._choice(node)
        for child in ast.iter_child_nodes(node):
            self._visit(child)
        return None

    def _named(self, name: str) -> str | None:
        return ONLY_IN.get(self._module, {}).get(name) or NAMES.get(name)

    def _attribute(self, node: ast.Attribute) -> str | None:
        base = self._value(node.value)
        self.function(node.attr)
        if node.attr == "trt":
            return MODULE
        if node.attr.startswith("__"):
            if base == MODULE:
                return None
            return base
        if base == OTHER:
            return None
        if base == MODULE:
            self._touch("", node.attr, node)
            return f"class {node.attr}"
        if base:
            kind = base.removeprefix("class ")
            self._touch(kind, node.attr, node)
            return self.api.returns(kind, node.attr)
        found = self._named(node.attr)
        of_logging = isinstance(node.value, ast.Name) and node.value.id == "logging"  # has a DEBUG, too
        if found is None and node.attr in self._words and not of_logging:
            self.found.unclear.add(f"{self._module}:{node.lineno}: {ast.unparse(node)}")
        return found

    def _call(self, node: ast.Call) -> str | None:
        if isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
            self._value(node.args[0])
            return None
        kind = self._value(node.func)
        arguments = [self._value(a) for a in [*node.args, *(k.value for k in node.keywords)]]
        if isinstance(node.func, ast.Attribute) and node.func.attr == "make" and arguments:
            kind = arguments[0]
        return kind.removeprefix("class ") if kind else None

    def _choice(self, node: ast.BoolOp | ast.IfExp) -> str | None:
        if isinstance(node, ast.BoolOp):
            self._truth(node)
            return None
        truth = self._truth(node.test)
        kinds = [
            self._value(v) for v, live in ((node.body, truth is not False), (node.orelse, truth is not True)) if live
        ]
        return next(filter(None, kinds), None)

    def _truth(self, node: ast.expr, *, quiet: bool = False) -> bool | None:
        """Whether the version decides it so; visits what is evaluated, unless quiet."""
        if isinstance(node, ast.BoolOp):
            stop, truth = isinstance(node.op, ast.Or), []
            for value in node.values:
                truth.append(self._truth(value, quiet=quiet))
                if truth[-1] is stop:
                    return stop
            return None if None in truth else not stop
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self._truth(node.operand, quiet=quiet)
            return None if inner is None else not inner
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
            return self._has(node)
        if isinstance(node, ast.Attribute) and node.attr == "strongly_typed":
            return self._strongly_typed()
        if isinstance(node, ast.Name) and node.id in self._facts:
            return self._facts[node.id]
        if isinstance(node, ast.IfExp) and (truth := self._truth(node.test, quiet=True)) is not None:
            return self._truth(node.body if truth else node.orelse, quiet=quiet)
        if isinstance(node, ast.Constant):
            return bool(node.value)
        if not quiet:
            self._value(node)
        return None

    def _has(self, node: ast.Call) -> bool | None:
        kind, name = self._value(node.args[0]), node.args[1]
        if kind is None or not isinstance(name, ast.Constant):
            return None
        kind = kind.removeprefix("class ")
        return name.value in self.api.names if kind == MODULE else self.api.has(kind, str(name.value))

    def _strongly_typed(self) -> bool:
        """As `Library.strongly_typed` decides, which a test holds against this."""
        major, minor = map(int, self.api.version.split(".")[:2])
        return not self.api.has("BuilderFlag", "FP16") or (major, minor) >= (10, 12)

    def _touch(self, kind: str, name: str, node: ast.AST) -> None:
        self.found.touches.add(Touch(kind, name, f"{self._module}:{getattr(node, 'lineno', 0)}"))
