"""Run folder: protocol.toml, split.json, metrics.csv, model.safetensors, anchors, resume.pt and TensorBoard events."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from edgekd import config
from edgekd._version import __version__
from edgekd.data.preprocess import Preprocess
from edgekd.data.split import Split, check_classes
from edgekd.errors import ArtifactError
from edgekd.files import atomic_write, sweep
from edgekd.models.base import ExitPoint, MultiExitNetwork
from edgekd.models.networks import build, stem_of
from edgekd.models.weights import read_safetensors
from edgekd.serialization import BLANK, SCHEMA, from_table, read_bytes, seal, to_json
from edgekd.training.protocol import Protocol

MODEL, RESUME, METRICS, PROTOCOL, SPLIT = "model.safetensors", "resume.pt", "metrics.csv", "protocol.toml", "split.json"


@dataclass(frozen=True)
class RunMetadata:
    """Metadata in model.safetensors and in anchors, from which the network can be rebuilt without any other file.

    Attributes:
        network: The network's name.
        classes: Names of the classes.
        preprocess: Preprocessing of the images.
        exits: Exits as they were given to `build`.
        provenance: Hashes, versions and settings; see `provenance`.
        sha256: SHA-256 of the whole file with `serialization.BLANK` in its place; `save_model` sets it.
        schema: Version of this table.
    """

    network: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    exits: tuple[ExitPoint, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        check_classes(self.classes)

    def build(self, state: Mapping[str, Tensor]) -> MultiExitNetwork:
        """Build the network with random weights; `state`, the trained ones, decides its stem."""
        size, stem = self.preprocess.image_size, stem_of(self.network, state)
        return build(self.network, classes=len(self.classes), image_size=size, exits=self.exits, stem=stem)


def save_model(path: Path, network: nn.Module, metadata: RunMetadata) -> None:
    """Write model.safetensors or an anchor: the weights and their metadata."""
    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    text = to_json(dataclasses.replace(metadata, sha256=BLANK)).decode()
    data = save(state, metadata={"edgekd": text, "format": "pt"})
    atomic_write(path, data.replace(BLANK.encode(), seal(data).encode()))


def load_model(folder: Path) -> tuple[MultiExitNetwork, RunMetadata]:
    """Return the trained network of a run folder, on the CPU and in eval mode, and its metadata.

    Raises:
        ArtifactError: See `read_metadata`; or the weights are not this network's.
    """
    state, metadata = _read_model(folder)
    network = metadata.build(state)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"the weights in {folder / MODEL} do not fit {metadata.network}: {reason}", fix="train again"
        ) from None
    return network.eval(), metadata


def read_metadata(folder: Path) -> RunMetadata:
    """Read the metadata of a run folder's model.safetensors.

    Raises:
        ArtifactError: It is not a run folder, its first epoch is not finished, or the file is damaged.
    """
    return _read_model(folder)[1]


def _read_model(folder: Path) -> tuple[dict[str, Tensor], RunMetadata]:
    path = folder / MODEL
    if not path.is_file():
        known = "its first epoch is not finished" if (folder / PROTOCOL).is_file() else "it is not a run folder"
        raise ArtifactError(f"{folder} has no {MODEL}: {known}", fix="make one with edgekd train or edgekd distill")
    return _read_weights(path)


def _read_weights(path: Path) -> tuple[dict[str, Tensor], RunMetadata]:
    state, table = read_safetensors(path)
    if table is None:
        raise ArtifactError(
            f"{path} was not written by edgekd", fix="give it to edgekd train --weights, which takes any weights"
        )
    return state, from_table(RunMetadata, table, where=str(path))


@dataclass(frozen=True)
class Anchors:
    """Checkpoints of a teacher's training.

    Attributes:
        every: Epochs between two anchors.
        files: Files of the anchors; files[k] has the weights after (k + 1) * every epochs.
    """

    every: int
    files: tuple[Path, ...]

    def at(self, epoch: int) -> Path:
        """Return the anchor for a student's epoch, from 0; after the teacher's last epoch it is the last one."""
        return self.files[min(epoch // self.every, len(self.files) - 1)]


def anchors(folder: Path) -> Anchors:
    """Find the anchors of a teacher's run folder and check that they are complete.

    Raises:
        ArtifactError: One is missing, damaged or another network's; the command that makes them is given.
    """
    own, made = read_metadata(folder), config.load(Protocol, "protocols", str(folder / PROTOCOL))
    every = made.anchor_every or min(5, made.epochs)
    files = tuple(anchor(folder, epoch) for epoch in range(every, made.epochs + 1, every))
    anew = ["edgekd", "train", "--data", made.data, "--protocol", str(folder / PROTOCOL)]
    anew += ["--set", f"anchor_every={every}", "--out", f"{folder}-anchors"]
    if missing := [file for file in files if not file.is_file()]:
        raise ArtifactError(
            f"teacher {folder} has no anchor {missing[0]}",
            fix=f"if its training was stopped, continue it with --resume; else train it anew: {shlex.join(anew)}",
        )
    for file in files:
        found = _read_weights(file)[1]
        if (found.network, found.classes, found.exits) != (own.network, own.classes, own.exits):
            raise ArtifactError(f"{file} is not an anchor of {own.network}", fix="train the teacher anew")
    return Anchors(every, files)


def anchor(folder: Path, epoch: int) -> Path:
    """Return the path of the checkpoint that a run folder keeps after `epoch` epochs."""
    return folder / "anchors" / f"epoch_{epoch:04d}.safetensors"


def provenance(protocol: Protocol, split: Split, *, teacher: Path | None) -> dict[str, Any]:
    """Return where a model comes from: hashes, versions, and its initial weights."""
    digest = hashlib.sha256(json.dumps(json.loads(to_json(protocol)), sort_keys=True).encode()).hexdigest()
    return {
        "protocol": protocol.source,
        "protocol_sha256": digest,
        "weights": Path(protocol.weights).name,
        "teacher": read_metadata(teacher).network if teacher else None,
        "method": protocol.method,
        "epochs": protocol.epochs,
        "seed": protocol.seed,
        "split": split.method,
        "group": split.group,
        "data_fingerprint": split.fingerprint,
        "edgekd": __version__,
        "torch": torch.__version__,
    }


def save_resume(folder: Path, state: Mapping[str, Any]) -> None:
    """Write resume.pt; the SHA-256 of everything before it is the zip archive's comment.

    Args:
        folder: The run folder.
        state: Tensors and plain values: `epoch` (finished ones), `history`, `best` (validation accuracy), `digest` (of
            the protocol), and the states of `network`, `criterion`, `optimizer` and, if there is one, `ema`.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    buffer.seek(-2, io.SEEK_END)
    buffer.write(len(BLANK).to_bytes(2, "little"))
    buffer.write(hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    atomic_write(folder / RESUME, buffer.getbuffer())


def load_resume(folder: Path, *, digest: str) -> dict[str, Any] | None:
    """Read resume.pt, or return None before the end of the first epoch.

    Raises:
        ArtifactError: The file is damaged, or was written under another protocol.
    """
    path, anew = folder / RESUME, "remove the folder and train anew"
    if not path.is_file():
        return None
    data = read_bytes(path, what="state of a run")
    if hashlib.sha256(memoryview(data)[: -len(BLANK)]).hexdigest().encode() != data[-len(BLANK) :]:
        raise ArtifactError(f"{path} is damaged: its SHA-256 differs", fix=anew)
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises many kinds
        raise ArtifactError(f"{path} is damaged ({type(error).__name__})", fix=anew) from None
    kinds: dict[str, Any] = {"epoch": int, "history": list, "best": float, "digest": str}
    kinds |= dict.fromkeys(("network", "criterion", "optimizer"), Mapping)
    if not isinstance(state, Mapping) or not all(isinstance(state.get(k), kind) for k, kind in kinds.items()):
        raise ArtifactError(f"{path} is not the state of a run", fix=anew)
    if not all(isinstance(v, Tensor) and torch.isfinite(v).all() for v in state["network"].values()):
        raise ArtifactError(f"{path} holds weights that are not finite", fix=anew)
    if state.get("digest") != digest:
        raise ArtifactError(
            f"{folder} was trained under other settings than now requested",
            fix=f"resume with the settings in {folder / PROTOCOL}, or choose another --out",
        )
    return state


def write_metrics(folder: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write metrics.csv, one row for each epoch."""
    text = io.StringIO()
    names = list({name: 0 for row in history for name in row})  # epochs of an initial stage have other terms
    writer = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" for k, v in row.items()} for row in history)
    atomic_write(folder / METRICS, text.getvalue().encode())


def start(folder: Path, *, resume: bool) -> None:
    """Prepare a run folder: refuse to overwrite a run, and remove half-written files of one that was killed.

    Raises:
        ArtifactError: The folder contains a run and `resume` is off, or contains other files, or is a file.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is a file", fix="choose another --out")
    sweep(folder)
    if not any(folder.iterdir()):
        return
    if (folder / PROTOCOL).is_file():
        if resume:
            return
        raise ArtifactError(f"{folder} already holds a run", fix="continue it with --resume, or choose another --out")
    raise ArtifactError(f"{folder} is not empty and not a run folder", fix="choose another --out")
