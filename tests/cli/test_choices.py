"""Every name that a user types is checked: a typing error is refused, with the nearest known name."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator
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
ADD_EXITS = "add-exits {student} --data {cells} --out {out}"
TYPING_ERRORS = {
    ("train", "network"): (f"{TRAIN}8", "resnet18"),
    ("train", "protocol"): (f"{TRAIN} --protocol demmo", "demo"),
    ("train", "precision"): (f"{TRAIN} --precision 32-tru", "32-true"),
    ("train", "group"): (f"{TRAIN} --group clustr", "cluster"),
    ("distill", "network"): (f"{DISTILL} --student msdnett --method ce", "msdnet"),
    ("distill", "method"): (f"{DISTILL} --method kdd", "kd"),
    ("distill", "protocol"): (f"{DISTILL} --protocol demmo", "demo"),
    ("distill", "precision"): (f"{DISTILL} --precision 32-tru", "32-true"),
    ("distill", "group"): (f"{DISTILL} --method ce --group clustr", "cluster"),
    ("add-exits", "preprocess"): (f"{ADD_EXITS} --preprocess imagnet", "imagenet"),
    ("add-exits", "resize"): (f"{ADD_EXITS} --resize strech", "stretch"),
    ("add-exits", "interpolation"): (f"{ADD_EXITS} --interpolation bilinaer", "bilinear"),
    ("add-exits", "channels"): (f"{ADD_EXITS} --channels rbg", "rgb"),
    ("add-exits", "group"): (f"{ADD_EXITS} --group clustr", "cluster"),
    ("evaluate", "subset"): ("evaluate {out} --subset tst", "test"),
    ("compile", "recipe"): ("compile {student} --recipe int9", "int8"),
    ("compile", "backend"): ("compile {student} --backend openvin", "openvino"),
    ("compile", "device"): ("compile {student} --backend tensorrt-rtx --device rtx-4", "rtx-40"),
    ("compile", "graphs"): ("compile {student} --graphs stags", "stages"),
    ("tune", "confidence"): ("tune {student} --data {cells} --split x --confidence margn", "margin"),
    ("tune", "average"): ("tune {student} --data {cells} --split x --average meen", "mean"),
    ("predict", "strategy"): ("predict {student} {cells} --strategy cascad", "cascade"),
    ("bench", "suite"): ("bench {student} --data {cells} --out {out}.json --no-report --suite quik", "quick"),
    ("reproduce", "table"): ("reproduce gao2022-tabel3 --data {cells}", "gao2022-table3"),
    ("reproduce", "protocol"): ("reproduce gao2022-table3 --data {cells} --protocol demmo", "demo"),
    ("models show", "name"): ("models show resnet81", "resnet18"),
    ("models show", "stem"): ("models show resnet18 --stem smal", "small"),
    ("models cost", "names"): ("models cost resnet81", "resnet18"),
    ("models cost", "stem"): ("models cost resnet18 --stem smal", "small"),
    ("data get", "name"): ("data get kather --out {out}", "kather2016"),
    ("config show", "name"): ("config show int88", "int8"),
    ("config copy", "name"): ("config copy int88 {out}.toml", "int8"),
}
"""Words with one typing error, and the nearest name, by command and option."""
NO_CHOICE = {
    **dict.fromkeys(["set_", "overrides"], "checked key by key below"),
    **dict.fromkeys(["weights", "images", "against"], "paths"),
    **dict.fromkeys(["split", "seeds", "folds", "budget"], "numbers"),
    **dict.fromkeys(["exits", "svm"], "feature points of the network"),
    **dict.fromkeys(["mean", "std"], "numbers"),
    **dict.fromkeys(["row", "substitutes"], "rows and networks of the table"),
    **dict.fromkeys(["part", "text"], "any part of a name"),
    **dict.fromkeys(["max_miss", "min_sensitivity"], "classes of the network, checked in test_certify.py"),
}


@pytest.mark.parametrize("option", TYPING_ERRORS, ids=" ".join)
def test_a_typing_error_is_refused_with_the_nearest_name(
    option: tuple[str, str], student_onnx: Path, cells: Path, tmp_path: Path
) -> None:
    command, near = TYPING_ERRORS[option]
    words = [word.format(student=student_onnx, cells=cells, out=tmp_path / "out") for word in command.split()]
    assert f"Did you mean '{near}'?" in edgekd(*words, code=1)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and not p.name.endswith("-lock")]


def options() -> Iterator[tuple[str, str, Any]]:
    """The options of all commands: command, name and type."""
    for prefix, group in (("", app), *((f"{info.name} ", info.typer_instance) for info in app.registered_groups)):
        for command in group.registered_commands:
            assert command.callback
            for name, option in inspect.signature(command.callback, eval_str=True).parameters.items():
                yield prefix + (command.name or command.callback.__name__), name, option.annotation.__origin__


def test_every_option_that_takes_text_is_in_the_list() -> None:
    same_as_train = {(command, "group") for command in ("reproduce", "tune", "certify")}
    found = {
        (command, option)
        for command, option, hint in options()
        if {str, list[str]} & {hint, *typing.get_args(hint)} and option not in NO_CHOICE
    }
    assert found == TYPING_ERRORS.keys() | same_as_train


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
