"""From a request to the protocol that is trained: defaults, protocol file, flags, teacher, and the resumed run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd import config
from edgekd.errors import ConfigError
from edgekd.training.protocol import Protocol, refuse_other_settings
from edgekd.training.request import TrainRequest
from edgekd.training.run_folder import PROTOCOL, SPLIT

DEFAULT_PROTOCOL, DEFAULT_STUDENT = "finetune", "multi-exit-resnet18"
log = logging.getLogger(__name__)


def resolve(request: TrainRequest) -> Protocol:
    """Return the settings of a training request; for a sweep, those that its runs share.

    A new run takes the settings of the protocol file, overridden by flags. A resumed run keeps its own: keys that a
    protocol file or a flag gives must agree with them; keys that neither gives are not compared.

    Raises:
        ConfigError: Unknown keys, wrong values, or no network.
        ArtifactError: Other settings than the resumed run's.
    """
    own_file = request.out / PROTOCOL
    if request.resume and not request.is_sweep and own_file.is_file():
        return _resume(request, own_file)
    protocol = _load(request.protocol or DEFAULT_PROTOCOL, request)
    if request.command == "train":
        protocol = _on_labels_alone(protocol, request)
        if not protocol.network:
            raise ConfigError("no network is given", fix="name one with --model, or as the protocol's network")
    elif not protocol.network:
        protocol = dataclasses.replace(protocol, network=DEFAULT_STUDENT)
    return protocol if request.is_sweep else _split_like_teacher(protocol, request)


def has_teachers_split(protocol: Protocol, request: TrainRequest) -> bool:
    """Return True if a new run divides the images as its teacher's: no flag names another split or grouping."""
    own_split = bool({"split", "group"} & request.protocol_values().keys()) or Path(protocol.split).is_file()
    return bool(protocol.teacher) and not own_split


def _resume(request: TrainRequest, own_file: Path) -> Protocol:
    original = config.load(Protocol, "protocols", str(own_file))
    file_values: dict[str, Any] = {}
    if request.protocol:
        config.load(Protocol, "protocols", request.protocol)  # errors in the file itself are reported as such
        file_values = _flattened(config.read_table("protocols", request.protocol))
    requested = _load(str(own_file), request, file_values)
    if "method" in file_values and request.command == "train":
        requested = _on_labels_alone(requested, request)
    if {"split", "group"} & file_values.keys():
        requested = _split_like_teacher(requested, request)
    refuse_other_settings(request.out, original, requested)
    return dataclasses.replace(original, data=requested.data, workers=requested.workers)


def _load(name: str, request: TrainRequest, below: Mapping[str, Any] | None = None) -> Protocol:
    """Read a protocol, with the values of the request over those of `below` over its own."""
    values = {**(below or {}), **request.protocol_values()}
    return config.load(Protocol, "protocols", name, overrides=values, flags=request.flags())


def _on_labels_alone(protocol: Protocol, request: TrainRequest) -> Protocol:
    if "method" in request.protocol_values():
        return protocol
    if protocol.method != "ce" and Path(request.protocol or "").suffix:
        unused = f"the method {protocol.method} in {request.protocol} is for edgekd distill"
        log.warning("train learns from labels alone; %s", unused)
    return dataclasses.replace(protocol, method="ce")


def _split_like_teacher(protocol: Protocol, request: TrainRequest) -> Protocol:
    if not has_teachers_split(protocol, request):
        return protocol
    return dataclasses.replace(protocol, split=f"{protocol.teacher}/{SPLIT}")


def _flattened(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested tables under dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in table.items():
        leaves |= _flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves
