"""Weights from a local file into a network, keeping what fits and naming what does not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from edgekd.errors import ArtifactError, ConfigError
from edgekd.schema import parse_json
from edgekd.serialization import check_seal, read_bytes


@dataclass(frozen=True)
class Loaded:
    """What a file gave a network: names of tensors loaded, not given, not known, and of another shape."""

    fits: tuple[str, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    reshaped: tuple[str, ...]

    def summary(self) -> str:
        """One line for a person."""
        parts = [f"{len(self.fits)} tensors loaded"]
        for what, names in (("new", self.missing), ("left", self.unknown), ("of another shape", self.reshaped)):
            if names:
                parts.append(f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})")
        return "; ".join(parts)


def read_state(path: Path) -> dict[str, Tensor]:
    """A safetensors file, or a torch checkpoint that holds nothing but tensors.

    Raises:
        ArtifactError: missing, damaged, not finite, or a pickle with more than weights in it.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    if not path.is_file():
        raise ArtifactError(f"no weights at {path}", fix="give a .safetensors or .pth file, or none")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises many kinds on damaged files
        raise _refused(path, error) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise ArtifactError(f"{path}: holds no state_dict", fix="save its state_dict as safetensors")
    return _finite({str(k): v for k, v in state.items() if isinstance(v, Tensor)}, path)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors, and edgekd's header, whose SHA-256 is checked; None in a file that edgekd did not write.

    Raises:
        ArtifactError: missing, damaged, changed, or not finite.
    """
    data = read_bytes(path, what="weights", fix="give a .safetensors or .pth file, or none")
    try:
        state = load(data)
        text = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {}).get("edgekd")
        header = None if text is None else parse_json(text)
    except Exception as error:  # safetensors raises many kinds on damaged files
        raise _refused(path, error) from error
    if header is not None:
        digest = header.get("sha256", "") if isinstance(header, dict) else ""
        check_seal(data, digest if isinstance(digest, str) else "", path=path, fix="train again, or --resume")
    return _finite(state, path), header


def _refused(path: Path, error: Exception) -> ArtifactError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    what = f"{path} is damaged or no weights-only file ({reason})"
    return ArtifactError(what, fix="save its state_dict as safetensors")


def _finite(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ArtifactError(f"{path}: {name} holds values that are not finite", fix="take other weights")
    return state


def load_state(network: nn.Module, state: Mapping[str, Tensor], *, source: str) -> Loaded:
    """Copy the tensors that fit; plain names (`layer1.0.conv1.weight`) also find a network's `backbone.`.

    Raises:
        ConfigError: not one tensor fits; names from both sides are given.
    """
    own = network.state_dict()
    renamed = {_place(key.removeprefix("module."), own): value for key, value in state.items()}
    fits = {k: v for k, v in renamed.items() if k in own and own[k].shape == v.shape}
    reshaped = [k for k in renamed if k in own and k not in fits]
    unknown = [k for k in renamed if k not in own]
    missing = [k for k in own if k not in renamed and not k.endswith("num_batches_tracked")]
    if not any(own[k].dim() > 1 for k in fits):
        raise ConfigError(
            f"{source} fits this network nowhere: it has {', '.join(list(state)[:3])}, …; "
            f"the network wants {', '.join(list(own)[:3])}, …",
            fix="give weights of the same architecture, or --weights none",
        )
    network.load_state_dict(fits, strict=False)
    return Loaded(tuple(fits), tuple(missing), tuple(unknown), tuple(reshaped))


def _place(key: str, own: Mapping[str, Tensor]) -> str:
    return f"backbone.{key}" if key not in own and f"backbone.{key}" in own else key
