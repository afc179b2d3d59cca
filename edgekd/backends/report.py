"""The host as the installed backends report it."""

from __future__ import annotations

from edgekd.backends.base import find_backend, package_names
from edgekd.host import HostInfo, host_info


def describe_host(*backends: str) -> HostInfo:
    """Describe this machine, the versions of all backends' packages, and the facts that `backends` report.

    Raises:
        BackendError: One of `backends` is not installed, or finds no device to run on.
    """
    return host_info(package_names(), {name: reported_facts(name) for name in dict.fromkeys(backends)})


def reported_facts(name: str) -> dict[str, str]:
    """Return a backend's version and its facts about the hardware it runs on (see `Backend.host_facts`).

    Raises:
        BackendError: It is not installed, or finds no device to run on.
    """
    backend = find_backend(name)
    return {"version": str(backend.version()), **backend.host_facts()}
