from __future__ import annotations

import dataclasses

import pytest
from helpers.records import HOST, sample

from edgekd.bench.compare import compare
from edgekd.errors import ConfigError


def test_alike_records_make_one_table() -> None:
    one = sample()
    variants = tuple(v for v in one.variants if v.name != "exit_0")
    two = dataclasses.replace(one, variants=variants, load_before=(0.0, 0.0, 0.0), created="later", command="other")
    text = compare({"a.json": one, "b.json": two})
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in text.splitlines()}
    assert rows["variant"][0] == "a.json: mean ms"
    assert rows["exit_0"][3:] == ["–", "–", "–"]
    assert rows["cascade"][1] == rows["cascade"][4] == "1.00"
    assert rows["cascade"][2] == "87.50"


def test_refusal_names_every_difference() -> None:
    one = sample()
    host = dataclasses.replace(HOST, cpu="Other CPU", versions={"numpy": "2.1", "openvino": "2026.4"})
    two = dataclasses.replace(one, host=host, threads=4, split={**one.split, "seed": 7})
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


def test_one_record_is_nothing_to_compare() -> None:
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare({"a.json": sample()})
