"""Weights from a local file into a network, keeping what fits and naming what does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from edgekd.errors import ArtifactError, ConfigError


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
        ArtifactError: missing, damaged, or a pickle with more than weights in it.
    """
    if not path.is_file():
        raise ArtifactError(f"no weights at {path}", fix="give a .safetensors or .pth file, or none")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch's unpickler raise many kinds on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(
            f"{path}: no weights-only file ({reason})", fix="save its state_dict as safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise ArtifactError(f"{path}: holds no state_dict", fix="save its state_dict as safetensors")
    return {str(k): v for k, v in state.items() if isinstance(v, Tensor)}


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
