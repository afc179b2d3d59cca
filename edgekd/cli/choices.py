"""Option types whose values are the names of a registry, read when an option is parsed or its help is printed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click

from edgekd.errors import check_known


class Names(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """One of a set of names that is expensive to list.

    Args:
        option: The option, for errors.
        list_names: Lists the names.
    """

    name = "name"

    def __init__(self, option: str, list_names: Callable[[], Iterable[str]]) -> None:
        self._option = option
        self._list_names = list_names

    def get_metavar(self, param: click.Parameter, *_: Any) -> str:
        """Return the names as `--help` shows them."""
        return f"[{'|'.join(self._list_names())}]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the value.

        Raises:
            ConfigError: It is none of the names; the nearest is given.
        """
        check_known(self._option, value, self._list_names())
        return value


def backend_names() -> list[str]:
    """List `auto` and the registered backends."""
    from edgekd.backends.base import AUTO, BACKENDS  # onnx takes long to import

    return [AUTO, *BACKENDS]
