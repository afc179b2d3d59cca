"""The optional dependencies (extras), read from the package metadata."""

from __future__ import annotations

import re
from importlib import metadata

from edgekd.errors import ConfigError

DISTRIBUTIONS = {"sklearn": "scikit-learn", "cuda": "cuda-python"}
"""Modules whose distribution has another name."""


def extras() -> dict[str, tuple[str, ...]]:
    """Return the distributions of each extra but `dev`; empty if edgekd is not installed."""
    found: dict[str, list[str]] = {}
    try:
        wanted = metadata.requires("edgekd") or []
    except metadata.PackageNotFoundError:  # run from a source tree without an installation
        wanted = []
    for line in wanted:
        name, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"](.+?)['\"]", line)
        if name and extra and extra[1] not in ("dev", "docs"):
            found.setdefault(extra[1], []).append(name[0])
    return {extra: tuple(names) for extra, names in found.items()}


def missing(error: ModuleNotFoundError) -> ConfigError | None:
    """Convert an import error to an error that names the extra to install; None if no extra contains the module."""
    module = (error.name or "").partition(".")[0]
    name = DISTRIBUTIONS.get(module, module.replace("_", "-"))
    containing = [extra for extra, names in extras().items() if name in names]
    if not containing:
        return None
    commands = " or ".join(f"pip install 'edgekd[{extra}]'" for extra in containing)
    return ConfigError(f"this needs {name}, which is not installed", fix=commands)
