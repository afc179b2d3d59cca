"""The papers' tables: printed numbers, run folders by content, budgets, states, and a small one from end to end."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cli import edgekd
from helpers.processes import heed_ctrl_c, wait_for_end_of

from edgekd import config
from edgekd.data.synthetic import write_cells
from edgekd.distill.methods import method_names as methods
from edgekd.errors import ConfigError
from edgekd.models.feature_points import find
from edgekd.models.networks import NETWORKS, build, library
from edgekd.reproduce import table_spec
from edgekd.reproduce.budget import START_S, Cuts, JobCost, fit, seconds
from edgekd.reproduce.plan import RunOptions, missing_jobs, plan, scaled
from edgekd.reproduce.report import Cell, Result, RowResult, row_states, write_result
from edgekd.reproduce.results import _cost, _measured, cached_cost, state_of
from edgekd.training.protocol import Protocol
from edgekd.training.sweep import SweepMember

PRINTED = {
    "gao2022-table2": [
        ("DeepPap", 93.58, 97.40, 96.90, 97.60),
        ("MLP", 88.54),
        ("deep convolutional + SVM", 93.35),
        ("deep fully connected + SVM", 94.44),
        ("CNN (VGG19)", 95.35),
        ("Mor-27", 88.47, 95.90, 90.90, 95.00),
        ("ResNet-101", 94.86, 99.10, 97.70, 98.70),
        ("DenseNet-121", 96.79, 99.00, 98.90, 99.20),
        ("GCN", 97.37, 99.60, 99.50, 99.60),
        ("ResNet50", 97.63, 97.62, 99.50, 98.43),
        ("Inception V3", 97.72, 97.62, 98.83, 98.24),
        ("compact VGG", 97.80, 97.80, 99.17, 98.28),
        ("multi-exit ResNet18", 98.52, 98.53, 98.68, 98.59),
    ],
    "gao2022-table3": [
        *(("ResNeSt50 + TL", 98.15), ("ResNet18", 95.31), ("ResNet18 + TL", 96.54)),
        *(("+ TL + KD", 97.66), ("+ TL + KD + SD", 98.52)),
    ],
    "gao2022-table4": [
        ("baseline (CE only)", 92.61, 95.44, 94.82, 95.31, 95.93),
        ("SCAN", 95.13, 95.43, 97.07, 96.32, 97.21),
        ("MSDNet", 96.76, 96.28, 95.66, 96.23, 96.47),
        ("paper", 95.65, 96.91, 97.16, 97.68, 98.15),
    ],
    "gao2022-table5": [
        *(("ResNeXt101", 97.04), ("ResNet18", 95.56), ("KD", 96.54), ("FitNets", 97.78), ("AT", 97.16)),
        *(("self-distillation (BYOT)", 96.79), ("VID", 96.42), ("paper", 98.15)),
    ],
    "gao2022-table6": [
        ("ResNet152, the teacher", 80.91),
        *(("ResNet50, none", 77.98), ("ResNet50, KD", 79.69), ("ResNet50, FIT", 80.51), ("ResNet50, AT", 80.41)),
        *(("ResNet50, VID", 79.24), ("ResNet50, RKD", 80.22), ("ResNet50, PKT", 80.57), ("ResNet50, AB", 81.21)),
        *(("ResNet50, CRD", 80.53), ("ResNet50, SSKD", 80.29), ("ResNet50, paper", 82.27)),
        *(("ResNet18, none", 77.09), ("ResNet18, KD", 79.86), ("ResNet18, FIT", 79.24), ("ResNet18, AT", 80.19)),
        *(("ResNet18, VID", 79.67), ("ResNet18, RKD", 79.60), ("ResNet18, PKT", 79.44), ("ResNet18, AB", 79.50)),
        *(("ResNet18, CRD", 79.81), ("ResNet18, SSKD", 80.36), ("ResNet18, paper", 80.56)),
    ],
    "chen2022-table2": [
        *(("SqueezeNet, cross-entropy",), ("SqueezeNet, hybrid loss",)),
        *(("MobileNetV2, cross-entropy",), ("MobileNetV2, hybrid loss",)),
        *(("ShuffleNetV2, cross-entropy",), ("ShuffleNetV2, hybrid loss", 96.18, 96.30, 96.23, 99.08)),
        *(("GhostNet, cross-entropy",), ("GhostNet, hybrid loss", 96.39, 96.42, 96.39, 99.09)),
    ],
    "chen2022-table3": [
        *(("AlexNet",), ("VGG19",), ("ResNet-101",), ("DenseNet-121", 96.79), ("GCN",), ("SqueezeNet",)),
        *(("MobileNetV2",), ("ShuffleNetV2, hybrid loss", 96.18, 6, 50, 7), ("GhostNet, hybrid loss", 96.39, 4, 50, 2)),
    ],
    "garg2022-table2": [
        ("teacher, MixNet-L", 92.58, 5.8, 23.218),
        ("student alone, MixNet-S", 88.02, 2.6, 10.44),
        ("vanilla KD, MixNet-S", 90.46, 2.6, 10.44),
        ("multi-part KD, MixNet-S", 92.10, 2.6, 10.44),
    ],
}
SPREAD = [0.16, 5.60, 0.62, 1.21, 0.42, 0.92, 0.74, 0.42, 0.57, 0.39, 0.65, 0.50, 0.31]


def request(**more: object) -> RunOptions:
    base = {"data": Path("cells"), "fingerprint": "f", "runs": Path("/runs")}
    return RunOptions(**(base | more))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PRINTED)
def test_the_printed_numbers(name: str) -> None:
    """Row by row and in the columns' order, as in the papers."""
    table = table_spec.read(name)
    found = [(row.label, *(row.printed[c] for c in table.columns if c in row.printed)) for row in table.rows]
    assert found == PRINTED[name]
    if name == "gao2022-table2":
        assert [row.spread["accuracy"] for row in table.rows] == SPREAD


def test_tables_name_what_edgekd_has() -> None:
    assert set(PRINTED) <= set(table_spec.names())
    known = frozenset().union(*library())
    for name in table_spec.names():
        table = table_spec.read(name)
        for job in table.jobs.values():
            assert methods(job.method)
            assert job.network in NETWORKS or job.network.removeprefix("multi-exit-") in known
            if job.svm:
                with torch.device("meta"):
                    find(build(job.network, classes=5, image_size=224), job.svm)
        for row in table.rows:
            assert row.unsupported or row.job or row.network in known


def test_wrong_tables(tmp_path: Path) -> None:
    text = 'caption = "c"\nsource = "s"\nprotocol = "demo"\ndata = { name = "d", images = 1 }\n'
    text += 'columns = { a = "prediction.f1" }\n'
    wrong = {
        "not a job": '[jobs.a]\nnetwork = "n"\n[[rows]]\nlabel = "r"\njob = "b"\n',
        "is not a column": '[jobs.a]\nnetwork = "n"\n[[rows]]\nlabel = "r"\njob = "a"\nprinted = { x = 1.0 }\n',
        "on each other: a < b < a": '[jobs.a]\nnetwork = "n"\nteacher = "b"\n[jobs.b]\nnetwork = "n"\nteacher = "a"\n'
        '[[rows]]\nlabel = "r"\njob = "a"\n',
    }
    for said, tail in wrong.items():
        (tmp_path / "t.toml").write_text(text + tail)
        with pytest.raises(ConfigError, match=said):
            table_spec.read(str(tmp_path / "t.toml"))
    assert "gao2022-table3" in edgekd("reproduce", "gao2022-table33", "--list", code=1)


def test_equal_jobs_of_several_tables_are_one_run() -> None:
    """The fine-tuned ResNeSt50 teaches in three tables, and the student of table 3 stands in table 2 too."""
    two, three, four, five = (plan(table_spec.read(f"gao2022-table{k}"), request()) for k in (2, 3, 4, 5))
    assert two["teacher"].folder == three["teacher"].folder == four["teacher"].folder != five["teacher"].folder
    assert two["student"].folder == three["student"].folder != four["student"].folder
    assert three["plain"].folder == five["plain"].folder
    assert two["vgg19"].folder == two["fully-connected-svm"].folder
    assert two["vgg19"].scores(SweepMember(0, 0)) != two["fully-connected-svm"].scores(SweepMember(0, 0))
    chen = (plan(table_spec.read(f"chen2022-table{k}"), request()) for k in (2, 3))
    assert len({p["ghostnet-hybrid"].folder for p in chen}) == 1


def test_rows_that_were_asked_for() -> None:
    table = table_spec.read("gao2022-table3")
    assert table.order(["ResNet18"]) == ["plain"]
    assert sorted(table.order(["+ TL + KD", "ResNet18 + TL"])) == ["finetuned", "kd", "teacher"]
    with pytest.raises(ConfigError, match="no row 'ResNet-18'"):
        table.order(["ResNet-18"])


def test_digests(tmp_path: Path) -> None:
    """A pinned one; what decides a result changes it, up through teachers and first weights, and nothing else does."""
    table = table_spec.read("gao2022-table3")

    def digests(**more: object) -> dict[str, str]:
        return {name: one.digest for name, one in plan(table, request(**more)).items()}

    first = digests()
    assert first["student"] == "3171e38b55b7"
    assert digests(data=Path("elsewhere"), runs=Path("/r"), overrides={"workers": 7}) == first
    for more in ({"fingerprint": "g"}, {"overrides": {"epochs": 9}}, {"group": "cluster"}, {"image_size": 96}):
        assert not set(digests(**more).values()) & set(first.values())
    (tmp_path / "resnet18.safetensors").write_bytes(b"w")
    given = digests(weights=tmp_path)
    assert {n for n in first if given[n] != first[n]} == {"finetuned", "kd", "student"}
    (tmp_path / "resnet18.safetensors").write_bytes(b"v")
    assert digests(weights=tmp_path)["student"] != given["student"]
    other = digests(substitutes={"resnest50d": "resnet50"})
    assert {n for n in first if other[n] != first[n]} == {"teacher", "kd", "student"}


def test_schedules_shrink_with_the_epochs() -> None:
    gao, garg = (config.load(Protocol, "protocols", name) for name in ("gao2022", "garg2022"))
    assert scaled(gao, 180) == gao
    assert scaled(gao, 9).milestones == (5, 8)  # 5 and 7.5
    assert scaled(gao, 9, keep=["milestones"]).milestones == (100, 150)
    ten = scaled(garg, 10)
    assert (ten.milestones, ten.anchor_every) == ((1, 2, 3, 4, 5, 6, 7, 8, 9), 1)
    assert scaled(garg, 3).anchor_every == 1
    planned = plan(table_spec.read("gao2022-table6"), request(epochs=18))
    assert [planned[f"resnet18-{m}"].protocol.options[m].init_epochs for m in ("ab", "sskd")] == [3, 6]
    with pytest.raises(ConfigError, match="not a number of epochs"):
        scaled(gao, 0)


def test_another_protocol_trains_its_way_and_keeps_the_papers_method() -> None:
    one = plan(table_spec.read("gao2022-table6"), request(protocol="finetune"))["resnet18-ab"].protocol
    assert (one.schedule, one.lr, one.batch_size, one.epochs, one.precision) == ("onecycle", 0.02, 64, 20, "auto")
    assert (one.temperature, one.split, one.options["ab"].init_epochs) == (3.0, "ratio:3,1,1", 3)
    assert (one.preprocess.image_size, one.augment.vflip, one.augment.transpose) == (32, 0.0, 0.5)


def test_differences_are_said(tmp_path: Path) -> None:
    (tmp_path / "resnet18.safetensors").write_bytes(b"w")
    asked = request(
        weights=tmp_path, epochs=9, image_size=96, substitutes={"resnest50d": "resnet50"}, overrides={"lr": 0.05}
    )
    planned = plan(table_spec.read("gao2022-table3"), asked)
    cut = ["9 epochs, not 180", "96 pixels, not 224", "lr 0.05, not 0.1"]
    assert planned["finetuned"].differences() == cut
    teacher = ["resnet50 in place of resnest50d", "random initial weights, not ImageNet's"]
    assert planned["teacher"].differences() == teacher + cut
    assert planned["student"].differences() == cut + [f"teacher: {text}" for text in teacher]
    assert plan(table_spec.read("gao2022-table3"), request())["plain"].differences() == []
    grouped = plan(table_spec.read("gao2022-table3"), request(group="cluster"))["plain"]
    assert grouped.differences() == ["split grouped by cluster"]


def test_a_tables_group_holds_unless_another_is_given() -> None:
    table = table_spec.read("gao2022-table3")
    table = dataclasses.replace(table, settings={**table.settings, "group": "cluster"})
    assert plan(table, request())["plain"].protocol.group == "cluster"
    assert plan(table, request(group="none"))["plain"].differences() == ["split grouped by none"]


def test_tasks_go_seed_by_seed_and_wait_for_what_they_need(tmp_path: Path) -> None:
    asked = request(runs=tmp_path)
    planned = plan(table_spec.read("gao2022-table3"), asked)
    jobs = missing_jobs(list(planned.values()), [SweepMember(0, 0), SweepMember(1, 0)], asked)
    assert [job.name.rpartition("/")[2] for job in jobs] == ["seed0-fold0"] * 4 + ["seed1-fold0"] * 4
    by_name = {job.name: job for job in jobs}  # without weights fine-tuning and plain training are one run
    student = by_name[planned["student"].job_name(SweepMember(1, 0))]
    assert student.depends_on == (
        planned["teacher"].job_name(SweepMember(1, 0)),
        planned["finetuned"].job_name(SweepMember(1, 0)),
    )
    settings = tmp_path / planned["student"].folder.name / "seed1-fold0.toml"
    assert config.load(Protocol, "protocols", str(settings)).teacher == str(planned["teacher"].folder / "seed1-fold0")
    done = planned["teacher"].folder / "seed0-fold0" / "test.json"
    done.parent.mkdir(parents=True)
    done.touch()
    assert len(missing_jobs(list(planned.values()), [SweepMember(0, 0), SweepMember(1, 0)], asked)) == 7


def test_budget_by_hand() -> None:
    """1000 images at 10 a second, 90 evaluated each epoch: 103 s an epoch at 224 pixels, a quarter of that at 112."""
    load = JobCost(epochs=180, image_size=224, train=1000, val=90, test=0, images_per_s=40.0, measured_at=112)
    assert load.seconds(1, 224) == pytest.approx(START_S + 103)
    assert load.seconds(1, 112) == pytest.approx(START_S + 25.75)
    assert fit([load], 10**9, repeats=3) == Cuts(180, 224, 3, pytest.approx(3 * (START_S + 180 * 103)))
    cuts = fit([load], START_S + 103 * 60.5, repeats=1)
    assert (cuts.epochs, cuts.image_size) == (60, 224)
    cuts = fit([load], START_S + 103 * 9, repeats=1)  # under ten epochs: pixels go first
    assert (cuts.epochs, cuts.image_size) == (17, 160)
    cuts = fit([load], START_S + 103 * 5 * (80 / 224) ** 2, repeats=1)
    assert (cuts.epochs, cuts.image_size) == (5, 80)
    least = START_S + 103 * 3 * (80 / 224) ** 2
    assert fit([load], 2 * least, repeats=3).repeats == 2
    assert fit([load], 1.0, repeats=3) == Cuts(3, 80, 1, pytest.approx(least))
    assert fit([load] * 4, 4 * 103 * 100, repeats=1, at_once=4).epochs == 180
    small = dataclasses.replace(load, image_size=32, measured_at=32)
    assert fit([small], 10.0, repeats=1).image_size == 32


@pytest.mark.parametrize(("text", "value"), [("30m", 1800), ("1h30m", 5400), ("90s", 90), ("2h", 7200)])
def test_times(text: str, value: float) -> None:
    assert seconds(text) == value


def test_no_times() -> None:
    for text in ("", "30", "m", "1.5h", "30m1h"):
        with pytest.raises(ConfigError, match="not a time"):
            seconds(text)


def test_measures_by_hand() -> None:
    exits = {"exit_0": {"accuracy": 0.5}, "exit_1": {"accuracy": 0.7}, "ensemble": {"accuracy": 0.6}}
    assert _measured(exits, "prediction.accuracy") == 0.6
    assert _measured(exits, "exit_1.accuracy") == 0.7
    assert _measured({"exit_0": {"accuracy": 0.5}}, "prediction.accuracy") == 0.5
    assert _measured({"exit_0": {"accuracy": 0.5}}, "ensemble.accuracy") is None
    assert _measured({"exit_0": {"accuracy": 0.5}}, "exit_0.accuracy") is None
    assert _measured(exits, "exit_2.accuracy") is None
    own = cached_cost("mlp", classes=5, image_size=32)
    assert _cost("cost.parameters", own) == pytest.approx(own.parameters / 1e6)
    assert _cost("mlp/cost.macs", own) == 1


def test_states(tmp_path: Path) -> None:
    assert state_of([], 3, 3, []) == ("reproduced", "")
    assert state_of(["9 epochs, not 180"], 2, 3, []) == ("partly", "9 epochs, not 180; n = 2 of 3")
    assert state_of([], 0, 3, []) == ("open", "not run yet")
    assert state_of([], 1, 3, ["a run failed"]) == ("partly", "n = 1 of 3; a run failed")
    cell = Cell(98.15, None, 97.0, 0.5)
    lines = (
        RowResult("ResNeSt50 + TL", "reproduced", "", {"accuracy": cell}),
        RowResult("ResNet18", "partly", "9 epochs, not 180", {"accuracy": cell}),
    )
    result = Result("gao2022-table3", "c", "s", (), "now", "0", {}, lines)
    further = dataclasses.replace(
        lines[1], reason="9 epochs, not 180; split grouped by cluster", differences=("9 epochs", "cluster")
    )
    write_result(tmp_path, "gao2022-table3-cluster", dataclasses.replace(result, rows=(further,)))
    assert [state for _, state, _ in row_states("gao2022-table3", tmp_path)] == ["open", "partly", *["open"] * 3]
    write_result(tmp_path, "gao2022-table3", result)
    text = edgekd("reproduce", "--list", "--out", tmp_path)
    assert all(f"{name}: " in text for name in PRINTED)
    assert "  ResNeSt50 + TL  reproduced\n" in text
    assert "  ResNet18        partly: 9 epochs, not 180\n" in text
    assert "  + TL + KD       open: not run yet\n" in text
    assert "outside edgekd" in text
    page = (tmp_path / "gao2022-table3.md").read_text()
    assert "| ResNeSt50 + TL | 98.15 | 97.00 ± 0.50 |" in page


SMALL = """
caption = "Two networks"
source = "none"
protocol = "demo"
data = { name = "cells", images = 60 }
columns = { accuracy = "prediction.accuracy", parameters = "cost.parameters" }
[jobs.teacher]
network = "resnet18"
weights = "imagenet"
[jobs.student]
network = "multi-exit-resnet18"
method = "kd"
teacher = "teacher"
weights = "teacher"
settings = { exits = [4] }
[[rows]]
label = "teacher"
job = "teacher"
printed = { accuracy = 90.0 }
[[rows]]
label = "student"
job = "student"
printed = { accuracy = 91.0 }
"""


@pytest.mark.slow
def test_killed_and_started_again(tmp_path: Path) -> None:
    """Speed is measured and SIGKILL comes after the first run: a second start keeps what was decided and finished, and
    no path gets into the table."""
    write_cells(tmp_path / "cells", count=60, size=24)
    (tmp_path / "small.toml").write_text(SMALL)
    runs, out = tmp_path / "runs", tmp_path / "out"
    words = ["reproduce", str(tmp_path / "small.toml"), "--data", str(tmp_path / "cells"), "--runs", str(runs)]
    words += ["--out", str(out), "--seeds", "0,1", "--set", "epochs=1", "--set", "preprocess.image_size=16"]
    words += ["--set", "batch_size=8", "--set", "workers=0", "--set", "stem=small", "--budget", "20m"]
    process = subprocess.Popen([sys.executable, "-m", "edgekd", *words], preexec_fn=heed_ctrl_c)
    while not list(runs.glob("*/*/test.json")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for_end_of(runs)
    finished = {path: path.stat().st_mtime_ns for path in runs.glob("*/*/test.json")}
    assert finished
    text = edgekd(*words)
    assert "reduced as at the first start" in text
    assert "budget 20m: 1 epochs, 16 pixels, 2 of 2 seeds and folds" in text
    assert f"; {4 - len(finished)} runs to do" in text
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    found = json.loads((out / "small.json").read_text())
    teacher, student = found["rows"]
    assert [run["folder"].rpartition("/")[2] for run in student["runs"]] == ["seed0-fold0", "seed1-fold0"]
    each = [100 * run["scores"]["exit_0"]["accuracy"] for run in teacher["runs"]]
    assert teacher["cells"]["accuracy"]["mean"] == pytest.approx(np.mean(each))
    assert teacher["cells"]["accuracy"]["sd"] == pytest.approx(np.std(each, ddof=1))
    assert teacher["state"] == "partly"
    assert "random initial weights, not ImageNet's; 1 epochs, not 8" in teacher["reason"]
    assert "first weights: random" in student["reason"]
    assert student["settings"]["weights"] == student["settings"]["teacher"]
    assert found["hosts"][0]["versions"]["edgekd"]
    assert str(tmp_path) not in (out / "small.json").read_text() + (out / "small.md").read_text()
    assert "; 0 runs to do" in edgekd(*words)
    text = edgekd(*words[:-2], "--seeds", "2", "--row", "teacher")
    assert text.startswith("1 runs to do")
    assert "student  " in text


def test_svm_on_features(tmp_path: Path) -> None:
    """Pictures that differ in their mean: features of an untrained network are enough to tell them apart."""
    pytest.importorskip("sklearn")
    from PIL import Image

    from edgekd.data.preprocess import Preprocess
    from edgekd.data.split import Item, Split
    from edgekd.training.svm import fit_svm

    rng = np.random.default_rng(0)
    items = []
    for k in range(24):
        label = k % 3
        pixels = rng.integers(80 * label, 80 * label + 60, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
        items.append(Item(f"{k}.png", label))
    split = Split(("a", "b", "c"), {"train": tuple(items[:18])}, "", 0, "none", 0, 0, "")
    network, preprocess = build("resnet18", classes=3, image_size=16).eval(), Preprocess(16)
    answer = fit_svm(network, "layer2", split=split, data=tmp_path, preprocess=preprocess)
    from edgekd.data.images import load_batch

    scores = answer(load_batch([tmp_path / i.path for i in items[18:]], preprocess))
    assert scores.shape == (1, 6, 3)
    assert scores[0].argmax(1).tolist() == [i.label for i in items[18:]]
    with pytest.raises(ConfigError, match="no feature point 'layer9'"):
        fit_svm(network, "layer9", split=split, data=tmp_path, preprocess=preprocess)
