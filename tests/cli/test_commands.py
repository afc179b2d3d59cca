"""What a user types: help, errors without tracebacks, a full disk, Ctrl-C."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.cli import edgekd
from helpers.processes import heed_ctrl_c
from PIL import Image

from edgekd import config

COMMANDS = [
    *("train", "distill", "evaluate", "export", "compile", "tune", "certify", "predict"),
    *("bench", "compare", "reproduce", "devices", "doctor", "demo", "data", "config"),
]


def test_help_is_light() -> None:
    """Neither `edgekd --help` nor `import edgekd` loads what only training and reports need."""
    for line in ("import edgekd", "import edgekd.cli", "from edgekd import Classifier"):
        code = f"import sys; {line}; print([m for m in ('torch', 'timm', 'matplotlib') if m in sys.modules])"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert said.stdout.strip() == "[]", line
    text = edgekd("--help")
    assert all(command in text for command in COMMANDS)


def test_every_command_has_help() -> None:
    for command in COMMANDS:
        assert "Usage" in edgekd(command, "--help")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["train", "--data", "nowhere", "--model", "resnet18", "--out", "{tmp}/r", "--weights", "none"],
            "no folder at",
        ),
        (["train", "--data", "{cells}", "--model", "resnet81", "--out", "{tmp}/r", "--weights", "none"], "resnet18"),
        (["train", "--data", "{cells}", "--model", "resnet18", "--out", "{tmp}/r", "--protocol", "demoo"], "'demo'"),
        (["train", "--data", "{cells}", "--model", "resnet18", "--out", "{tmp}/r", "--set", "epoch=3"], "'epochs'"),
        (["distill", "--data", "{cells}", "--out", "{tmp}/r"], "needs a teacher"),
        (["distill", "--data", "{cells}", "--out", "{tmp}/r", "--method", "ce", "--exits", "1,"], "--exits 1,"),
        (["evaluate", "nothing"], "nothing"),
        (["export", "nothing", "--out", "{tmp}/s.onnx"], "not a run folder"),
        (["compile", "no.onnx"], "no ONNX file at no.onnx"),
        (["compile", "{student}", "--recipe", "int9"], "int8"),
        (["compile", "{student}", "--backend", "openvinno"], "'openvino'"),
        (["compile", "{student}", "--recipe", "int8"], "calibration images"),
        (["compile", "{student}", "--data", "{cells}"], "go together"),
        (["tune", "{student}", "--data", "{cells}", "--split", "x", "--latency-ms", "1"], "is not an engine folder"),
        (["predict", "{student}", "none.jpg"], "no such file"),
        (["predict", "{student}", "{cells}", "--strategy", "casade"], "Did you mean 'cascade'"),
        (["bench", "{student}", "--data", "{cells}", "--out", "{tmp}/r.json", "--suite", "quik"], "'quick'"),
        (["bench", "{student}", "--data", "{cells}", "--out", "{tmp}/r.json", "--against", "x"], "not NAME=PATH"),
        (["compare", "none.json"], "none.json"),
        (["data", "get", "sipakmed", "--out", "{tmp}/d"], "www.cs.uoi.gr"),
        (["data", "get", "cifar10", "--out", "{tmp}/d"], "cifar100"),
    ],
)
def test_errors_say_what_and_what_to_do(
    words: list[str], said: str, cells: Path, student_onnx: Path, tmp_path: Path
) -> None:
    places = {"cells": cells, "tmp": tmp_path, "student": student_onnx}
    text = edgekd(*(w.format(**places) for w in words), code=1)
    assert "error: " in text
    assert "fix: " in text
    assert said in text
    assert not list(tmp_path.rglob("*"))


def test_predict_prints_tables_and_names_bad_files(student_onnx: Path, cells: Path, tmp_path: Path) -> None:
    good = sorted((cells / "halo").iterdir())[:2]
    (tmp_path / "cut.png").write_bytes(good[0].read_bytes()[:80])
    rows = json.loads(edgekd("predict", student_onnx, *good, "--json"))
    assert [Path(r["file"]).name for r in rows] == [g.name for g in good]
    assert sum(rows[0]["probabilities"]) == pytest.approx(1, abs=1e-4)
    assert edgekd("predict", student_onnx, cells / "halo", "--csv").startswith(
        "file,label,confidence,exit,deferred,error\n"
    )
    text = edgekd("predict", student_onnx, good[0], tmp_path / "cut.png", code=1)
    assert good[0].name in text
    assert "cut.png: cannot be decoded" in text


def test_unusual_images_are_predicted(student_onnx: Path, tmp_path: Path) -> None:
    """Grey, RGBA, palette, CMYK, 16-bit: each is a picture."""
    rng = np.random.default_rng(0)
    for mode in ("L", "RGBA", "P", "CMYK"):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).convert(mode).save(tmp_path / f"{mode}.tif")
    Image.fromarray(rng.integers(0, 65535, (40, 40), np.uint16)).save(tmp_path / "16.png")
    assert len(json.loads(edgekd("predict", student_onnx, tmp_path, "--json"))) == 5


def test_whole_folder_is_evaluated_without_a_split(student_onnx: Path, cells: Path, tmp_path: Path) -> None:
    """Class folders of the network's names are its test images; a folder it does not know is an error."""
    for name, other in zip("abcde", sorted(p for p in cells.iterdir())):
        (tmp_path / "data" / name).mkdir(parents=True)
        for file in sorted(other.iterdir())[:4]:
            (tmp_path / "data" / name / file.name).write_bytes(file.read_bytes())
    rows = json.loads(edgekd("evaluate", student_onnx, "--data", tmp_path / "data", "--json"))
    assert rows["ensemble"]["n"] == 20
    assert set(rows) == {"exit_0", "exit_1", "exit_2", "exit_3", "ensemble"}
    (tmp_path / "data" / "a").rename(tmp_path / "data" / "aa")
    assert "unknown class 'aa'" in edgekd("evaluate", student_onnx, "--data", tmp_path / "data", code=1)


def command(*words: str | Path, limit: int | None = None) -> subprocess.Popen[str]:
    def prepare() -> None:
        heed_ctrl_c()
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-m", "edgekd", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=prepare,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("what", ["train", "compile", "data"])
def test_a_full_disk_leaves_nothing_half_written(what: str, cells: Path, student_onnx: Path, tmp_path: Path) -> None:
    """No file may grow over the limit, as on a disk with that much room left."""
    out = tmp_path / "out"
    words: dict[str, list[str | Path]] = {
        "train": ["train", "--data", cells, "--model", "resnet18", "--protocol", "demo", "--epochs", "1",
                  "--image-size", "16", "--workers", "0", "--batch-size", "8", "--set", "stem=small", "--out", out],
        "compile": ["compile", student_onnx, "--backend", "onnxruntime", "--out", out],
        "data": ["data", "synthetic", "--out", out, "--count", "10", "--size", "512"],
    }  # fmt: skip
    process = command(*words[what], limit=100_000)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 1, text
    assert "error: File too large" in text
    assert "Traceback" not in text
    assert not list(tmp_path.rglob("*.partial*"))
    assert out.exists() == (what == "train")  # protocol.toml and split.json fitted
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_while_training(cells: Path, tmp_path: Path, sig: signal.Signals) -> None:
    """The workers that read images get the signal, too."""
    pytest.importorskip("torch")
    words = ["train", "--data", cells, "--model", "resnet18", "--protocol", "demo", "--image-size", "16"]
    process = command(*words, "--batch-size", "8", "--set", "stem=small", "--epochs", "500", "--out", tmp_path / "run")
    while not (tmp_path / "run" / "resume.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, sig)
    try:
        text, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + sig, text
    assert f"interrupted by {sig.name}" in text
    assert "--resume" in text
    assert "Traceback" not in text
    assert not list((tmp_path / "run").glob(".*partial*"))


def test_shipped_tomls_are_valid(tmp_path: Path) -> None:
    from edgekd.artifacts.recipe import Recipe
    from edgekd.bench.suite import Suite
    from edgekd.device_profiles import DeviceProfile
    from edgekd.training.protocol import Protocol

    kinds = {"protocols": Protocol, "compile": Recipe, "devices": DeviceProfile, "benchmarks/suites": Suite}
    for kind, cls in kinds.items():
        for name in config.names(kind):
            config.load(cls, kind, name)
    assert {"gao2022", "demo"} <= set(config.names("protocols"))
    assert {"fp32", "fp16", "int8"} <= set(config.names("compile"))
    config.write_toml(tmp_path / "p.toml", config.load(Protocol, "protocols", "gao2022"))
    assert config.load(Protocol, "protocols", str(tmp_path / "p.toml")) == config.load(Protocol, "protocols", "gao2022")


@pytest.mark.parametrize(
    ("board", "recipe", "set_", "built"),
    [
        ("NVIDIA Jetson Orin Nano Developer Kit", "fp32", [], ["1", "8"]),
        ("NVIDIA Jetson Orin Nano Developer Kit", "fp32", ["--set", "batch_sizes=[1,2]"], ["1", "2"]),
        ("NVIDIA Jetson Orin Nano Developer Kit", "own.toml", [], ["1", "4"]),
    ],
)
def test_batch_sizes_are_those_of_the_board(
    board: str,
    recipe: str,
    set_: list[str],
    built: list[str],
    student_onnx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from edgekd import host
    from edgekd.artifacts.manifest import read_manifest
    from edgekd.device_profiles import profile_of

    monkeypatch.chdir(tmp_path)
    Path("own.toml").write_text('precision = "fp32"\nbatch_sizes = [1, 4]\n')
    assert profile_of("Raspberry Pi 5 Model B") is profile_of("") is None
    monkeypatch.setattr(host, "board", lambda: board)
    text = edgekd("compile", student_onnx, "--backend", "onnxruntime", "--recipe", recipe, "--out", "e", *set_)
    assert ("device profile orin-nano" in text) == (built == ["1", "8"]), text
    assert list(read_manifest(Path("e")).stage_ms) == built


def test_paper_a_protocol() -> None:
    """Gao et al. 2022: SGD, momentum 0.9, weight decay 1e-4, batch 128, 180 epochs, 0.1 times 0.1 at 100 and 150."""
    from edgekd.training.protocol import Protocol

    p = config.load(Protocol, "protocols", "gao2022")
    assert (p.optimizer, p.momentum, p.weight_decay, p.batch_size, p.epochs) == ("sgd", 0.9, 1e-4, 128, 180)
    assert (p.method, p.temperature, p.options["sd"].feature_weight, p.split) == ("kd+sd", 3.0, 0.03, "ratio:3,1,1")
    assert [p.lr_at(e) for e in (0, 99, 100, 150, 179)] == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.001])
    assert p.preprocess.image_size == 224


def test_misspelt_keys_are_all_named(tmp_path: Path, student_onnx: Path) -> None:
    (tmp_path / "mine.toml").write_text('precison = "fp32"\nmax_accuracy_drop = "much"\n')
    text = edgekd("compile", student_onnx, "--recipe", tmp_path / "mine.toml", code=1)
    assert "mine.toml" in text
    assert "precison: unknown key" in text
    assert "Did you mean 'precision'" in text
    assert "max_accuracy_drop: expected float, found 'much'" in text
    (tmp_path / "broken.toml").write_text("precision = ")
    assert "is not TOML" in edgekd("compile", student_onnx, "--recipe", tmp_path / "broken.toml", code=1)
