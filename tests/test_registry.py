"""Registries: edgekd's own entries, those of installed packages, and what is wrong with a package's."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd.confidence import CONFIDENCE_MEASURES, ConfidenceMeasure
from edgekd.errors import ConfigError
from edgekd.registry import Registry

OWN = {"margin": "edgekd.confidence:MARGIN", "entropy": "edgekd.confidence:ENTROPY"}
MODULE = """
from edgekd.confidence import MARGIN, ConfidenceMeasure
NUMBER = 3
class Measure(ConfidenceMeasure):
    pass
"""


def install(folder: Path, package: str, entries: dict[str, str]) -> None:
    """What a package manager leaves of a package: its metadata, in a folder of `sys.path`."""
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[edgekd.test_measures]", *lines, ""]))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "test_measures_module.py").write_text(MODULE)
    return tmp_path


def registry() -> Registry[ConfidenceMeasure]:
    return Registry("measure", "test_measures", ConfidenceMeasure, OWN)


def test_a_packages_entries_follow_edgekds_own(folder: Path) -> None:
    install(folder, "mine", {"z": "test_measures_module:MARGIN", "a": "test_measures_module:Measure"})
    measures = registry()
    assert list(measures) == ["margin", "entropy", "a", "z"]
    assert (len(measures), "z" in measures, "y" in measures) == (4, True, False)
    assert measures["z"] is measures["margin"] is CONFIDENCE_MEASURES["margin"]
    assert measures["a"].__name__ == "Measure"  # type: ignore[attr-defined]  # a subclass is an entry, too


def test_an_unknown_name_is_an_error_with_the_nearest(folder: Path) -> None:
    install(folder, "mine", {"gini": "test_measures_module:MARGIN"})
    with pytest.raises(ConfigError, match=r"no measure 'ginny'\nknown: entropy, gini, margin\. Did you mean 'gini'\?"):
        registry()["ginny"]


@pytest.mark.parametrize("other", ["edgekd's own", "test_measures_module:MARGIN"])
def test_one_name_of_two_packages_is_an_error(other: str, folder: Path) -> None:
    name = "gini" if other != "edgekd's own" else "margin"
    install(folder, "mine", {name: "test_measures_module:MARGIN"})
    if name == "gini":
        install(folder, "yours", {name: "test_measures_module:MARGIN"})
    with pytest.raises(ConfigError, match=rf"two packages provide the measure '{name}': .* and {other}"):
        list(registry())


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("test_measures_missing:MARGIN", r"of mine cannot be imported: ModuleNotFoundError: .*test_measures_missing"),
        ("test_measures_module:GINI", r"of mine cannot be imported: AttributeError: .*GINI"),
        ("test_measures_module:NUMBER", r"of mine is not a ConfidenceMeasure: test_measures_module:NUMBER"),
    ],
)
def test_an_unusable_entry_names_its_package_when_it_is_used(entry: str, problem: str, folder: Path) -> None:
    install(folder, "mine", {"gini": entry})
    measures = registry()
    assert "gini" in measures
    with pytest.raises(ConfigError, match=rf"the measure 'gini' {problem}[\s\S]*repair or uninstall mine"):
        measures["gini"]
    assert measures["margin"].name == "margin"
