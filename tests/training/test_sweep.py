"""Sweeps: several seeds and folds side by side, killed and resumed as a whole; the papers' protocols."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.cli import edgekd
from helpers.processes import heed_ctrl_c, wait_for_end_of

from edgekd import config
from edgekd.cli.job import requests_of
from edgekd.data.split import read_split
from edgekd.distill.hybrid import HybridOptions
from edgekd.errors import ConfigError
from edgekd.training import sweep
from edgekd.training.jobs import ChildJob, failure_reason, run_jobs
from edgekd.training.protocol import Protocol
from edgekd.training.request import EvaluateRequest, TrainRequest
from edgekd.training.sweep import SweepMember

FLAGS = [
    *("--weights", "none", "--epochs", "1", "--image-size", "16", "--batch-size", "8", "--workers", "0"),
    *("--set", "stem=small"),
]


def test_chen2022_is_the_papers() -> None:
    """Chen et al. 2022: SGD 0.9, decay 0.005, rate 1e-4, x0.1 at 30 and 60, 100 epochs, batch 16, five folds."""
    p = config.load(Protocol, "protocols", "chen2022")
    assert (p.optimizer, p.momentum, p.weight_decay, p.batch_size, p.epochs) == ("sgd", 0.9, 0.005, 16, 100)
    assert [p.lr_at(e) for e in (0, 29, 30, 59, 60, 99)] == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6])
    assert (p.method, p.label_smoothing, p.split, p.weights, p.sampler) == ("hybrid", 0.1, "kfold:5", "hub", "shuffle")
    assert p.options == {"hybrid": HybridOptions(mining="all", margin=1.0, squared=True)}
    assert (p.preprocess.image_size, p.preprocess.resize) == (224, "crop")
    assert (p.augment.rotation, p.augment.hflip, p.augment.vflip) == (180.0, 0.5, 0.0)
    assert p.augment.jitter == (0.3, 0.5, 0.3, 0.1)
    assert not p.augment.crops


def test_garg2022_is_the_papers() -> None:
    """Garg & Singh 2022: Adam 1e-3, x0.5 every 5 of 50 epochs, batch 64, 112 pixels, flips, tau 5, anchors every 5."""
    p = config.load(Protocol, "protocols", "garg2022")
    assert (p.optimizer, p.batch_size, p.epochs, p.anchor_every) == ("adam", 64, 50, 5)
    assert [p.lr_at(e) for e in range(50)] == pytest.approx([1e-3 * 0.5 ** (e // 5) for e in range(50)])
    assert (p.method, p.temperature, p.weights, p.preprocess.image_size) == ("multipart", 5.0, "none", 112)
    assert (p.augment.hflip, p.augment.vflip, p.augment.rotation, p.augment.crops) == (0.5, 0.0, 0.0, False)
    assert p.split == "ratio:64,16,20"  # 20 % test, and 20 % of the other 80 validation


def test_members() -> None:
    protocol = Protocol(split="kfold:3", seed=4)
    assert sweep.sweep_members("0,7", "all", protocol) == [SweepMember(s, f) for s in (0, 7) for f in (0, 1, 2)]
    assert sweep.sweep_members(None, "2", protocol) == [SweepMember(4, 2)]
    assert sweep.sweep_members("1", None, replace(protocol, split="ratio:3,1,1")) == [SweepMember(1, 0)]
    for seeds, folds, said in (("0,0", None, "distinct"), ("a", None, "0,1,2"), ("0", "3", "no fold 3")):
        with pytest.raises(ConfigError, match=said):
            sweep.sweep_members(seeds, folds, protocol)
    with pytest.raises(ConfigError, match="has no folds"):
        sweep.sweep_members("0", "all", replace(protocol, split="ratio:3,1,1"))


def test_summary_by_hand() -> None:
    """0.5, 0.7 and 0.9: mean 0.7, and 0.2 with n - 1."""
    runs = {f"seed{k}": {"exit_0": dict.fromkeys(sweep.METRICS, v)} for k, v in enumerate((0.5, 0.7, 0.9))}
    found = sweep.summary(runs)
    assert found["n"] == 3
    assert found["mean"]["exit_0"]["accuracy"] == pytest.approx(0.7)
    assert found["sd"]["exit_0"]["f1"] == pytest.approx(0.2)
    assert "70.00 ± 20.00" in sweep.summary_text(found)
    assert sweep.mean_and_sd([0.5, None]) == (0.5, None)


def test_teacher_and_student_over_two_folds(cells: Path, tmp_path: Path) -> None:
    """Each student finds its fold's teacher and split; a run that fails is named and does not take the others."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    words = ["train", "--data", cells, "--model", "resnet18", "--split", "kfold:3", "--seeds", "0", "--folds", "0,1"]
    text = edgekd(*words, *FLAGS, "--jobs", "2", "--out", teacher)
    assert "exit_0" in text
    assert "±" in text
    splits = [read_split(teacher / f"seed0-fold{k}") for k in range(2)]
    assert not {i.path for i in splits[0].subset("test")} & {i.path for i in splits[1].subset("test")}
    found = json.loads((teacher / "summary.json").read_text())
    each = [found["runs"][f"seed0-fold{k}"]["exit_0"]["accuracy"] for k in range(2)]
    assert found["mean"]["exit_0"]["accuracy"] == pytest.approx(sum(each) / 2)

    distill = ["distill", "--data", cells, "--teacher", teacher, "--student", "resnet18", "--method", "kd"]
    distill += ["--set", "split=kfold:3", "--seeds", "0", "--folds"]
    assert "without seed0-fold2" in edgekd(*distill, "all", *FLAGS, "--out", student, code=1)
    edgekd(*distill, "1", *FLAGS, "--out", student)
    assert read_split(student / "seed0-fold1") == splits[1]

    assert "already holds a run" in edgekd(*words, *FLAGS, "--out", teacher, code=1)
    more = [*words, *FLAGS, "--resume", "--out", teacher]
    assert "batch_size" in edgekd(*more, "--set", "batch_size=9", code=1)
    before = (teacher / "seed0-fold0/model.safetensors").stat().st_mtime_ns
    (teacher / "seed0-fold1/test.json").unlink()
    (teacher / "seed0-fold1/resume.pt").write_bytes(b"garbage")
    text = edgekd(*more, code=1)
    assert "1 of 2 runs failed" in text
    assert "seed0-fold1.log: error: " in text
    assert "resume.pt is damaged" in text
    assert json.loads((teacher / "summary.json").read_text())["n"] == 1
    assert (teacher / "seed0-fold0/model.safetensors").stat().st_mtime_ns == before


def test_what_a_sweep_asks_its_child_processes_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder, settings and log for each member; the requests reach the child process as they are."""
    jobs: list[ChildJob] = []
    monkeypatch.setattr(sweep, "run_jobs", lambda made, **_: jobs.extend(made) or {})
    data, out = tmp_path / "data", tmp_path / "out"
    for seed in (0, 7):
        (tmp_path / f"t/seed{seed}-fold0").mkdir(parents=True)
    request = TrainRequest(command="distill", data=data, out=out, seeds="0,7", labels=tmp_path / "l.csv", jobs=2)
    sweep.run_sweep(request, Protocol(network="msdnet", teacher=str(tmp_path / "t"), weights=str(tmp_path / "t")))
    for job, seed in zip(jobs, (0, 7), strict=True):
        folder, teacher = out / f"seed{seed}-fold0", f"{tmp_path}/t/seed{seed}-fold0"
        settings = config.load(Protocol, "protocols", f"{folder}.toml")
        assert (settings.network, settings.seed, settings.teacher, settings.weights) == (
            "msdnet",
            seed,
            teacher,
            teacher,
        )
        assert (job.name, job.log) == (folder.name, Path(f"{folder}.log"))
        train = TrainRequest(
            command="distill",
            data=data,
            out=folder,
            protocol=f"{folder}.toml",
            split=f"{teacher}/split.json",
            labels=tmp_path / "l.csv",
            resume=True,
        )
        assert job.requests == (train, EvaluateRequest(run=folder, data=data, out=folder / "test.json"))
        assert requests_of(job.to_json()) == job.requests


def start(cells: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    words = ["train", "--data", str(cells), "--model", "resnet18", "--seeds", "0,1", *FLAGS, *more]
    command = [sys.executable, "-m", "edgekd", *words, "--resume", "--out", str(out)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heed_ctrl_c
    )


def stop(process: subprocess.Popen[str], how: signal.Signals, out: Path, *, after: str) -> None:
    """End a sweep as soon as such a file is there; its children end with it."""
    while not list(out.glob(after)) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(how)
    process.communicate(timeout=60)
    wait_for_end_of(out)


@pytest.mark.slow
def test_killed_and_started_again(cells: Path, tmp_path: Path) -> None:
    """SIGKILL to the parent alone; a second start keeps what was finished and makes the rest."""
    out = tmp_path / "runs"
    stop(start(cells, out), signal.SIGKILL, out, after="*/test.json")
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*/test.json")}
    assert finished
    assert not (out / "summary.json").exists()
    text, _ = (process := start(cells, out)).communicate(timeout=300)
    assert process.returncode == 0, text
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    assert json.loads((out / "summary.json").read_text())["n"] == 2


@pytest.mark.slow
def test_ctrl_c_stops_all_children(cells: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    process = start(cells, out, "--jobs", "2")
    stop(process, signal.SIGINT, out, after="seed1*/protocol.toml")
    assert process.returncode == 130
    assert not list(out.glob("**/.*partial*"))
    assert not list(out.glob("*/test.json"))


def failing(name: str, folder: Path) -> ChildJob:
    """A job that tests a run that does not exist."""
    request = EvaluateRequest(run=folder / "nothing", data=folder, out=folder / "test.json")
    return ChildJob(name, (request,), folder / f"{name}.log")


def test_jobs_keep_their_order_and_the_deadline(tmp_path: Path) -> None:
    """b depends on a; d depends on c, which fails; nothing starts after the deadline."""

    def job(name: str, *depends_on: str) -> ChildJob:
        return ChildJob(name, (), tmp_path / f"{name}.log", depends_on)

    ended: list[str] = []
    jobs = [job("b", "a", "done before"), job("a"), failing("c", tmp_path), job("d", "c")]
    states = run_jobs(jobs, at_once=2, on_end=lambda job, state: ended.append(job.name))
    assert states == {"a": "done", "b": "done", "c": "failed", "d": "skipped"}
    assert ended.index("a") < ended.index("b")
    assert failure_reason(tmp_path / "c.log").startswith("error: ")
    assert run_jobs(jobs[1:2], deadline=time.monotonic()) == {"a": "skipped"}


def test_ray_if_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    jobs = [ChildJob(f"j{k}", (), tmp_path / f"{k}.log") for k in range(3)] + [failing("c", tmp_path)]
    assert list(run_jobs(jobs, at_once=2).values()) == ["done"] * 3 + ["failed"]
    assert "error: " in (tmp_path / "c.log").read_text()
