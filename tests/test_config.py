"""Where the settings of train and distill come from: flags, `--set`, protocol, teacher, and the run that goes on."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import edgekd

from edgekd import config
from edgekd.data.split import read_split
from edgekd.training.protocol import Protocol

FRESH = {"epochs": 1, "batch_size": 8, "workers": 0, "weights": '"none"', "precision": '"32-true"'}


def made(run: Path) -> Protocol:
    return config.load(Protocol, "protocols", str(run / "protocol.toml"))


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A user's own protocol that says all that the commands have defaults for."""
    lines = [f"{key} = {value}" for key, value in FRESH.items()]
    lines += ['network = "squeezenet1_1"', 'method = "ce"', 'split = "ratio:2,1,1"', "seed = 3", "exits = [2, 4]"]
    (tmp_path / "my own.toml").write_text("\n".join([*lines, "[preprocess]", "image_size = 32", ""]))
    return tmp_path / "my own.toml"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Protocol]:
    """What would be trained, instead of training it."""
    found: list[Protocol] = []
    monkeypatch.setattr(sys.modules["edgekd.cli.train"], "_train", lambda request, protocol: found.append(protocol))
    return found


@pytest.mark.parametrize("command", ["train", "distill"])
def test_a_protocols_keys_hold_unless_a_flag_says_otherwise(
    command: str, mine: Path, cells: Path, tmp_path: Path, asked: list[Protocol]
) -> None:
    words = [command, "--data", cells, "--out", tmp_path / "r"]
    edgekd(*words, "--protocol", mine)
    own = config.load(Protocol, "protocols", str(mine), overrides={"data": str(cells.resolve())})
    assert asked[-1] == own
    flags = ["--lr", "0.5", "--batch-size", "4", "--workers", "1", "--precision", "bf16-mixed", "--epochs", "2"]
    flags += ["--image-size", "48", "--weights", "hub", "--seed", "9", "--split", "kfold:3", "--fold", "1"]
    flags += ["--model" if command == "train" else "--student", "resnet18", "--set", "lr=0.25"]
    edgekd(*words, "--protocol", mine, *flags)
    p = asked[-1]
    assert (p.lr, p.batch_size, p.workers, p.precision, p.epochs) == (0.25, 4, 1, "bf16-mixed", 2)
    assert (p.preprocess.image_size, p.weights, p.seed, p.split, p.fold) == (48, "hub", 9, "kfold:3", 1)
    assert (p.network, p.exits) == ("resnet18", (2, 4))


def test_defaults_where_nothing_is_said(cells: Path, tmp_path: Path, asked: list[Protocol]) -> None:
    words = ["--data", cells, "--out", tmp_path / "r"]
    edgekd("distill", *words)
    assert (asked[-1].network, asked[-1].method, asked[-1].source) == ("multi-exit-resnet18", "kd+sd", "finetune")
    edgekd("train", *words, "--model", "resnet18")
    assert asked[-1].method == "ce"
    assert "--model" in edgekd("train", *words, code=1)


def test_a_student_is_split_as_its_teacher_unless_a_split_is_asked_for(
    mine: Path, cells: Path, tmp_path: Path, asked: list[Protocol]
) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "split.json").touch()
    teacher = tmp_path / "t" / "split.json"
    words = ["distill", "--data", cells, "--out", tmp_path / "r", "--teacher", tmp_path / "t"]
    for more, split in (
        (["--protocol", mine], str(teacher)),
        (["--split", "ratio:1,1,1"], "ratio:1,1,1"),
        (["--set", "split=kfold:4"], "kfold:4"),
        (["--group", "cluster"], "ratio:3,1,1"),
    ):
        edgekd(*words, *more)
        assert (asked[-1].split, asked[-1].teacher) == (split, str(tmp_path / "t"))


def test_a_run_goes_on_as_it_was_begun_or_not_at_all(mine: Path, cells: Path, tmp_path: Path) -> None:
    """Also without its flags, and with the teacher that it had."""
    teacher, out = tmp_path / "teacher", tmp_path / "student"
    edgekd("train", "--data", cells, "--protocol", mine, "--out", teacher)
    begun = ["distill", "--data", cells, "--out", out, "--teacher", teacher, "--student", "resnet18"]
    begun += ["--protocol", mine, "--method", "kd", "--lr", "0.01"]
    edgekd(*begun)
    first = made(out)
    assert (first.teacher, first.network, first.lr) == (str(teacher), "resnet18", 0.01)
    assert read_split(out).subsets == read_split(teacher).subsets
    assert "standard errors" not in edgekd("evaluate", out)
    rows = (out / "metrics.csv").read_text().splitlines()
    at = rows[0].split(",").index("val_ensemble")
    (out / "metrics.csv").write_text("\n".join([rows[0], ",".join([*rows[1].split(",")[:at], "1", "0"])]))
    assert "note: accuracy on 15 test images" in edgekd("evaluate", out)

    again = ["distill", "--data", cells, "--out", out, "--resume"]
    for words in (again, [*begun, "--resume"], [*again, "--workers", "0", "--precision", "auto"]):
        edgekd(*words)
        assert made(out) == first
    for more, said in (
        (["--lr", "0.5"], "lr 0.5, not 0.01"),
        (["--student", "squeezenet1_1"], "network 'squeezenet1_1', not 'resnet18'"),
        (["--set", "augment.hflip=0.25"], "augment"),
        (["--teacher", out], "teacher"),
        (["--protocol", "demo", "--teacher", teacher], "epochs 8, not 1"),
        (["--method", "ce"], "method 'ce', not 'kd'"),
        (["--precision", "bf16-mixed"], "precision 'bf16-mixed', not '32-true'"),
    ):
        assert said in edgekd(*again, *more, code=1)


def test_a_resumed_run_keeps_what_no_flag_and_no_protocol_names(
    cells: Path, tmp_path: Path, asked: list[Protocol]
) -> None:
    """Neither the default student nor any other default replaces what the run was begun with."""
    (tmp_path / "t").mkdir()
    words = ["distill", "--data", cells, "--out", tmp_path / "r", "--protocol", "demo"]
    edgekd(*words, "--student", "msdnet", "--seed", "5", "--teacher", tmp_path / "t", "--lr", "0.01")
    begun = replace(asked[-1], stem="imagenet", precision="32-true")
    assert (begun.network, begun.split, begun.epochs) == ("msdnet", f"{tmp_path}/t/split.json", 8)
    (tmp_path / "r").mkdir()
    config.write_toml(tmp_path / "r" / "protocol.toml", begun)
    again = ["distill", "--data", cells, "--out", tmp_path / "r", "--resume"]
    (tmp_path / "other.toml").write_text("weight_decay = 5e-4\n")
    for more in ([], ["--protocol", tmp_path / "other.toml"], ["--set", "seed=5"]):
        edgekd(*again, *more)
        assert asked[-1] == begun
    assert "lr 0.05, not 0.01" in edgekd(*again, "--protocol", "demo", code=1)
    (tmp_path / "other.toml").write_text('network = "resnet18"\n')
    assert "network 'resnet18', not 'msdnet'" in edgekd(*again, "--protocol", tmp_path / "other.toml", code=1)
    edgekd("train", *again[1:])
    assert asked[-1].method == begun.method == "kd+sd"


def test_the_protocols_network_is_distilled(cells: Path, tmp_path: Path, asked: list[Protocol]) -> None:
    (tmp_path / "mine.toml").write_text('network = "msdnet"\n')
    edgekd("distill", "--data", cells, "--out", tmp_path / "r", "--protocol", tmp_path / "mine.toml")
    assert asked[-1].network == "msdnet"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "lrr=3"], "error: --set lrr=3: unknown key; known: "),
        (["--set", "lrr=3"], "Did you mean 'lr'?"),
        (["--set", "epochs=many"], "error: --set epochs=many: expected int, found 'many'"),
        (["--set", "augment.hflop=1"], "error: --set augment.hflop=1: unknown key"),
        (["--set", "preprocess=3"], "error: --set preprocess=3: "),
        (["--epochs", "0"], "error: --epochs 0: 0 is not above 0"),
        (["--lr", "-1"], "error: --lr -1.0: -1.0 is not above 0"),
        (["--precision", "fp8"], "error: --precision fp8: 'fp8' is none of "),
        (["--image-size", "0"], "error: --image-size 0"),
        (["--workers", "-2"], "error: --workers -2: -2 is negative"),
        (["--set", "anchor_every=30"], "error: --set anchor_every=30: 30 is above epochs"),
    ],
)
def test_an_error_names_the_command_line_value_and_not_the_file(
    words: list[str], said: str, cells: Path, tmp_path: Path
) -> None:
    out = edgekd("train", "--data", cells, "--model", "resnet18", "--out", tmp_path / "r", *words, code=1)
    assert said in out
    assert "finetune.toml" not in out


@pytest.mark.parametrize("command", ["compile", "bench"])
def test_other_commands_name_the_set_value_too(command: str, student_onnx: Path, cells: Path, tmp_path: Path) -> None:
    words: list[Any] = [command, student_onnx, "--out", tmp_path / "x", "--set", "no_such_key=1"]
    words += ["--data", cells] if command == "bench" else []
    assert "error: --set no_such_key=1: unknown key" in edgekd(*words, code=1)


def test_a_files_own_mistakes_stay_the_files(mine: Path, cells: Path, tmp_path: Path) -> None:
    mine.write_text("lrr = 3\n")
    text = edgekd("train", "--data", cells, "--protocol", mine, "--epochs", "2", "--out", tmp_path / "r", code=1)
    assert f"{mine}:" in text
    assert "--epochs" not in text
