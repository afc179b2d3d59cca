"""What `precision = "auto"` takes, says and keeps."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edgekd import config
from edgekd.errors import ConfigError
from edgekd.models.networks import build
from edgekd.training import precision, run_folder
from edgekd.training.precision import choose, step_seconds
from edgekd.training.protocol import Protocol
from edgekd.training.train import train

CPU = torch.device("cpu")


def supports(monkeypatch: pytest.MonkeyPatch, bf16: bool, plain: float = 1.0, mixed: float = 1.0) -> None:
    monkeypatch.setattr(precision, "_has_bf16", lambda device: bf16)
    monkeypatch.setattr(precision, "step_seconds", lambda network, image_size: (plain, mixed))


@pytest.mark.parametrize(
    ("device", "bf16", "mixed", "taken", "why"),
    [
        ("cpu", False, 0.0, "32-true", "this CPU has no bf16"),
        ("cpu", True, 0.5, "bf16-mixed", "take 0.50 CPU seconds in bf16-mixed, 1.00 in 32-true"),
        ("cpu", True, 18.0, "32-true", "take 18.00 CPU seconds in bf16-mixed"),
        ("cuda", True, 18.0, "bf16-mixed", "this GPU has bf16"),
        ("cuda", False, 0.0, "32-true", "this GPU has no bf16"),
    ],
)
def test_auto(
    device: str,
    bf16: bool,
    mixed: float,
    taken: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    supports(monkeypatch, bf16, mixed=mixed)
    caplog.set_level(logging.INFO)
    assert choose("auto", torch.nn.Identity(), device=torch.device(device), image_size=16) == taken
    assert why in caplog.text


def test_what_is_asked_for_is_taken_with_a_warning_if_it_is_slow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    supports(monkeypatch, False)
    assert choose("32-true", torch.nn.Identity(), device=CPU, image_size=16) == "32-true"
    assert not caplog.records
    assert choose("bf16-mixed", torch.nn.Identity(), device=CPU, image_size=16) == "bf16-mixed"
    assert caplog.records[0].levelname == "WARNING"
    with pytest.raises(ConfigError, match="16-mixed"):
        choose("16-mixed", torch.nn.Identity(), device=CPU, image_size=16)


def test_a_timed_step_changes_nothing() -> None:
    """Neither weights nor batch norm's statistics nor the generator, so that a run is as with the precision given."""
    network = build("multi-exit-resnet18", classes=5, image_size=32)
    before, generator = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    assert min(step_seconds(network, image_size=32)) > 0
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="not an x86 CPU")
def test_an_imitated_avx2_cpu_has_no_bf16() -> None:
    code = (
        "import torch; from edgekd.training.precision import choose;"
        "print(choose('auto', torch.nn.Identity(), device=torch.device('cpu'), image_size=16))"
    )
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == "32-true"


def test_the_run_keeps_what_was_taken(cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that would decide otherwise, and for first weights of either stem."""
    requested = config.load(
        Protocol,
        "protocols",
        "demo",
        overrides={"network": "resnet18", "method": "ce", "stem": "small", "epochs": 1, "batch_size": 8, "workers": 0}
        | {"preprocess.image_size": 16},
    )
    assert (requested.precision, config.load(Protocol, "protocols", "finetune").precision) == ("auto", "auto")
    supports(monkeypatch, True, mixed=0.5)
    train(cells, tmp_path / "run", protocol=requested)
    made = config.load(Protocol, "protocols", str(tmp_path / "run" / run_folder.PROTOCOL))
    assert (made.precision, made.stem) == ("bf16-mixed", "small")
    supports(monkeypatch, False)
    train(cells, tmp_path / "run", protocol=made, resume=True)
    from_it = {"weights": str(tmp_path / "run"), "network": "multi-exit-resnet18", "exits": [4]}
    for stem, kernel, size in (("auto", (3, 3), 16), ("imagenet", (7, 7), 64)):  # 16 pixels are too few for that
        overrides = from_it | {"stem": stem, "preprocess.image_size": size}
        wanted = config.load(Protocol, "protocols", str(tmp_path / "run" / run_folder.PROTOCOL), overrides=overrides)
        train(cells, tmp_path / stem, protocol=wanted)
        network, _ = run_folder.load_model(tmp_path / stem)
        assert network.backbone.conv1.kernel_size == kernel  # type: ignore[union-attr]
