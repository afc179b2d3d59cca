"""Loading weights from a local file into a network; tensors that do not fit are reported."""

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
class LoadedWeights:
    """Names of a network's tensors after weights were loaded into it.

    Attributes:
        loaded: Tensors that were loaded.
        missing: The network's tensors that the weights do not contain.
        unknown: The weights' tensors that the network does not contain.
        reshaped: Tensors whose shapes differ.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    reshaped: tuple[str, ...]

    def summary(self) -> str:
        """Return one line for the log."""
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what, names in (("new", self.missing), ("left", self.unknown), ("of another shape", self.reshaped)):
            if names:
                parts.append(f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})")
        return "; ".join(parts)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, or a torch checkpoint that contains nothing but tensors.

    Raises:
        ArtifactError: The file is missing or damaged, has values that are not finite, or is a pickle with more than
            weights in it.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    if not path.is_file():
        raise ArtifactError(f"no weights at {path}", fix="give a .safetensors or .pth file, or none")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises many kinds on damaged files
        raise _damaged(path, error) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise ArtifactError(f"{path}: does not contain a state_dict", fix="save its state_dict as safetensors")
    return _finite({str(k): v for k, v in state.items() if isinstance(v, Tensor)}, path)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read a safetensors file and edgekd's metadata in it, whose SHA-256 is checked.

    Returns:
        The tensors, and the metadata as parsed JSON; None for a file that edgekd did not write.

    Raises:
        ArtifactError: The file is missing, damaged or changed, or has values that are not finite.
    """
    data = read_bytes(path, what="weights", fix="give a .safetensors or .pth file, or none")
    try:
        state = load(data)
        text = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {}).get("edgekd")
        metadata = None if text is None else parse_json(text)
    except Exception as error:  # safetensors raises many kinds on damaged files
        raise _damaged(path, error) from error
    if metadata is not None:
        digest = metadata.get("sha256", "") if isinstance(metadata, dict) else ""
        check_seal(data, digest if isinstance(digest, str) else "", path=path, fix="train again, or --resume")
    return _finite(state, path), metadata


def _damaged(path: Path, error: Exception) -> ArtifactError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    what = f"{path} is damaged or not a weights-only file ({reason})"
    return ArtifactError(what, fix="save its state_dict as safetensors")


def _finite(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ArtifactError(f"{path}: {name} holds values that are not finite", fix="use other weights")
    return state


def load_state(network: nn.Module, state: Mapping[str, Tensor], *, source: str) -> LoadedWeights:
    """Copy the tensors that fit into a network.

    Names of a plain network (`layer1.0.conv1.weight`) also match those of a `MultiExitNetwork`'s backbone.

    Args:
        network: The network.
        state: Name to tensor.
        source: Name of the weights, for errors.

    Raises:
        ConfigError: No tensor fits; names from both sides are given.
    """
    own = network.state_dict()
    renamed = {_own_name(key.removeprefix("module."), own): value for key, value in state.items()}
    fits = {k: v for k, v in renamed.items() if k in own and own[k].shape == v.shape}
    reshaped = [k for k in renamed if k in own and k not in fits]
    unknown = [k for k in renamed if k not in own]
    missing = [k for k in own if k not in renamed and not k.endswith("num_batches_tracked")]
    if not any(own[k].dim() > 1 for k in fits):
        raise ConfigError(
            f"{source} does not fit this network: it has {', '.join(list(state)[:3])}, …; "
            f"the network has {', '.join(list(own)[:3])}, …",
            fix="give weights of the same architecture, or --weights none",
        )
    network.load_state_dict(fits, strict=False)
    return LoadedWeights(tuple(fits), tuple(missing), tuple(unknown), tuple(reshaped))


def _own_name(key: str, own: Mapping[str, Tensor]) -> str:
    return f"backbone.{key}" if key not in own and f"backbone.{key}" in own else key
