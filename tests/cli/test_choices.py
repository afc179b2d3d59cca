"""Every name that a user types is checked: a typing error is refused, with the nearest known name."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from helpers.cli import edgekd

from edgekd import config
from edgekd.artifacts.recipe import Recipe
from edgekd.bench.suite import Suite
from edgekd.cli.main import app
from edgekd.errors import ConfigError
from edgekd.training.protocol import Protocol

TRAIN = "train --data {cells} --out {out} --model resnet18"
DISTILL = "distill --data {cells} --out {out}"
REPRODUCE = "reproduce gao2022-table3 --data {cells}"
TYPING_ERRORS = {
    f"{TRAIN} --protocol demmo": "demo",
    f"{TRAIN} --precision 32-tru": "32-true",
    f"{TRAIN} --group clustr": "cluster",
    f"{TRAIN}8": "resnet18",
    f"{DISTILL} --student msdnett --method ce": "msdnet",
    f"{DISTILL} --method kdd": "kd",
    f"{DISTILL} --protocol demmo": "demo",
    f"{DISTILL} --precision 32-tru": "32-true",
    f"{DISTILL} --method ce --group clustr": "cluster",
    "evaluate {out} --subset tst": "test",
    "compile {student} --recipe int9": "int8",
    "compile {student} --backend openvin": "openvino",
    "tune {student} --data {cells} --split x --confidence margn": "margin",
    "tune {student} --data {cells} --split x --average meen": "mean",
    "predict {student} {cells} --strategy cascad": "cascade",
    "bench {student} --data {cells} --out {out}.json --no-report --suite quik": "quick",
    "reproduce gao2022-tabel3 --data {cells}": "gao2022-table3",
    f"{REPRODUCE} --protocol demmo": "demo",
    "models show resnet81": "resnet18",
    "models show resnet18 --stem smal": "small",
    "models cost resnet81": "resnet18",
    "models cost resnet18 --stem smal": "small",
    "data get kather --out {out}": "kather2016",
}
NO_CHOICE = {
    "set_": "checked key by key below",
    "weights": "a path, beside hub and none",
    "split": "a path, or a method with numbers",
    "exits": "feature points of the network",
    "seeds": "numbers",
    "folds": "numbers",
    "svm": "a feature point of the network",
    "images": "paths",
    "against": "NAME=PATH",
    "row": "labels of the table",
    "budget": "a time",
    "substitutes": "NETWORK=OTHER",
    "device": "gone with the device table",
}


@pytest.mark.parametrize("command", TYPING_ERRORS)
def test_a_typing_error_is_refused_with_the_nearest_name(
    command: str, student_onnx: Path, cells: Path, tmp_path: Path
) -> None:
    words = [word.format(student=student_onnx, cells=cells, out=tmp_path / "out") for word in command.split()]
    assert f"Did you mean '{TYPING_ERRORS[command]}'?" in edgekd(*words, code=1)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and not p.name.endswith("-lock")]


def callbacks() -> Iterator[tuple[str, Callable[..., Any]]]:
    for group in (app, *(info.typer_instance for info in app.registered_groups)):
        for command in group.registered_commands:
            assert command.callback
            yield command.name or command.callback.__name__, command.callback


def test_the_list_above_has_every_option_that_takes_text() -> None:
    tried = {(line.split()[0], word.strip("-").replace("-", "_")) for line in TYPING_ERRORS for word in line.split()}
    tried |= {("train", "model"), ("show", "name"), ("cost", "names"), ("get", "name"), ("reproduce", "table")}
    tried |= {(name, "stem") for name in ("show", "cost")} | {("list", "part"), ("reproduce", "group")}
    for name, callback in callbacks():
        for option, hint in typing.get_type_hints(callback).items():
            if str in (hint, *typing.get_args(hint)) or list[str] in (hint, *typing.get_args(hint)):
                assert (name, option) in tried or option in NO_CHOICE, f"edgekd {name} {option}"


def literals(cls: type, prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """The keys of a dataclass, and of those inside it, that take one of a few words."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from literals(typing.cast(type, hint), f"{prefix}{field.name}.")
        if typing.get_origin(hint) is Literal:
            yield prefix + field.name, typing.get_args(hint)


SETTINGS = [
    (cls, kind, name, key, known)
    for cls, kind, name in (
        (Protocol, "protocols", "demo"),
        (Recipe, "compile", "int8"),
        (Suite, "benchmarks/suites", "quick"),
    )
    for key, known in literals(cls)
]


@pytest.mark.parametrize(("cls", "kind", "name", "key", "known"), SETTINGS, ids=[f"{s[1]}:{s[3]}" for s in SETTINGS])
def test_a_typing_error_in_set_is_refused_with_the_nearest_name(
    cls: type, kind: str, name: str, key: str, known: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError, match=rf"--set {key}={known[0]}x: [\s\S]*Did you mean '{known[0]}'"):
        config.load(cls, kind, name, overrides={key: f"{known[0]}x"})


def test_the_settings_with_a_choice_are_found() -> None:
    found = {s[3] for s in SETTINGS}
    assert {"sampler", "schedule", "optimizer", "precision", "calibration_method", "preprocess.resize"} <= found
