"""What every reader refuses: a flipped bit, weights that are no numbers, odd JSON and TOML, other graphs than ours."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edgekd import config
from edgekd.artifacts.manifest import MANIFEST, EngineFile, read_manifest, write_manifest
from edgekd.artifacts.metadata import put_metadata, read_onnx, read_student
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import find_backend
from edgekd.bench.record import read_record
from edgekd.compiler.build import compile_engine
from edgekd.data.images import load
from edgekd.data.preprocess import Preprocess
from edgekd.data.split import read_split
from edgekd.errors import ArtifactError, ConfigError, EdgekdError, GateError
from edgekd.export import export, model_metadata
from edgekd.models.networks import build
from edgekd.models.weights import read_state
from edgekd.policy import Policy
from edgekd.runtime.classifier import Classifier
from edgekd.runtime.engine import open_engine
from edgekd.training import run_folder
from edgekd.training.protocol import Protocol

IMAGES = np.random.default_rng(0).normal(size=(5, 3, 16, 16)).astype(np.float32)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder's model.safetensors, an anchor and resume.pt."""
    folder = tmp_path_factory.mktemp("trained")
    network = build("multi-exit-test_resnet", classes=3, image_size=32)
    metadata = run_folder.RunMetadata("multi-exit-test_resnet", tuple("abc"), Preprocess(32), (1, 2, 3, 4))
    for path in (folder / run_folder.MODEL, run_folder.anchor(folder, 1)):
        run_folder.save_model(path, network, metadata)
    state = {"network": network.state_dict(), "criterion": {}, "optimizer": {}, "epoch": 1, "history": [], "best": 0.5}
    run_folder.save_resume(folder, {**state, "digest": "d"})
    return folder


@pytest.fixture(scope="session", params=["onnxruntime", "openvino"])
def built(request: pytest.FixtureRequest, small_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine that is tuned to leave early, of each backend."""
    folder, recipe = tmp_path_factory.mktemp("built") / "e.engine", Recipe("fp32", batch_sizes=(1,), graphs="all")
    compile_engine(read_student(small_student), folder, recipe=recipe, backend=request.param, validation=None)
    manifest = read_manifest(folder)
    policy = Policy((1.0,) * 3, (0.25, 0.3))
    write_manifest(
        folder, dataclasses.replace(manifest, metadata=dataclasses.replace(manifest.metadata, policy=policy))
    )
    return folder


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy.engine"))


def remade(engine: Path, **changes: Any) -> Path:
    """The engine with another manifest, whose digest is right."""
    write_manifest(engine, dataclasses.replace(read_manifest(engine), **changes))
    return engine


READERS: dict[str, Callable[[Path], Any]] = {
    "student.onnx": read_onnx,
    run_folder.MODEL: lambda path: run_folder.load_model(path.parent),
    "anchors/epoch_0001.safetensors": read_state,
    run_folder.RESUME: lambda path: run_folder.load_resume(path.parent, digest="d"),
}


@pytest.mark.parametrize("name", READERS)
def test_one_flipped_bit_anywhere(name: str, trained: Path, small_student: Path, tmp_path: Path) -> None:
    source = small_student if name == "student.onnx" else trained / name
    path, data, rng = tmp_path / source.name, source.read_bytes(), np.random.default_rng(0)
    path.write_bytes(data)
    READERS[name](path)
    ends = [0, len(data) - 1, *rng.integers(len(data) - 2000, len(data), size=40)]
    for at in (*ends, *rng.integers(len(data), size=40)):
        edited = bytearray(data)
        edited[at] ^= 1 << rng.integers(8)
        path.write_bytes(edited)
        with pytest.raises(ArtifactError, match=str(path.parent)):
            READERS[name](path)


def test_files_without_a_digest(trained: Path, small_student: Path, tmp_path: Path) -> None:
    """Those of an earlier edgekd."""
    model = onnx.load(str(small_student))
    metadata = next(p for p in model.metadata_props if p.key == "edgekd")
    metadata.value = json.dumps({k: v for k, v in json.loads(metadata.value).items() if k != "sha256"})
    onnx.save(model, str(tmp_path / "student.onnx"))
    with pytest.raises(ArtifactError, match="has no SHA-256"):
        read_onnx(tmp_path / "student.onnx")
    torch.save(torch.load(trained / run_folder.RESUME, weights_only=True), tmp_path / run_folder.RESUME)
    with pytest.raises(ArtifactError, match="SHA-256 differs"):
        run_folder.load_resume(tmp_path, digest="d")


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_weights_that_are_not_finite(bad: float, small_student: Path, tmp_path: Path) -> None:
    network = build("multi-exit-test_resnet", classes=3, image_size=32).eval()
    name, weight = next((n, p) for n, p in network.named_parameters() if p.dim() > 1)
    good = network.state_dict()
    torch.save(good, tmp_path / "w.pth")
    read_state(tmp_path / "w.pth")
    with torch.no_grad():
        weight.view(-1)[7] = bad
        out = network(torch.zeros(1, 3, 32, 32))
    metadata = run_folder.RunMetadata("multi-exit-test_resnet", tuple("abc"), Preprocess(32), (1, 2, 3, 4))
    run_folder.save_model(tmp_path / run_folder.MODEL, network, metadata)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    for read in (lambda: run_folder.load_model(tmp_path), lambda: read_state(tmp_path / "w.pth")):
        with pytest.raises(ArtifactError, match=f"{name} holds values that are not finite"):
            read()
    described = model_metadata("net", tuple("abc"), Preprocess(32), out)
    with pytest.raises(GateError, match=r"weights of .* are not finite"):
        export(network, described, out=tmp_path / "n.onnx", images=IMAGES, names=[""] * 5)
    model, metadata = read_onnx(small_student)
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    values = numpy_helper.to_array(tensor).copy()
    values.flat[3] = bad
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    put_metadata(model, metadata)
    onnx.save(model, str(tmp_path / "s.onnx"))
    for read in (lambda: open_engine(tmp_path / "s.onnx"), lambda: compile_small(tmp_path / "s.onnx", tmp_path / "e")):
        with pytest.raises(ArtifactError, match=f"weights of {tensor.name} are not finite"):
            read()


def compile_small(source: Path, out: Path) -> None:
    recipe = Recipe("fp32", batch_sizes=(1,))
    compile_engine(read_student(source), out, recipe=recipe, backend="onnxruntime", validation=None)


def broken(folder: Path, how: str, other: Path) -> None:
    if how == "deleted":
        return shutil.rmtree(folder)
    for path in folder.iterdir():
        data = (other / path.name).read_bytes() if how == "replaced" else path.read_bytes()[:100]
        path.write_bytes(data)
    return None


@pytest.mark.parametrize("how", ["deleted", "replaced", "truncated"])
def test_replaced_files_do_not_change_an_open_engine(
    how: str, engine: Path, small_student: Path, tmp_path: Path
) -> None:
    backend = read_manifest(engine).backend
    other, recipe = tmp_path / "other.engine", Recipe("fp32", batch_sizes=(1,), graphs="all")
    model, metadata = read_onnx(small_student)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.5), tensor.name))
    put_metadata(model, metadata)
    onnx.save(model, str(tmp_path / "other.onnx"))
    compile_engine(read_student(tmp_path / "other.onnx"), other, recipe=recipe, backend=backend, validation=None)
    wanted = Classifier(engine, threads=1).run(IMAGES)
    opened = open_engine(engine, threads=1)
    classifier = Classifier(opened)
    broken(engine, how, other)
    assert not np.array_equal(Classifier(other, strategy="full").run(IMAGES).probabilities, wanted.probabilities)
    for size in (1, 5, 2):
        for start in range(0, 4, size):
            found = classifier.run(IMAGES[start : start + size])
            np.testing.assert_allclose(found.probabilities, wanted.probabilities[start : start + size], atol=1e-5)
    with pytest.raises(ArtifactError, match="monolithic"):  # not loaded before
        Classifier(opened, strategy="full")
    with pytest.raises(ArtifactError, match=r"was replaced since|no ONNX file|not a valid|is not the file"):
        open_engine(engine, digest=opened.digest)


@pytest.mark.parametrize(
    "name",
    ["../stage_0.onnx", "/etc/hostname", "inner/stage_0.onnx", MANIFEST, "..", "stage_9.onnx", "stage_0.txt", ""],
)
def test_manifests_list_the_backends_graphs(name: str, engine: Path) -> None:
    manifest = read_manifest(engine)
    file = next(iter(manifest.files.values()))
    if name == "":
        file_names = list(manifest.files)
        remade(engine, files={n: manifest.files[n] for n in file_names[1:]})
    else:
        if name.startswith("stage_"):
            (engine / name).write_bytes(b"x")
            file = EngineFile("stage_9", hashlib.sha256(b"x").hexdigest(), 1)
        remade(engine, files={**manifest.files, name: file})
    with pytest.raises(ArtifactError, match=r"manifest"):
        open_engine(engine)


def test_engines_that_contradict_their_metadata(engine: Path) -> None:
    metadata = read_manifest(engine).metadata
    cases = {
        "classes": dataclasses.replace(metadata, classes=(*metadata.classes, "f")),
        "reads": dataclasses.replace(metadata, preprocess=Preprocess(48)),
    }
    for said, changed in cases.items():
        remade(engine, metadata=changed)
        with pytest.raises(ArtifactError, match=said):
            open_engine(engine).stage(0)
    for times in ({"1": (1.0,) * 4}, {"one": (1.0,) * 3}, {"1": (-1.0,) * 3}, {"1": (1.0, 1.0, 1e80)}):
        table = json.loads((engine / MANIFEST).read_text())
        (engine / MANIFEST).write_text(json.dumps({**table, "stage_ms": times}))
        with pytest.raises(ArtifactError, match="stage_ms"):
            read_manifest(engine)


def external(model: onnx.ModelProto, place: str) -> None:
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", place), ("offset", "0"), ("length", str(size))):
        tensor.external_data.add(key=key, value=value)


@pytest.mark.parametrize("place", ["beside.bin", "../outside.bin", "/dev/zero"])
def test_weights_in_another_file(place: str, small_student: Path, tmp_path: Path) -> None:
    model, metadata = read_onnx(small_student)
    external(model, place)
    put_metadata(model, metadata)
    for file in (tmp_path / "beside.bin", tmp_path.parent / "outside.bin"):
        file.write_bytes(bytes(10_000_000))
    path = tmp_path / "student.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="in another file"):
        read_onnx(path)
    with pytest.raises(ArtifactError, match="in another file"):
        find_backend("onnxruntime").load(path, recipe=Recipe("fp32"), threads=1)


def loop(model: onnx.ModelProto) -> None:
    body = helper.make_graph([], "b", [], [])
    model.graph.node.append(helper.make_node("Loop", ["", ""], ["x"], body=body))


def function(model: onnx.ModelProto) -> None:
    model.functions.append(helper.make_function("own", "f", [], [], [], [helper.make_opsetid("", 17)]))


def shape(model: onnx.ModelProto, at: int, value: int) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[at].dim_value = value


ODD: dict[str, Callable[[onnx.ModelProto], Any]] = {
    "domain 'evil'": lambda m: m.opset_import.append(helper.make_opsetid("evil", 1)),
    "of the domain 'com.microsoft'": lambda m: setattr(m.graph.node[0], "domain", "com.microsoft"),
    "holds a graph": loop,
    "functions": function,
    r"inputs are \['x'\]": lambda m: setattr(m.graph.input[0], "name", "x"),
    "images is float16": lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.FLOAT16),
    r"images is float \(-1, 3, 48, 16\)": lambda m: shape(m, 2, 48),
    r"images is float \(4, 3, 16, 16\)": lambda m: shape(m, 0, 4),
    "outputs are": lambda m: m.graph.output.pop(),
    "exit_0 is float": lambda m: setattr(m.graph.output[0].type.tensor_type.shape.dim[1], "dim_value", 6),
    "Foo": lambda m: setattr(m.graph.node[0], "op_type", "Foo"),
}


@pytest.mark.parametrize("said", ODD)
def test_graphs_that_no_export_writes(said: str, small_student: Path, tmp_path: Path) -> None:
    model, metadata = read_onnx(small_student)
    ODD[said](model)
    put_metadata(model, metadata)
    path = tmp_path / "student.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=said):
        read_onnx(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", ["a", "a", "b", "c", "d"]),
        ("classes", ["a"]),
        ("classes", ["a", "b", "c", "d", ""]),
        ("exits", []),
        ("policy", {"temperatures": [0.0] * 3}),
        ("policy", {"temperatures": [1e-300] * 3}),
        ("policy", {"temperatures": [1.0] * 3, "thresholds": [-1.0] * 2}),
        ("policy", {"temperatures": [1.0] * 3, "confidence": "margn"}),
    ],
)
def test_invalid_metadata_is_refused(key: str, value: Any, small_student: Path, tmp_path: Path) -> None:
    model = onnx.load(str(small_student))
    metadata = next(p for p in model.metadata_props if p.key == "edgekd")
    metadata.value = json.dumps({**json.loads(metadata.value), key: value})
    onnx.save(model, str(tmp_path / "s.onnx"))
    with pytest.raises(ArtifactError, match=key):
        read_onnx(tmp_path / "s.onnx")


def test_invalid_policies_are_refused() -> None:
    for change in ({"thresholds": (NAN,)}, {"thresholds": (INF,)}, {"average": "meen"}, {"temperatures": (NAN, 1.0)}):
        with pytest.raises(ValueError, match=next(iter(change))):
            Policy(**{"temperatures": (1.0, 1.0), **change})  # type: ignore[arg-type]


JSONS = {
    "nested too deeply": "[" * 200_000,
    "nested": '{"subsets": ' + "[" * 100 + "]" * 100 + "}",
    "digits|64 bits": '{"seed": ' + "9" * 5000 + "}",
    "64 bits": '{"seed": 18446744073709551616}',
    "no number": '{"seed": NaN}',
    "no number ": '{"seed": 1e999}',
    "no text": '{"classes": ["\\ud800"]}',
    "no text ": '{"classes": ["a\\u0000"]}',
    "occurs twice": '{"classes": [], "classes": []}',
    "expected a table": "[]",
    "utf-8": b"\xff\xfe",
    "": "",
}


@pytest.mark.parametrize("said", JSONS)
@pytest.mark.parametrize("reader", ["split", "record", "manifest", "metadata", "run metadata"])
def test_invalid_json_in_every_reader(said: str, reader: str, small_student: Path, tmp_path: Path) -> None:
    content = JSONS[said]
    data = content if isinstance(content, bytes) else content.encode()
    path = tmp_path / (MANIFEST if reader == "manifest" else "x.json")
    path.write_bytes(data)
    if reader == "metadata":
        if isinstance(content, bytes):
            return  # metadata are text
        model = onnx.load(str(small_student))
        next(p for p in model.metadata_props if p.key == "edgekd").value = content
        onnx.save(model, str(path))
    if reader == "run metadata":
        if isinstance(content, bytes):
            return
        from safetensors.torch import save_file

        path = tmp_path / run_folder.MODEL
        save_file({}, path, metadata={"edgekd": content})
    read: dict[str, Callable[[], Any]] = {
        "split": lambda: read_split(path),
        "record": lambda: read_record(path),
        "manifest": lambda: read_manifest(tmp_path),
        "metadata": lambda: read_onnx(path),
        "run metadata": lambda: run_folder.load_model(tmp_path),
    }
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        read[reader]()


@pytest.mark.parametrize(
    "text",
    [
        "lr = nan",
        "lr = inf",
        "lr = -inf",
        "lr = -1.0",
        "lr = 0.1\nlr = 0.2",
        "seed = 99999999999999999999",
        "seed = " + "9" * 5000,
        "exits = " + "[" * 5000,
        "momentum = -0.5",
        "gamma = -1.0",
        "milestones = [-3]",
        'optimizer = "sdg"',
        'data = "\\u0000"',
    ],
)
def test_invalid_toml(text: str, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(text + "\n")
    with pytest.raises(ConfigError, match=str(path)):
        config.load(Protocol, "protocols", str(path))


def test_unreadable_toml(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "latin.toml").write_bytes('source = "é"'.encode("latin-1"))
    for name in ("folder.toml", "latin.toml", "none.toml"):
        with pytest.raises(ConfigError, match=name):
            config.load(Protocol, "protocols", str(tmp_path / name))


def test_toml_is_written_so_that_it_reads_the_same(tmp_path: Path) -> None:
    odd = Protocol(source='"\\\r\n\t\x7f\x1b é', loss_weights={"a.b": 1.0, "": 2.0})
    config.write_toml(tmp_path / "p.toml", odd)
    assert config.load(Protocol, "protocols", str(tmp_path / "p.toml")) == odd


def test_a_student_runs_elsewhere_by_its_metadata(small_student: Path, tmp_path: Path) -> None:
    """What somebody does who has the file, Pillow and ONNX Runtime, and not edgekd."""
    import onnxruntime as ort

    model = onnx.load(str(small_student))
    assert not [p for node in model.graph.node for p in node.metadata_props]
    says = {p.key: p.value for p in model.metadata_props}
    assert {k.split(".")[0] for k in says} == {
        "input", "image_size", "resize", "interpolation", "scale", "mean", "std", "output", "classes", "edgekd"
    }  # fmt: skip
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (50, 40, 3), np.uint8))
    picture.save(tmp_path / "p.png")
    side = int(says["image_size"])
    assert (says["resize"], says["interpolation"].split(",")[0], says["scale"]) == ("stretch", "bilinear", "1/255")
    pixels = np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR), np.float32) / 255
    mean, std = (np.array(says[k].split(","), np.float32) for k in ("mean", "std"))
    x = ((pixels - mean) / std).transpose(2, 0, 1)[None]
    np.testing.assert_allclose(x[0], load(tmp_path / "p.png", Preprocess(side)), atol=1e-5)
    logits = np.stack(ort.InferenceSession(small_student.read_bytes()).run(None, {"images": x}))
    assert "logits" in says["output"]
    powers = np.exp(logits)
    probabilities = (powers / powers.sum(axis=-1, keepdims=True)).mean(axis=0)[0]
    said = Classifier(small_student, strategy="full").predict(picture)
    assert said.label == json.loads(says["classes"])[int(probabilities.argmax())]
    np.testing.assert_allclose(said.probabilities, probabilities, atol=1e-5)


def test_another_number_of_outputs(small_student: Path, tmp_path: Path) -> None:
    """ONNX Runtime does not hold a graph to the shapes that it declares."""
    model, metadata = read_onnx(small_student)
    node = next(n for n in model.graph.node if "exit_0" in n.output)
    node.output[0] = "once"
    model.graph.node.append(helper.make_node("Concat", ["once", "once"], ["exit_0"], axis=0))
    put_metadata(model, metadata)
    onnx.save(model, str(tmp_path / "s.onnx"))
    for strategy in ("full", "cascade"):
        with pytest.raises(EdgekdError, match=r"gives \(2, 5\) for \(1, 3, 16, 16\)"):
            Classifier(tmp_path / "s.onnx", strategy=strategy).run(IMAGES[:1])


def test_outputs_that_are_not_finite(small_student: Path) -> None:
    classifier = Classifier(small_student, strategy="full")
    with pytest.raises(EdgekdError, match="not finite"):
        classifier.run(np.full((1, 3, 16, 16), 1e38, np.float32))
