from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
from helpers.records import CERTIFICATE, LIMITS, SUITE, sample, variant

from edgekd import config
from edgekd.bench.accuracy import Answered
from edgekd.bench.compare import compare
from edgekd.bench.comparisons import accuracy_note, accuracy_table
from edgekd.bench.metrics import METRICS
from edgekd.bench.record import Timing, read_record, refuse_existing, write_record
from edgekd.bench.suite import Limits, Suite
from edgekd.bench.tables import markdown, notes, summary_table, table, to_csv
from edgekd.bench.targets import target_text, targets, warnings
from edgekd.errors import ArtifactError
from edgekd.policy import Policy


def test_written_and_read_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(path, sample())
    assert read_record(path) == sample()
    text = path.read_text()
    assert '"[ 1, 2 ]"' in text  # lists of numbers are put on one line, texts that look like one are left
    assert max(map(len, text.splitlines())) > 200
    assert len(text.splitlines()) < 1000


def test_accuracies_are_tested_on_the_same_images() -> None:
    """Answers of plain: images 0 and 1 wrong; of the cascade: image 0. By pairs of images, these are one group."""
    header, rows = accuracy_table(sample()) or ([], [])
    assert header == ["accuracy, points", "against no-early-exit", "against plain"]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["cascade"] == ["same images right", "+12.50, p 1.000: within noise"]
    assert cells["no-early-exit"][0] == ""
    assert "plain" not in cells
    assert "does not state which images belong together" in accuracy_note(sample())
    grouped = dataclasses.replace(sample(), groups=(0, 0, 1, 1, 2, 2, 3, 3))
    assert "exact sign-flip test over 4 groups of images" in accuracy_note(grouped)
    assert "accuracy, points" in markdown(grouped)
    alone = dataclasses.replace(sample(), variants=sample().variants[:1])
    assert accuracy_table(alone) is None


def test_classes_certificate_and_deferral_are_on_the_page() -> None:
    deferring = tuple(
        dataclasses.replace(v, answered=Answered(6, 0.75, (0.35, 0.97), 0.0, (0.0, 0.46))) for v in sample().variants
    )
    page = markdown(dataclasses.replace(sample(), variants=deferring, certificate=CERTIFICATE))
    assert "Certified: With 90 % certainty, for images like those tested" in page
    assert "75.00 [35.00, 97.00]" in page
    assert "sensitivity at 95 % spec." in page
    assert "Certified" not in markdown(sample())
    assert "answered %" not in markdown(sample())


def test_older_records_have_none_of_the_newer_measures(tmp_path: Path) -> None:
    """As written before: no intervals, areas, groups or certificate. They are read and shown as they were."""
    write_record(path := tmp_path / "record.json", sample())
    old = json.loads(path.read_text())
    for key in ("groups", "certificate"):
        del old[key]
    del old["suite"]["specificity"]
    for v in old["variants"]:
        del v["answered"]
        v["metrics"] = {k: v["metrics"][k] for k in ("n", "accuracy", "macro", "per_class", "confusion", "ece")}
        for rates in (v["metrics"]["macro"], *v["metrics"]["per_class"].values()):
            del rates["sensitivity_interval"], rates["specificity_interval"]
    path.write_text(json.dumps(old))
    record = read_record(path)
    assert record.variants[0].metrics.accuracy_interval is None
    page = markdown(record)
    assert "ROC-AUC" not in page
    assert "| [95 %] |" not in page
    assert "| [95 %] |" in markdown(sample())
    assert "against plain" in page


def test_a_record_is_never_changed(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(path, sample())
    before = path.read_bytes()
    for attempt in (lambda: write_record(path, sample()), lambda: refuse_existing(path)):
        with pytest.raises(ArtifactError, match="exists"):
            attempt()
    assert path.read_bytes() == before


def test_damaged_foreign_and_newer_records_are_named(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    with pytest.raises(ArtifactError, match="no benchmark record"):
        read_record(path)
    write_record(path, sample())
    text = path.read_text()
    for bad in (text[: len(text) // 2], "{}", text.replace('"schema": 1', '"schema": 99')):
        path.write_text(bad)
        with pytest.raises(ArtifactError, match="record"):
            read_record(path)


ODD: dict[str, tuple[tuple[str | int, ...], object]] = {
    "an exit of 1e80": (("variants", 1, "exits", 0), 10**80),
    "an exit that the policy has not": (("variants", 1, "exits", 0), 3),
    "an exit below 0": (("variants", 1, "timings", 0, "exits", 0, 0), -1),
    "an answer that is no class": (("variants", 0, "predictions", 0), 3),
    "a label that is no class": (("labels", 0), -1),
    "an answer too few": (("variants", 0, "predictions"), [0]),
    "a label too few": (("labels",), [0]),
    "negative times": (("variants", 0, "timings", 0, "samples_ms", 0, 0), -1.0),
    "times of nothing": (("variants", 0, "timings", 0, "samples_ms"), []),
    "a round of nothing": (("preprocess_ms",), []),
    "a huge time": (("variants", 0, "timings", 0, "samples_ms", 0, 0), 1e300),
    "other batches": (("variants", 0, "timings", 1, "batch"), 16),
    "no batch of 1": (("variants", 0, "timings", 0, "batch"), 2),
    "rounds of another number": (("variants", 0, "peak_mib"), [1.0]),
    "negative memory": (("variants", 0, "before_mib", 0), -1.0),
    "turns of three": (("variants", 2, "interleaved_ms", 0), [[1.0], [1.0], [1.0]]),
    "two of a name": (("variants", 0, "name"), "cascade"),
    "no variants": (("variants",), []),
    "an accuracy above 1": (("variants", 0, "metrics", "accuracy"), 1.5),
    "a confusion of other images": (("variants", 0, "metrics", "confusion", 0, 0), 99),
    "a confusion that is no square": (("variants", 0, "metrics", "confusion", 0), [1]),
    "a split without a fingerprint": (("split", "fingerprint"), None),
    "an engine without a name": (("engine", "name"), None),
    "a precision that is text": (("engine", "precision"), {"int8": "all"}),
    "a point of nothing": (("curve", 0), {}),
    "an accuracy of no images": (("engine", "final_accuracy"), 0.9),
    "a fact that is a table": (("engine", "facts"), {"recipe": {}}),
    "a verdict without a limit": (("targets", 1, "limit"), None),
    "no threads": (("threads",), 0),
    "two classes of a name": (("classes",), ["a", "a", "b"]),
    "an image elsewhere": (("images", 0), "../../secret.png"),
}


@pytest.mark.parametrize("name", ODD)
def test_records_that_cannot_be(name: str, tmp_path: Path) -> None:
    """Each would end a view of it in a traceback, a hang or nonsense."""
    write_record(tmp_path / "good.json", sample())
    table = node = json.loads((tmp_path / "good.json").read_text())
    path, value = ODD[name]
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (tmp_path / "odd.json").write_text(json.dumps(table))
    with pytest.raises(ArtifactError, match=r"odd\.json is not a (valid )?benchmark record"):
        read_record(tmp_path / "odd.json")


def test_views_of_a_variant() -> None:
    cascade = sample().find("cascade")
    assert cascade is not None
    assert cascade.shares == (0.5, 0.25, 0.25)
    assert cascade.memory_mib == 34.5
    assert cascade.latency(1).mean == pytest.approx(0.5 * 1 + 0.25 * 2 + 0.25 * 3, rel=0.01)


def test_targets_by_hand() -> None:
    by_name = {t.name: t for t in sample().targets}
    faster = by_name["cascade faster than plain (resnet18, onnxruntime fp32)"]
    assert faster.value == pytest.approx(12 / 1.75, rel=0.01)
    assert faster.met is True
    assert len(faster.rounds) == 2
    assert "required ≥ 6: met" in target_text(faster)
    staged = by_name["cascade without early exit / monolithic engine, interleaved"]
    assert staged.rounds == pytest.approx((1.05, 1.1))
    assert staged.value == pytest.approx(1.075)
    assert staged.met is True
    assert by_name["accuracy of the cascade minus that of all exits' ensemble"].value == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (0, "+12.50 points, within noise (p 1.000); required ≥ -0.5: met"),
        (2, "-12.50 points, within noise (p 1.000); required ≥ -0.5: NOT"),
    ],
)
def test_a_cascade_above_or_below_all_exits_reads_well(wrong: int, said: str) -> None:
    record = sample()
    cascade = variant("cascade", 1.0, [0, 0, 0, 0, 1, 1, 2, 2], wrong=wrong)
    variants = tuple(cascade if v.name == "cascade" else v for v in record.variants)
    (text,) = [target_text(t) for t in targets(dataclasses.replace(record, variants=variants)) if "minus" in t.name]
    assert said in text


def test_without_limits_there_are_figures_and_no_verdicts() -> None:
    suite = dataclasses.replace(SUITE, targets=Limits())
    found = targets(dataclasses.replace(sample(), suite=suite))
    assert [t.value for t in found] == [t.value for t in sample().targets]
    assert {t.met for t in found} == {None}
    assert not any("met" in target_text(t) for t in found)


def test_a_suite_sets_limits() -> None:
    """Those in the comments of the shipped one, which itself has none."""
    quick = Path(__file__).parents[2] / "benchmarks" / "suites" / "quick.toml"
    assert config.load(Suite, "benchmarks/suites", str(quick)).targets == Limits()
    lines = re.findall(r"# (\S+ = [\d.]+)", quick.read_text().partition("[targets]")[2])
    pairs = [f"targets.{line.replace(' ', '')}" for line in lines]
    asked = config.load(Suite, "benchmarks/suites", "quick", overrides=config.parse_overrides(pairs))
    assert asked.targets == LIMITS


def test_targets_that_are_missed_say_so() -> None:
    record = sample()
    variants = [dataclasses.replace(v, overhead_ms=0.3) if v.name == "cascade" else v for v in record.variants]
    slow = {t.name: t for t in targets(dataclasses.replace(record, variants=tuple(variants)))}
    assert "NOT met" in target_text(slow["Python overhead for one image"])


def test_models_without_a_limit_are_not_judged() -> None:
    record = sample()
    variants = tuple(dataclasses.replace(v, name="other") if v.baseline else v for v in record.variants)
    first = targets(dataclasses.replace(record, variants=variants))[0]
    assert first.value > 6
    assert first.met is None
    assert "required" not in target_text(first)


def test_warnings() -> None:
    record = sample()
    text = "\n".join(warnings(record))
    assert "2 of 9" in text
    assert "energy: not measured" in text
    assert "unstable" not in text
    busy = dataclasses.replace(record, load_before=(3.0, 1.0, 1.0), policy=Policy((1.0, 1.0, 1.0)))
    assert "busy" in "\n".join(warnings(busy))
    assert "no cascade" in "\n".join(warnings(busy))
    engine = dataclasses.replace(record.engine, final_accuracy=0.98, validation_images=1000)
    for wrong, far in ((6, True), (0, False)):
        variants = (*record.variants, variant("final", 1.0, [2] * 8, wrong=wrong))
        text = "\n".join(warnings(dataclasses.replace(record, engine=engine, variants=variants)))
        assert ("far below the 98.00% on 1000 validation images" in text) is far


def test_markdown_is_a_table_of_all_variants() -> None:
    text = markdown(sample())
    assert text == markdown(sample())
    rows = [line for line in text.split("\n\n")[1].splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5 + 1
    assert len({row.replace("\\|", "").count("|") for row in rows}) == 1
    assert "50 / 25 / 25" in next(row for row in rows if row.startswith("| cascade"))
    assert "p99" not in rows[0]
    assert "met" in text


def test_p99_column_where_a_thousand_samples_are() -> None:
    record = sample()
    many = dataclasses.replace(record.variants[0], timings=(Timing(1, (tuple([1.0] * 1000),)), Timing(32, ((1.0,),))))
    header, rows = table(dataclasses.replace(record, variants=(many, *record.variants[1:])))
    at = header.index("p99")
    assert rows[0][at] == "1.00"
    assert rows[1][at] == "–"
    assert header.count("p99") == 1


def test_the_summary_has_four_columns() -> None:
    header, rows = summary_table(sample())
    assert header == ["variant", "mean ms", "accuracy %", "size MiB"]
    assert rows[1] == ["cascade", "1.75", "87.50", "12.2"]
    assert rows[-1][0] == "plain (resnet18, onnxruntime fp32)"


def test_every_view_shows_every_metric() -> None:
    """None keeps a list of its own: one entry in METRICS is a column of each."""
    record = sample()
    header, page, compared = table(record)[0], notes(record), compare({"a": record, "b": record}).splitlines()[0]
    columns = to_csv(record).splitlines()[0].split(",")
    assert [m.title for m in METRICS if m.title and not m.is_shown(record)] == [
        *("p99", "energy mJ", "answered %", "wrong of these %"),
    ]
    for metric in METRICS:
        assert set(metric.csv) <= set(columns)
        if metric.is_shown(record):
            assert any(column.endswith(metric.title) for column in header)
            assert f"{metric.title}: {metric.legend}" in page
        if metric.headline:
            assert metric.headline in summary_table(record)[0]
            assert f"b: {metric.headline} |" in compared


def test_csv_has_a_row_for_each_variant_and_batch() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(sample()))))
    assert len(rows) == 10
    assert rows[2]["variant"] == "cascade"
    assert float(rows[2]["accuracy"]) == 7 / 8
    assert rows[2]["exit_shares"] == "0.5000/0.2500/0.2500"
    assert rows[2]["energy_mj"] == ""
    assert float(rows[2]["images_per_s"]) == pytest.approx(1000 / float(rows[2]["mean_ms"]))
    assert None not in rows[0]
