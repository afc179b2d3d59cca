"""The optional parts of the installation, as the package's own metadata lists them."""

from __future__ import annotations

import re
from importlib import metadata

from edgekd.errors import ConfigError

DISTRIBUTIONS = {"sklearn": "scikit-learn", "cuda": "cuda-python"}
"""Modules that are not called like the distribution that holds them."""


def extras() -> dict[str, tuple[str, ...]]:
    """Extra to the names of its distributions, but for edgekd's own development; nothing if edgekd is not installed."""
    found: dict[str, list[str]] = {}
    try:
        wanted = metadata.requires("edgekd") or []
    except metadata.PackageNotFoundError:  # run from a source tree that was not installed
        wanted = []
    for line in wanted:
        name, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"](.+?)['\"]", line)
        if name and extra and extra[1] not in ("dev", "docs"):
            found.setdefault(extra[1], []).append(name[0])
    return {extra: tuple(names) for extra, names in found.items()}


def missing(error: ModuleNotFoundError) -> ConfigError | None:
    """What to install for a module that is not there; None if no extra brings it, so that it is a bug."""
    module = (error.name or "").partition(".")[0]
    name = DISTRIBUTIONS.get(module, module.replace("_", "-"))
    bringing = [extra for extra, names in extras().items() if name in names]
    if not bringing:
        return None
    commands = " or ".join(f"pip install 'edgekd[{extra}]'" for extra in bringing)
    return ConfigError(f"this needs {name}, which is not installed", fix=commands)
