"""Exact resumption of a training run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgekd.distill.methods import needs_anchors
from edgekd.training import loop, run_folder
from edgekd.training.protocol import Protocol
from edgekd.training.train import train


def resumes_exactly(data: Path, out: Path, protocol: Protocol, *, teacher: Path | None = None) -> Path:
    """Train a run, and one that is stopped in its last epoch and resumed: all tensors of both must be the same.

    The teacher's tensors must be its file's to the end, but where anchors change them. Returns the first one's folder;
    its model holds the network's tensors and no others.
    """
    held, freeze = [], loop.freeze

    def stop(done: int, total: int, loss: float) -> None:
        if done > total - total // protocol.epochs:
            raise KeyboardInterrupt

    whole, stopped = out / "whole", out / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "freeze", lambda net: held.append(net) or freeze(net))
        train(data, whole, protocol=protocol, teacher=teacher)
        with pytest.raises(KeyboardInterrupt):
            train(data, stopped, protocol=protocol, teacher=teacher, progress=stop)
        before = torch.load(stopped / run_folder.RESUME, weights_only=True)
        assert before["epoch"] == protocol.epochs - 1
        train(data, stopped, protocol=protocol, teacher=teacher, resume=True)
    left, right = (torch.load(folder / run_folder.RESUME, weights_only=True) for folder in (whole, stopped))
    for part in ("network", "criterion"):
        assert left[part].keys() == right[part].keys()
        assert all(torch.equal(left[part][name], right[part][name]) for name in left[part]), part
    assert any(not torch.equal(before["network"][name], left["network"][name]) for name in left["network"])
    assert load_file(whole / run_folder.MODEL).keys() == left["network"].keys()
    if teacher and not needs_anchors(protocol.method):
        file = load_file(teacher / run_folder.MODEL)
        assert len(held) == 3
        assert all(torch.equal(value, file[name]) for net in held for name, value in net.state_dict().items())
    return whole
