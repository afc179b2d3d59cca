from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from helpers.records import CERTIFICATE, HOST, sample

from edgekd.bench.compare import compare
from edgekd.errors import ConfigError


def test_alike_records_make_one_table() -> None:
    one = sample()
    variants = tuple(v for v in one.variants if v.name != "exit_0")
    two = dataclasses.replace(one, variants=variants, load_before=(0.0, 0.0, 0.0), created="later", command="other")
    text = compare({"a.json": one, "b.json": two})
    lines = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    rows = {line[1].strip(): [c.strip() for c in line[2:-1]] for line in lines}
    assert rows["variant"][0] == "a.json: mean ms"
    assert rows["exit_0"][4:] == ["–"] * 4
    assert rows["cascade"][1] == rows["cascade"][5] == "1.00"
    assert rows["cascade"][2:4] == ["87.50", "12.2"]


def test_accuracies_on_the_same_images_are_tested() -> None:
    """Of 8 images, exit_0 has 3 wrong; in the other record it has none, and no 3 images are a difference."""
    one = sample()
    right = tuple(dataclasses.replace(v, predictions=one.labels) for v in one.variants)
    two = dataclasses.replace(one, variants=right)
    text = compare({"a.json": one, "b.json": two})
    assert "- accuracy of exit_0 of b.json against a.json: +37.50 points (0 lost, 3 gained)" in text
    assert "a difference" not in text
    assert "McNemar's exact test, p adjusted for 5 comparisons" in text
    other = dataclasses.replace(one, images=one.images[::-1], labels=one.labels[::-1])
    assert "b.json: other test images than a.json" in compare({"a.json": one, "b.json": other})


def test_certificates_are_beside_each_other() -> None:
    certified = dataclasses.replace(sample(), certificate=CERTIFICATE)
    text = compare({"a.json": sample(), "b.json": certified})
    assert "- a.json: nothing is certified" in text
    assert "- b.json: With 90 % certainty" in text
    assert "is certified" not in compare({"a.json": sample(), "b.json": sample()})


def test_refusal_names_every_difference() -> None:
    one = sample()
    host = dataclasses.replace(HOST, cpu="Other CPU", versions={"numpy": "2.1", "openvino": "2026.4"})
    two = dataclasses.replace(one, host=host, threads=4, split=dataclasses.replace(one.split, seed=7))
    with pytest.raises(ConfigError) as caught:
        compare({"a.json": one, "b.json": two})
    for part in (
        "cpu: a.json CPU 9000, b.json Other CPU",
        "threads: a.json 2, b.json 4",
        "numpy version: a.json 2.0, b.json 2.1",
        "openvino version: a.json none, b.json 2026.4",
        "split: ",
    ):
        assert part in str(caught.value)
    assert "python" not in str(caught.value)
    forced = compare({"a.json": one, "b.json": two}, force=True)
    assert "- differs: threads: a.json 2, b.json 4" in forced
    assert "| cascade |" in forced


ORIN = {"version": "8.6.1", "gpu": "Orin", "sm": "8.7", "cuda_runtime": "11.4"}
H100 = {"version": "10.3.0", "gpu": "NVIDIA H100", "sm": "9.0", "cuda_runtime": "12.6"}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"backends": {"tensorrt": H100}}, "tensorrt gpu: a.json Orin, b.json NVIDIA H100"),
        ({"backends": {"tensorrt": {**ORIN, "version": "10.3.0"}}}, "tensorrt version: a.json 8.6.1, b.json 10.3.0"),
        ({"backends": {"tensorrt": {**ORIN, "new fact": "7"}}}, "tensorrt new fact: a.json none, b.json 7"),
        ({"facts": {"power mode": "0 (MAXN)"}}, "power mode: a.json 2 (15W), b.json 0 (MAXN)"),
        ({"facts": {"power mode": "2 (15W)", "L4T": "36.4.3"}}, "L4T: a.json none, b.json 36.4.3"),
        ({"exact_int8": False}, "exact_int8: a.json True, b.json False"),
    ],
)
def test_one_reported_fact_that_differs_is_refused(change: dict[str, Any], line: str) -> None:
    """No list of facts is kept anywhere: one that a backend reports from tomorrow on is compared, too."""
    host = dataclasses.replace(HOST, facts={"power mode": "2 (15W)"}, backends={"tensorrt": ORIN})
    one = dataclasses.replace(sample(), host=host)
    two = dataclasses.replace(one, host=dataclasses.replace(host, **change))
    with pytest.raises(ConfigError) as caught:
        compare({"a.json": one, "b.json": two})
    assert f"  {line}\n" in f"{caught.value}\n"
    assert f"- differs: {line}" in compare({"a.json": one, "b.json": two}, force=True)


def test_energy_of_different_rails_is_refused() -> None:
    one, two = (dataclasses.replace(sample(), energy_source=source) for source in ("VDD_IN (INA3221)", ""))
    with pytest.raises(ConfigError, match=r"energy: a\.json VDD_IN \(INA3221\), b\.json not measured"):
        compare({"a.json": one, "b.json": two})


def test_engines_of_different_backends_compare_on_one_machine() -> None:
    one = sample()
    two = dataclasses.replace(one, host=dataclasses.replace(HOST, backends={"onnxruntime": {"version": "1.31"}}))
    assert "differs" not in compare({"a.json": one, "b.json": two})


def test_one_record_is_nothing_to_compare() -> None:
    with pytest.raises(ConfigError, match="cannot be compared"):
        compare({"a.json": sample()})
