"""Compiled networks, whatever compiled them: make one with `compile_engine`, open one with `open_engine`."""

from __future__ import annotations

from edgekd.engines.backends import Runner
from edgekd.engines.build import Attempt, compile_engine
from edgekd.engines.engine import Engine, open_engine
from edgekd.engines.recipe import Recipe

__all__ = ["Attempt", "Engine", "Recipe", "Runner", "compile_engine", "open_engine"]
