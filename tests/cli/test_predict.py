"""`edgekd predict` row by row, and what the classifier in Python takes, tells and survives."""

from __future__ import annotations

import copy
import csv
import dataclasses
import gc
import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.cli import edgekd
from helpers.processes import heed_ctrl_c
from PIL import Image
from typer.testing import CliRunner

import edgekd as package
from edgekd.artifacts.metadata import put_metadata, read_onnx, read_student
from edgekd.artifacts.recipe import Recipe
from edgekd.cli.main import app
from edgekd.compiler.build import compile_engine
from edgekd.errors import ArtifactError, BackendError, ConfigError, DataError
from edgekd.runtime.classifier import Classifier, Prediction, class_columns
from edgekd.runtime.engine import open_engine

WAYS = ("table", "csv", "json")
ODD = [
    *("=cmd|' C calc'!A0.png", "a\x1b[2J\x1b[31mred.png", "a\nb.png", 'quote",.png', "\u202egnp.png", "c\r.png"),
    *("-rf.png", "a|b.png", "x" * 240 + ".png", "b\udcff.png", "<b>.png", " .png", "細胞.png", "\x9b.png", "\x7f.png"),
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures, in two folders one of which is in the other, and a file that is none."""
    top, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("a.png", "b.png", "in/c.png", "in/d.png"):
        (top / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(top / name)
    (top / "notes.txt").write_text("no picture")
    return top


def asked(*words: str | Path, way: str) -> tuple[str, int]:
    """Standard output of predict, and its exit code."""
    flags = [] if way == "table" else [f"--{way}"]
    done = CliRunner().invoke(app, ["predict", *map(str, words), *flags])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.stdout, done.exit_code


def files(text: str, way: str) -> list[str]:
    """Which file each row is about."""
    if way == "json":
        return [row["file"] for row in json.loads(text)]
    if way == "csv":
        return [row["file"].removeprefix("'") for row in csv.DictReader(io.StringIO(text, newline=""))]
    at = len(text.splitlines()[0]) - len("file")  # where the last column begins
    return [line[at:].split(": ")[0] for line in text.splitlines()[1:]]


@pytest.mark.parametrize("way", WAYS)
def test_every_input_has_a_row_in_order(way: str, two_maps_onnx: Path, pictures: Path, tmp_path: Path) -> None:
    (cut := tmp_path / "cut.png").write_bytes((pictures / "a.png").read_bytes()[:80])
    (empty := tmp_path / "empty").mkdir()
    a, b = pictures / "a.png", pictures / "b.png"
    words = [b, a, cut, a, pictures / "gone.png", pictures / "in", empty, f"{pictures}/[ab].png", a]
    text, code = asked(two_maps_onnx, *words, way=way)
    expected = [b, a, cut, a, pictures / "gone.png", *sorted((pictures / "in").iterdir()), empty, a, b, a]
    assert files(text, way) == [str(file) for file in expected]
    assert code == 1
    for reason in ("cannot be decoded", "no such file", "no images in"):
        assert text.count(reason) == 1
    if way == "json":
        assert [bool(row.get("error")) for row in json.loads(text)] == [f in (cut, words[4], empty) for f in expected]
    assert asked(two_maps_onnx, *words[:2], way=way)[1] == 0


@pytest.mark.parametrize("way", WAYS)
def test_odd_names_are_one_line_each_and_nothing_steers(
    way: str, two_maps_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ODD:
        Image.new("RGB", (40, 40)).save(tmp_path / name, format="PNG")
    text, code = asked(two_maps_onnx, tmp_path, way=way)
    assert code == 0
    assert len(text.splitlines()) == len(ODD) + {"table": 1, "csv": 1, "json": 2}[way]
    assert not set(text) & set("\x1b\r\x7f\x9b\u202e\udcff")
    if way == "json":  # which keeps every name as it is
        assert {Path(row["file"]).name for row in json.loads(text)} == set(ODD)
    if way == "csv":
        rows = list(csv.reader(io.StringIO(text, newline="")))
        assert {len(row) for row in rows} == {6}
        assert not any(cell[:1] in tuple("=+-@\t\r") for row in rows for cell in row if cell)
    if way == "csv":  # where the name begins the cell
        monkeypatch.chdir(tmp_path)
        assert "\n'=cmd" in asked(two_maps_onnx, "*", way=way)[0]


def test_patterns_are_expanded_as_folders_are(two_maps_onnx: Path, pictures: Path) -> None:
    every = ["a.png", "b.png", "in/c.png", "in/d.png"]
    for pattern, expected in (
        ("*.png", every[:2]),
        ("**", every),
        ("**/*.png", every),
        ("*", every),
        ("i?/*", every[2:]),
    ):
        text, code = asked(two_maps_onnx, f"{pictures}/{pattern}", way="json")
        assert (files(text, "json"), code) == ([str(pictures / name) for name in expected], 0), pattern
    assert "no images in" in asked(two_maps_onnx, f"{pictures}/*.txt", way="json")[0]


def test_a_file_that_is_called_like_a_pattern_is_a_file(two_maps_onnx: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "[a].png").write_bytes((pictures / "a.png").read_bytes())
    assert asked(two_maps_onnx, tmp_path / "[a].png", way="csv")[1] == 0


def test_top_classes_and_probabilities(two_maps_onnx: Path, pictures: Path) -> None:
    (row,) = json.loads(asked(two_maps_onnx, pictures / "a.png", "--top-k", "3", way="json")[0])
    ranked = sorted(zip(row["probabilities"], "abcde"), reverse=True)[:3]
    assert [(one["probability"], one["label"]) for one in row["top"]] == ranked
    assert row["top"][0]["label"] == row["label"]
    text, _ = asked(two_maps_onnx, pictures / "a.png", "--top-k", "2", "--probabilities", way="csv")
    (cells,) = csv.DictReader(io.StringIO(text))
    assert [float(cells[name]) for name in "abcde"] == pytest.approx(row["probabilities"], abs=1e-6)
    assert cells["label_2"] == row["top"][1]["label"]
    assert row["top"][1]["label"] + f" {row['top'][1]['probability']:.3f}" in asked(
        two_maps_onnx, pictures / "a.png", "--top-k", "2", way="table"
    )[0]  # fmt: skip


def test_out_is_atomic_and_its_suffix_sets_the_format(two_maps_onnx: Path, pictures: Path, tmp_path: Path) -> None:
    for name in ("r.csv", "r.json"):
        text = edgekd("predict", two_maps_onnx, pictures, tmp_path / "gone.png", "--out", tmp_path / name, code=1)
        assert "4 of 5 images classified" in text
        assert len(files((tmp_path / name).read_text(), name[2:])) == 5
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--json", "--csv"], "--json and --csv"),
        (["--out", "r.txt"], "ends in neither .csv nor .json"),
        (["--probabilities"], "needs --csv"),
        (["--top-k", "6"], "has 5 classes"),
    ],
)
def test_invalid_options_are_refused(words: list[str], said: str, two_maps_onnx: Path, pictures: Path) -> None:
    assert said in edgekd("predict", two_maps_onnx, pictures, *words, code=1)


def test_threads_are_one_or_more(two_maps_onnx: Path, pictures: Path) -> None:
    for threads in ("0", "-1"):
        assert "--threads" in edgekd("predict", two_maps_onnx, pictures, "--threads", threads, code=2)


@pytest.mark.parametrize(("way", "how"), [("csv", signal.SIGKILL), ("json", signal.SIGINT), ("out", signal.SIGINT)])
def test_rows_printed_before_an_interrupt_are_complete(
    way: str, how: signal.Signals, two_maps_onnx: Path, pictures: Path, tmp_path: Path
) -> None:
    """Rows come as they are answered, and those that came are whole when the command is ended. A file is not there."""
    flags = ["--out", str(tmp_path / "r.csv")] if way == "out" else [f"--{way}"]
    words = [sys.executable, "-m", "edgekd", "predict", two_maps_onnx, *[pictures] * 5000, *flags]
    child = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=heed_ctrl_c,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert child.stdout
    if way == "out":
        begun = time.monotonic()
        while not list(tmp_path.glob(".r.csv*")) and time.monotonic() < begun + 60:
            time.sleep(0.05)
        first = ""
    else:
        first = "".join(child.stdout.readline() for _ in range(70))
        assert child.poll() is None
    child.send_signal(how)
    text = first + child.stdout.read()  # not `communicate`, which passes over what `readline` holds
    assert child.wait(timeout=60) == (130 if how == signal.SIGINT else -how)
    if way == "out":
        assert not list(tmp_path.glob("*.csv"))
    elif way == "json":
        assert 68 <= len(json.loads(text)) < 20_000
    else:
        assert text.endswith("\n")
        assert {line.count(",") for line in text.splitlines()} == {5}


def test_the_package_shows_its_api() -> None:
    assert dir(package) == ["Classifier", "EdgekdError", "Prediction", "__version__", "export_module"]
    assert all(getattr(package, name) for name in dir(package))


def test_every_kind_of_source_gives_the_same_prediction(two_maps_onnx: Path, pictures: Path) -> None:
    classifier, path = Classifier(two_maps_onnx, threads=1), pictures / "a.png"
    expected = classifier.predict(path)
    pixels = np.asarray(Image.open(path))
    with path.open("rb") as file:
        sources = [str(path), path.read_bytes(), file, io.BytesIO(path.read_bytes()), Image.open(path), pixels]
        answers = [classifier.predict(source) for source in sources]
        assert answers == [expected] * len(sources)
    assert [a.path for a in answers] == [path, None, None, None, None, None]
    grey = pixels[:, :, 0]
    assert classifier.predict(grey) == classifier.predict(grey[:, :, None]) == classifier.predict(np.dstack([grey] * 3))
    assert classifier.predict([path, pixels])[0].path == path


@pytest.mark.parametrize(
    "source",
    [None, 3, 2.5, object(), {"a": 1}, b"", b"no picture", "", "\0", io.BytesIO(b""), io.StringIO("text"), np.zeros(3),
     np.zeros((8, 8, 3)), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8), np.uint16), np.zeros((0, 8, 3), np.uint8),
     np.zeros((2, 8, 8, 3), np.uint8), iter("ab"), [None], [b"x"], (3,)],
    ids=lambda source: f"{source!r}"[:20],
)  # fmt: skip
def test_a_source_that_is_not_an_image_is_a_data_error(source: object, two_maps_onnx: Path) -> None:
    with pytest.raises(DataError):
        Classifier(two_maps_onnx, threads=1).predict(source)  # type: ignore[call-overload]


def test_a_classifier_tells_what_it_is_and_closes(two_maps_onnx: Path, pictures: Path) -> None:
    with Classifier(two_maps_onnx, threads=1) as classifier:
        assert repr(classifier) == "<Classifier onnxruntime fp32, full: 5 classes, 2 exits, image size 16, threads 1>"
        assert classifier.classes == tuple("abcde")
        assert classifier.exits[classifier.predict(pictures / "a.png").exit] == "exit_1"
    for call in (
        lambda: classifier.predict(pictures / "a.png"),
        lambda: classifier.engine.logits(np.empty((1, 3, 16, 16))),
    ):
        with pytest.raises(BackendError, match="is closed"):
            call()
    classifier.close()
    assert len(classifier.exits) == 2


def test_predictions_are_rows_with_a_column_for_each_class(two_maps_onnx: Path, pictures: Path) -> None:
    answer = Classifier(two_maps_onnx, threads=1).predict(pictures / "a.png")
    plain = {"path": str(pictures / "a.png"), "label": answer.label, "confidence": answer.confidence, "exit": 1}
    assert answer.row() == plain | {"deferred": False} | dict(zip("abcde", answer.probabilities))
    assert class_columns(("error", "b", "label")) == ["error (class)", "b", "label (class)"]
    assert Prediction("label", 0, 1.0, 0, (0.7, 0.3), classes=("label", "b")).row()["label (class)"] == 0.7


def test_deferred_images_are_marked(two_maps_onnx: Path, pictures: Path, tmp_path: Path) -> None:
    """A threshold between the confidences of two images defers one of them, in every format."""
    files = [pictures / "a.png", pictures / "b.png"]
    found = {str(p.path): p.confidence for p in Classifier(two_maps_onnx, threads=1).predict(files)}
    low, high = sorted(found.values())
    assert low < high
    model, metadata = read_onnx(two_maps_onnx)
    policy = dataclasses.replace(metadata.policy, defer_below=(low + high) / 2)
    put_metadata(model, dataclasses.replace(metadata, policy=policy))
    onnx.save(model, str(mine := tmp_path / "deferring.onnx"))
    expected = {file: confidence == low for file, confidence in found.items()}
    rows = csv.DictReader(io.StringIO(edgekd("predict", mine, *files, "--csv")))
    assert {row["file"]: row["deferred"] == "true" for row in rows} == expected
    objects = json.loads(edgekd("predict", mine, *files, "--json"))
    assert {row["file"]: row["deferred"] for row in objects} == expected
    head, *lines = edgekd("predict", mine, *files).splitlines()
    assert head.split() == ["label", "confidence", "exit", "deferred", "file"]
    assert {line.split()[-1]: "yes" in line.split() for line in lines} == expected
    assert "deferred" not in edgekd("predict", two_maps_onnx, *files)


def test_a_pickled_classifier_is_the_same_engine_or_none(two_maps_onnx: Path, pictures: Path, tmp_path: Path) -> None:
    (mine := tmp_path / "s.onnx").write_bytes(two_maps_onnx.read_bytes())
    classifier = Classifier(mine, strategy="final", threads=1)
    expected = classifier.predict(pictures / "a.png")
    for again in (pickle.loads(pickle.dumps(classifier)), copy.deepcopy(classifier)):
        assert (again.strategy, again.engine.threads) == ("final", 1)
        assert again.predict(pictures / "a.png") == expected
        pickled = pickle.dumps(again)
    model, metadata = read_onnx(mine)
    put_metadata(model, dataclasses.replace(metadata, network="another"))
    onnx.save(model, str(mine))
    with pytest.raises(ArtifactError, match="was replaced"):
        pickle.loads(pickled)
    with pytest.raises(ConfigError, match="cannot be pickled"):
        pickle.dumps(Classifier(open_engine(two_maps_onnx, threads=1)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_are_given_classifiers(method: str, two_maps_onnx: Path, pictures: Path) -> None:
    classifier = Classifier(two_maps_onnx, threads=2)
    expected = classifier.predict(pictures / "a.png")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        assert pool.submit(classifier.predict, pictures / "a.png").result(timeout=60) == expected


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("then", ["predict", "close", "open"])
def test_a_fork_neither_uses_nor_frees_what_its_parent_opened(
    backend: str, then: str, two_maps_onnx: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Both wait for threads that are not there. ONNX Runtime can be opened anew; OpenVINO cannot, and says so."""
    folder = tmp_path_factory.getbasetemp() / f"fork-{backend}.engine"
    if not folder.exists():
        recipe = Recipe("fp32", batch_sizes=(1,))
        compile_engine(
            read_student(two_maps_onnx),
            folder,
            recipe=recipe,
            backend=backend,
            validation=None,
            threads=2,
        )
    classifier = Classifier(folder, threads=2)
    picture = np.zeros((20, 20, 3), np.uint8)
    expected = classifier.predict(picture)

    def ask() -> bool:
        if then == "close":
            classifier.close()
            gc.collect()
            return True
        if then == "open" and backend == "onnxruntime":
            return Classifier(folder, threads=2).predict(picture) == expected
        with pytest.raises(BackendError, match="fork"):
            (Classifier(folder, threads=2) if then == "open" else classifier).predict(picture)
        return True

    assert in_a_fork(ask)
    assert classifier.predict(picture) == expected


def in_a_fork(ask: Callable[[], bool]) -> bool:
    """What a forked process says; no if it hangs."""
    if not (child := os.fork()):
        code = 1
        try:
            code = int(not ask())
        finally:
            os._exit(code)
    until = time.monotonic() + 30
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False
