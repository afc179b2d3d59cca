"""Telling from its imports that a test needs torch, as if torch were not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import light


@pytest.fixture(autouse=True)
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(light, "missing", lambda: frozenset({"torch", "timm"}))


@pytest.fixture
def a_tensor() -> str:
    import torch

    return str(torch.zeros(1))


def helper() -> None:
    import timm  # noqa: F401


def test_imports_are_followed_through_the_project() -> None:
    assert light.needed(["torch.nn"]) == {"torch"}
    assert "torch" in light.needed(["edgekd.export"])
    assert "torch" in light.needed(["edgekd.training.train.train"])
    assert light.needed(["edgekd.runtime.classifier.Classifier", "edgekd.cli", "edgekd.bench.suite"]) == set()


def test_a_test_needs_what_the_functions_it_names_import(request: pytest.FixtureRequest) -> None:
    assert light.of_test(request.node) == {"timm"}
    assert callable(helper)


def test_a_test_needs_what_its_fixtures_import(request: pytest.FixtureRequest, a_tensor: str) -> None:
    assert light.of_test(request.node) == {"torch"}


def test_a_test_that_imports_nothing_is_left_in(request: pytest.FixtureRequest) -> None:
    assert light.of_test(request.node) == set()


@pytest.mark.parametrize(
    ("source", "heavy"), [("import torch", True), ("def test() -> None:\n    import torch", False)]
)
def test_only_modules_that_import_it_at_once_are_left_out(source: str, heavy: bool, tmp_path: Path) -> None:
    path = tmp_path / "test_one.py"
    path.write_text(source)
    assert light.pytest_ignore_collect(path) is (True if heavy else None)
