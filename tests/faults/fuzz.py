"""Mutated inputs into edgekd's readers, in a child that is watched.

python tests/faults/fuzz.py --base FOLDER [--reader NAME,…] --count N [--out findings.jsonl] [--seed 0]

FOLDER is what tests/faults/base.py makes. Prints JSON, reader to kinds of outcome to their numbers, and exits with 1 if
one of them is a finding. same: read as if nothing had been changed. refused: an EdgekdError, or an OSError with reason
and path, which the command prints in one line. other: read as something else that makes sense. The others are findings:
wrong and nonsense (accepted), traceback, hang, memory, crash, executed (code in a pickle ran).

An input is a function of (reader, seed): `--only SEED --keep FOLDER` makes it again and writes it there. Mutators of
structure make the digests of our formats anew, so that what lies behind them is tried.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import mmap
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import mutate

HANG_S, MEMORY_MIB, ADDRESS_GIB = 15.0, 2048, 9  # of the processor's time; ten times as much on the clock
HARMLESS = ("same", "refused", "other")
ALLOWED = ("preprocess", "max_accuracy_drop")  # numbers below 0 mean something here
Outcome = tuple[str, str]


class Reader:
    """make(rng) writes an input and says what was done; read() reads it: ("same", "") or ("other", what it was)."""

    def __init__(self, base: Path, work: Path) -> None:
        self.base, self.work = base, work
        self.setup()

    def setup(self) -> None: ...
    def make(self, rng: random.Random) -> None: ...
    def read(self) -> Outcome: ...


def nonsense(flags: dict[str, bool]) -> Outcome:
    found = [name for name, on in flags.items() if on]
    return ("nonsense", "; ".join(found)) if found else ("other", "")


def odd_number(x: Any) -> bool:
    return isinstance(x, float) and not math.isfinite(x)


def numbers(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [n for v in tree.values() for n in numbers(v)]
    if isinstance(tree, (list, tuple)):
        return [n for v in tree for n in numbers(v)]
    return [tree] if isinstance(tree, (int, float)) and not isinstance(tree, bool) else []


def stray(path: str) -> bool:
    return path.startswith("/") or ".." in Path(path).parts or path in ("", ".") or "\0" in path


def resealed(data: bytes, digest: bytes) -> bytes:
    """A file whose digest holds again, if it still has one."""
    from edgekd.serialization import BLANK, seal

    blank = data.replace(digest, BLANK.encode()) if digest else data
    return blank.replace(BLANK.encode(), seal(blank).encode()) if blank.count(BLANK.encode()) == 1 else data


def blanked(text: str) -> str:
    """Metadata as JSON, ready for `resealed`."""
    from edgekd.serialization import BLANK

    table = json.loads(text)
    return json.dumps({**table, "sha256": BLANK} if isinstance(table, dict) else table)


# --- engines ----------------------------------------------------------------------------------------------------------


def _picture() -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)


class ManifestBytes(Reader):
    def setup(self) -> None:
        self.folder = self.work / "student.engine"
        shutil.copytree(self.base / "student.engine", self.folder, copy_function=os.link)
        self.path = self.folder / "manifest.json"
        self.good = self.path.read_bytes()
        self.path.unlink()
        from edgekd.artifacts.manifest import Manifest
        from edgekd.schema import from_dict

        self.value = from_dict(Manifest, json.loads(self.good), where="")

    def make(self, rng: random.Random) -> None:
        self.path.write_bytes(mutate.of_bytes(self.good, rng))

    def read(self) -> Outcome:
        from edgekd.artifacts.manifest import read_manifest

        return ("same", "") if read_manifest(self.folder) == self.value else ("wrong", "edited manifest accepted")


class ManifestStruct(ManifestBytes):
    """Edited, its digest made again, as anyone may; then opened and asked."""

    def make(self, rng: random.Random) -> None:
        from edgekd.artifacts import manifest
        from edgekd.schema import from_dict

        for _ in range(20):
            table = mutate.tree(json.loads(self.good), rng, keep=("digest",))
            try:
                manifest = from_dict(manifest.Manifest, {**table, "digest": ""}, where="")
                table["digest"] = manifest._digest(manifest)
            except Exception:
                if rng.random() < 0.7:
                    continue
            break
        self.path.write_text(json.dumps(table), encoding="utf-8", errors="surrogatepass")

    def read(self) -> Outcome:
        from edgekd.artifacts.manifest import read_manifest
        from edgekd.runtime.classifier import Classifier
        from edgekd.runtime.engine import open_engine

        manifest = read_manifest(self.folder)
        if manifest == self.value:
            return "same", ""
        engine = open_engine(self.folder, threads=1)
        found = Classifier(engine).predict(_picture())
        policy, metadata = manifest.metadata.policy, manifest.metadata
        return nonsense(
            {
                "file name outside": any(stray(n) for n in manifest.files),
                "graph that is run is in no list of files": not {"stage_0.onnx", "monolithic.onnx"}
                <= manifest.files.keys(),
                "policy not finite": any(map(odd_number, numbers(dataclasses.asdict(policy)))),
                "mean or std not finite": any(
                    map(odd_number, numbers([metadata.preprocess.mean, metadata.preprocess.std]))
                ),
                "classes not unique": len(set(metadata.classes)) != len(metadata.classes),
                "classes not as many as logits": len(metadata.classes) != len(found.probabilities),
                "confidence no number": not 0 <= found.confidence <= 1 + 1e-6,
                "stage times negative or not finite": any(
                    odd_number(float(x)) or x < 0 for x in numbers(manifest.stage_ms)
                ),
            }
        )


class EngineFiles(ManifestBytes):
    def setup(self) -> None:
        super().setup()
        self.path.write_bytes(self.good)
        self.files = {p: p.read_bytes() for p in sorted(self.folder.glob("*.onnx"))}
        self.touched: Path | None = None

    def make(self, rng: random.Random) -> None:
        if self.touched:
            self.touched.unlink()
            self.touched.write_bytes(self.files[self.touched])
        self.touched = rng.choice(list(self.files))
        self.touched.unlink()
        self.edited = mutate.of_bytes(self.files[self.touched], rng)
        self.touched.write_bytes(self.edited)

    def read(self) -> Outcome:
        from edgekd.artifacts.manifest import read_manifest

        read_manifest(self.folder)
        same = self.touched is not None and self.edited == self.files[self.touched]
        return ("same", "") if same else ("wrong", "edited engine file accepted")


class EngineRehashed(EngineFiles):
    """As EngineFiles, but the hashes are made again: what do the backend and the network's users make of it?"""

    def make(self, rng: random.Random) -> None:
        from edgekd.artifacts import manifest

        super().make(rng)
        assert self.touched
        file = dataclasses.replace(
            self.value.files[self.touched.name], sha256=hashlib.sha256(self.edited).hexdigest(), bytes=len(self.edited)
        )
        manifest.write_manifest(
            self.folder, dataclasses.replace(self.value, files=self.value.files | {self.touched.name: file})
        )

    def read(self) -> Outcome:
        from edgekd.runtime.classifier import Classifier
        from edgekd.runtime.engine import open_engine

        engine = open_engine(self.folder, threads=1)
        found = [Classifier(engine, strategy=s).predict(_picture()) for s in ("cascade", "full")]
        return nonsense({"confidence no number": not all(0 <= f.confidence <= 1 + 1e-6 for f in found)})


class OnnxBytes(Reader):
    def setup(self) -> None:
        self.path = self.work / "student.onnx"
        self.good = (self.base / "student.onnx").read_bytes()
        from edgekd.artifacts.manifest import read_metadata

        self.digest = read_metadata(self.base / "student.onnx").sha256.encode()

    def make(self, rng: random.Random) -> None:
        self.edited = mutate.of_bytes(self.good, rng)
        self.path.write_bytes(self.edited)

    def read(self) -> Outcome:
        from edgekd.artifacts.metadata import read_onnx

        read_onnx(self.path)
        return ("same", "") if self.edited == self.good else ("wrong", "edited file accepted")


class OnnxResealed(OnnxBytes):
    """The same with a right digest: what do the checks, the backend and the network's users make of it?"""

    def make(self, rng: random.Random) -> None:
        super().make(rng)
        self.edited = resealed(self.edited, self.digest)
        self.path.write_bytes(self.edited)

    def read(self) -> Outcome:
        from edgekd.artifacts.metadata import read_onnx
        from edgekd.runtime.classifier import Classifier
        from edgekd.runtime.engine import open_engine

        _, metadata = read_onnx(self.path)
        if self.edited == self.good:
            return "same", ""
        classifier = Classifier(open_engine(self.path, threads=1))
        found = classifier.predict(_picture())
        return nonsense(
            {
                "confidence no number": not 0 <= found.confidence <= 1 + 1e-6,
                "classes not as many as logits": len(metadata.classes) != len(found.probabilities),
                "classes not unique": len(set(metadata.classes)) != len(metadata.classes),
                "mean or std not finite": any(
                    map(odd_number, numbers([metadata.preprocess.mean, metadata.preprocess.std]))
                ),
                "policy not finite": any(map(odd_number, numbers(dataclasses.asdict(metadata.policy)))),
            }
        )


class OnnxStruct(OnnxResealed):
    def make(self, rng: random.Random) -> None:
        import onnx

        model = onnx.load_model_from_string(self.good)
        kind = rng.randrange(8)
        graph = model.graph
        metadata = next(p for p in model.metadata_props if p.key == "edgekd")
        if kind <= 2:
            table = mutate.tree(json.loads(metadata.value), rng)
            metadata.value = json.dumps(table).encode("utf-8", "replace").decode()
        elif kind == 3:
            node = rng.choice(graph.node)
            what = rng.randrange(4)
            if what == 0:
                graph.node.remove(node)
            elif what == 1 and node.input:
                node.input[0] = rng.choice([n.output[0] for n in graph.node])
            elif what == 2:
                node.op_type = rng.choice(["Relu", "Loop", "If", "Scan", "Foo", "Conv", "ConstantOfShape", "Tile"])
            else:
                node.domain = rng.choice(["com.microsoft", "evil", "ai.onnx.ml"])
        elif kind == 4 and graph.initializer:
            tensor = rng.choice(graph.initializer)
            what = rng.randrange(4)
            if what == 0:
                tensor.data_location = onnx.TensorProto.EXTERNAL
                place = rng.choice(
                    ["/etc/passwd", "../../../../etc/passwd", "student.onnx", "missing.bin", "/dev/zero"]
                )
                tensor.external_data.add(key="location", value=place)
                if rng.random() < 0.5:
                    tensor.ClearField("raw_data")
            elif what == 1 and tensor.dims:
                tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(mutate.NUMBERS[:15]) % 2**62
            elif what == 2:
                tensor.data_type = rng.randrange(24)
            else:
                tensor.raw_data = mutate.of_bytes(tensor.raw_data, rng)
        elif kind == 5:
            dims = graph.input[0].type.tensor_type.shape.dim
            dims[rng.randrange(len(dims))].dim_value = rng.choice([0, 1, 7, 2**31, 2**62])
        elif kind == 6:
            node = rng.choice([n for n in graph.node if n.attribute])
            attribute = rng.choice(node.attribute)
            if attribute.ints:
                attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(mutate.NUMBERS[:15]) % 2**62
            else:
                attribute.i = rng.choice(mutate.NUMBERS[:15]) % 2**62
        else:
            model.opset_import[0].version = rng.choice([0, 1, 6, 12, 17, 18, 25, 999])
            model.ir_version = rng.choice([0, 1, 3, 8, 99])
        with contextlib.suppress(ValueError):
            metadata.value = blanked(metadata.value)
        self.edited = resealed(model.SerializeToString(), b"")
        self.path.write_bytes(self.edited)


# --- JSON -------------------------------------------------------------------------------------------------------------


class SplitBytes(Reader):
    struct = False

    def setup(self) -> None:
        from edgekd.data.split import read_split

        self.good = (self.base / "run" / "split.json").read_bytes()
        self.path = self.work / "split.json"
        self.path.write_bytes(self.good)
        self.value = read_split(self.path)

    def make(self, rng: random.Random) -> None:
        if self.struct:
            self.path.write_text(json.dumps(mutate.tree(json.loads(self.good), rng)))
        else:
            self.path.write_bytes(mutate.of_bytes(self.good, rng))
        self.draw = rng.random() < 0.02

    def read(self) -> Outcome:
        from edgekd.data.split import read_split
        from edgekd.data.splitting import summary

        split = read_split(self.path)
        if split == self.value:
            return "same", ""
        summary(split)
        for subset in ("train", "val", "test"):
            split.subset(subset)
        items = [i for subset in split.subsets.values() for i in subset]
        seen = collections.Counter(i.path for i in items)
        return nonsense(
            {
                "label outside the classes": any(not 0 <= i.label < len(split.classes) for i in items),
                "path leads out of the data folder": any(stray(i.path) for i in items),
                "an image in two subsets or twice": max(seen.values()) > 1,
                "classes not unique": len(set(split.classes)) != len(split.classes),
                "unknown subset": bool(split.subsets.keys() - {"train", "val", "test", "certify"}),
            }
        )


class SplitStruct(SplitBytes):
    struct = True


class RecordBytes(Reader):
    struct = False

    def setup(self) -> None:
        from edgekd.bench.record import read_record

        self.good = (self.base / "record.json").read_bytes()
        self.path = self.work / "record.json"
        self.path.write_bytes(self.good)
        self.value = read_record(self.path)

    make = SplitBytes.make

    def read(self) -> Outcome:
        from edgekd.bench import plots
        from edgekd.bench.compare import compare
        from edgekd.bench.record import read_record
        from edgekd.bench.tables import markdown, to_csv

        record = read_record(self.path)
        if record == self.value:
            return "same", ""
        markdown(record), to_csv(record)
        compare({"a": self.value, "b": record}, force=True)
        if self.draw:  # slow
            plots.trade_off(record), plots.distribution(record.variants[0])
            (
                plots.exit_shares(record.variants[-1], record.labels, record.classes),
                plots.confusion_svg(record.variants[0].metrics),
            )
        return nonsense(
            {
                "numbers that are none": any(map(odd_number, numbers(dataclasses.asdict(record)))),
                "negative times": any(x < 0 for v in record.variants for t in v.timings for x in numbers(t.samples_ms)),
                "path leads out of the data folder": any(stray(i) for i in record.images),
                "label outside the classes": any(not 0 <= i < len(record.classes) for i in record.labels),
            }
        )


class RecordStruct(RecordBytes):
    struct = True


# --- TOML -------------------------------------------------------------------------------------------------------------


class Toml(Reader):
    struct = False

    def setup(self) -> None:
        import tomllib

        from edgekd import config
        from edgekd.artifacts.recipe import Recipe
        from edgekd.bench.suite import Suite
        from edgekd.device_profiles import DeviceProfile
        from edgekd.training.protocol import Protocol

        self.kinds = [
            (Protocol, "protocols"),
            (Recipe, "compile"),
            (Suite, "benchmarks/suites"),
            (DeviceProfile, "devices"),
        ]
        self.texts = [[p.read_bytes() for p in sorted(config.folder(kind).glob("*.toml"))] for _, kind in self.kinds]
        self.texts[0].append((self.base / "run" / "protocol.toml").read_bytes())
        self.load = tomllib.loads
        self.path = self.work / "edited.toml"

    def make(self, rng: random.Random) -> None:
        self.at = rng.randrange(len(self.kinds))
        text = rng.choice(self.texts[self.at])
        if self.struct:
            table = mutate.tree(self.load(text.decode()), rng, toml=True)
            self.path.write_text(mutate.toml_text(table), encoding="utf-8", errors="replace")
        else:
            self.path.write_bytes(mutate.of_bytes(text, rng))

    def read(self) -> Outcome:
        from edgekd import config

        cls, kind = self.kinds[self.at]
        spec = config.load(cls, kind, str(self.path))
        table = dataclasses.asdict(spec)
        positive = {k: v for k, v in table.items() if k not in ALLOWED}
        config.write_toml(self.work / "again.toml", spec)
        again = config.load(cls, kind, str(self.work / "again.toml"))
        return nonsense(
            {
                f"{cls.__name__}: a number that is none": any(map(odd_number, numbers(table))),
                f"{cls.__name__}: negative": any(x < 0 for x in numbers(positive)),
                f"{cls.__name__}: not the same when written and read": again != spec
                and not any(map(odd_number, numbers(table))),
            }
        )


class TomlStruct(Toml):
    struct = True


# --- weights ----------------------------------------------------------------------------------------------------------


class SafetensorsBytes(Reader):
    def setup(self) -> None:
        self.folder = self.work / "run"
        self.folder.mkdir()
        self.path = self.folder / "model.safetensors"
        self.good = (self.base / "run" / "model.safetensors").read_bytes()
        (size,) = struct.unpack("<Q", self.good[:8])
        self.digest = json.loads(json.loads(self.good[8 : 8 + size])["__metadata__"]["edgekd"])["sha256"].encode()

    def make(self, rng: random.Random) -> None:
        self.edited = mutate.of_bytes(self.good, rng, head=40_000)
        self.path.write_bytes(self.edited)

    def read(self) -> Outcome:
        from edgekd.training.run_folder import load_model

        load_model(self.folder)
        return ("same", "") if self.edited == self.good else ("wrong", "edited file accepted")


class SafetensorsResealed(SafetensorsBytes):
    """The same with a right digest."""

    def make(self, rng: random.Random) -> None:
        super().make(rng)
        self.edited = resealed(self.edited, self.digest)
        self.path.write_bytes(self.edited)

    def read(self) -> Outcome:
        import numpy as np
        import torch

        from edgekd.bench.accuracy import metrics
        from edgekd.policy import softmax
        from edgekd.training.run_folder import load_model

        network, metadata = load_model(self.folder)
        if self.edited == self.good:
            return "same", ""
        with torch.no_grad():
            size = metadata.preprocess.image_size
            out = network(torch.zeros(1, 3, size, size)).logits[0]
        metrics(softmax(out.numpy()), np.zeros(1, int), metadata.classes)  # as evaluation does, which refuses NaN
        return nonsense(
            {
                "weights not finite": not all(bool(torch.isfinite(v).all()) for v in network.state_dict().values()),
            }
        )


class SafetensorsStruct(SafetensorsResealed):
    def make(self, rng: random.Random) -> None:
        (size,) = struct.unpack("<Q", self.good[:8])
        head = json.loads(self.good[8 : 8 + size])
        if rng.random() < 0.5:
            inner = json.loads(head["__metadata__"]["edgekd"])
            head["__metadata__"]["edgekd"] = blanked(json.dumps(mutate.tree(inner, rng)))
            if rng.random() < 0.2:
                head["__metadata__"]["edgekd"] = mutate.of_bytes(head["__metadata__"]["edgekd"].encode(), rng).decode(
                    errors="replace"
                )
        else:
            head = mutate.tree(head, rng)
        text = json.dumps(head).encode()
        self.edited = resealed(struct.pack("<Q", len(text)) + text + self.good[8 + size :], self.digest)
        self.path.write_bytes(self.edited)


class ResumeBytes(Reader):
    def setup(self) -> None:
        import torch

        self.folder = self.work / "run"
        self.folder.mkdir()
        self.path = self.folder / "resume.pt"
        self.good = (self.base / "run" / "resume.pt").read_bytes()
        self.state = torch.load(io.BytesIO(self.good), weights_only=True)

    def make(self, rng: random.Random) -> None:
        head = rng.choice((None, 2000))
        self.edited = mutate.of_bytes(self.good, rng, head=head)
        if rng.random() < 0.3:  # the zip's directory and the pickle are at its ends
            cut = len(self.good) - 40_000
            self.edited = self.good[:cut] + mutate.of_bytes(self.good[cut:], rng)
        self.path.write_bytes(self.edited)

    def read(self) -> Outcome:

        from edgekd.training.run_folder import load_resume

        state = load_resume(self.folder, digest=self.state["digest"])
        assert state is not None
        if self.edited == self.good:
            return "same", ""
        return "wrong", "edited file accepted"


class ResumeResealed(ResumeBytes):
    """The same with a right digest."""

    def seal(self, data: bytes) -> bytes:
        return data[:-64] + hashlib.sha256(data[:-64]).hexdigest().encode()

    def make(self, rng: random.Random) -> None:
        super().make(rng)
        self.path.write_bytes(self.seal(self.edited))

    def read(self) -> Outcome:
        import torch

        from edgekd.training.run_folder import load_resume

        state = load_resume(self.folder, digest=self.state["digest"])
        assert state is not None
        for key in ("epoch", "history", "best", "network", "optimizer", "criterion"):
            state[key]
        return nonsense(
            {"weights not finite": any(not bool(torch.isfinite(v).all()) for v in state["network"].values())}
        )


class ResumeStruct(ResumeResealed):
    def make(self, rng: random.Random) -> None:
        import torch

        state = dict(self.state)
        what = rng.randrange(7)
        thing: Any = state
        if what < 3:
            state[rng.choice(list(state))] = rng.choice([None, 0, -1, [], {}, "x", torch.zeros(3), float("nan")])
        elif what == 3:
            del state[rng.choice(list(state))]
        elif what == 4:
            thing = rng.choice([None, 3, [], torch.zeros(2), "text", {}])
        elif what == 5:
            net = dict(state["network"])
            name = rng.choice(list(net))
            net[name] = rng.choice([torch.zeros(3), net[name].double(), net[name] * float("nan")])
            state["network"] = net
        else:

            class Evil:
                def __reduce__(self) -> Any:
                    return os.system, ("touch pwned",)

            state["evil"] = Evil()
        buffer = io.BytesIO()
        torch.save(thing if what == 4 else state, buffer)
        self.edited = self.seal(buffer.getvalue()[:-2] + b"\x40\0" + bytes(64))
        self.path.write_bytes(self.edited)


class CheckpointStruct(ResumeStruct):
    """The same as first weights: --weights FILE.pth."""

    def read(self) -> Outcome:
        import torch

        from edgekd.models.weights import read_state

        path = self.path.with_suffix(".pth")
        self.path.replace(path)
        state = read_state(path)
        return nonsense({"weights not finite": any(not bool(torch.isfinite(v).all()) for v in state.values())})


# --- pictures and archives --------------------------------------------------------------------------------------------


class Pictures(Reader):
    def setup(self) -> None:
        import numpy as np
        from PIL import Image

        from edgekd.data.preprocess import Preprocess

        self.preprocess = Preprocess(32)
        rng = np.random.default_rng(0)
        smooth = np.clip(np.cumsum(rng.normal(size=(48, 40, 4)), axis=0) * 8 + 128, 0, 255).astype(np.uint8)
        rgb, grey = Image.fromarray(smooth[..., :3].copy()), Image.fromarray(smooth[..., 0].copy())
        rgba, deep = Image.fromarray(smooth), Image.fromarray(smooth[..., 0].astype(np.uint16) * 257)
        exif = Image.Exif()
        exif[0x0112] = 6
        self.seeds: list[tuple[str, bytes]] = []

        def add(image: Any, kind: str, **options: Any) -> None:
            out = io.BytesIO()
            image.save(out, format=kind, **options)
            self.seeds.append((kind.lower(), out.getvalue()))

        add(rgb, "JPEG", exif=exif)
        add(rgb, "JPEG", progressive=True)
        add(rgb.convert("CMYK"), "JPEG")
        for image in (rgb, grey, rgba, deep, rgb.quantize(16), grey.convert("1")):
            add(image, "PNG")
        add(rgb, "BMP"), add(grey, "BMP"), add(rgb.quantize(16), "BMP")
        for options in (
            {},
            {"compression": "tiff_lzw"},
            {"compression": "tiff_adobe_deflate"},
            {"compression": "jpeg"},
        ):
            add(rgb, "TIFF", **options)
        (
            add(deep, "TIFF"),
            add(grey.convert("F"), "TIFF"),
            add(rgba, "TIFF"),
            add(grey.convert("1"), "TIFF", compression="group4"),
        )
        add(rgb, "WEBP"), add(rgba, "WEBP", lossless=True), add(rgb, "GIF"), add(rgb, "PPM"), add(grey, "PPM")

    def make(self, rng: random.Random) -> None:
        kind, data = rng.choice(self.seeds)
        self.kind = kind
        edited = mutate.png(data, rng) if kind == "png" and rng.random() < 0.5 else mutate.of_bytes(data, rng, head=200)
        self.path = self.work / f"picture.{kind}"
        self.path.write_bytes(edited)

    def read(self) -> Outcome:
        import numpy as np

        from edgekd.data.images import load

        pixels = load(self.path, self.preprocess)
        good = pixels.shape == (3, 32, 32) and pixels.dtype == np.float32 and bool(np.isfinite(pixels).all())
        return ("other", "") if good else ("wrong", f"{pixels.dtype} {pixels.shape}")


class Zips(Reader):
    def setup(self) -> None:
        import zipfile

        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for k in range(6):
                archive.writestr(f"set/class_{k % 2}/{k}.png", bytes(range(256)) * 3)
        self.good, self.path = out.getvalue(), self.work / "a.zip"

    def make(self, rng: random.Random) -> None:
        import zipfile

        if rng.random() < 0.6:
            self.path.write_bytes(mutate.of_bytes(self.good, rng))
            return
        names = [
            "../evil",
            "/tmp/evil-absolute",
            "a/../../evil",
            "C:\\evil",
            "set/",
            "",
            ".",
            "a/./b",
            "x" * 300,
            "nul\0x",
            "a//b",
        ]
        with warnings.catch_warnings(), zipfile.ZipFile(self.path, "w") as archive:
            warnings.simplefilter("ignore")
            for _ in range(rng.randrange(1, 5)):
                info = zipfile.ZipInfo(rng.choice([*names, "set/a.png", "set/b/c.png"]))
                if rng.random() < 0.3:
                    info.external_attr = 0o120777 << 16  # a symbolic link
                archive.writestr(info, rng.choice([b"x", b"/etc/passwd"]))

    def read(self) -> Outcome:
        from edgekd.data.archives import unzip
        from edgekd.errors import DataError

        out = self.work / "in" / "unpacked"
        shutil.rmtree(self.work / "in", ignore_errors=True)
        out.mkdir(parents=True)
        refusal: DataError | None = None
        try:
            unzip(self.path, out)
        except DataError as error:
            refusal = error
        outside = [p for p in (self.work / "in").iterdir() if p != out] + list(Path("/tmp").glob("evil*"))
        links = [p for p in out.rglob("*") if p.is_symlink()]
        if outside or links:
            return "wrong", "wrote outside" if outside else "symbolic link"
        return ("refused", "") if refusal else ("other", "")


READERS: dict[str, type[Reader]] = {
    "manifest-bytes": ManifestBytes,
    "manifest-struct": ManifestStruct,
    "engine-files": EngineFiles,
    "engine-rehashed": EngineRehashed,
    "onnx-bytes": OnnxBytes,
    "onnx-resealed": OnnxResealed,
    "onnx-struct": OnnxStruct,
    "split-bytes": SplitBytes,
    "split-struct": SplitStruct,
    "record-bytes": RecordBytes,
    "record-struct": RecordStruct,
    "toml-bytes": Toml,
    "toml-struct": TomlStruct,
    "safetensors-bytes": SafetensorsBytes,
    "safetensors-resealed": SafetensorsResealed,
    "safetensors-struct": SafetensorsStruct,
    "resume-bytes": ResumeBytes,
    "resume-resealed": ResumeResealed,
    "resume-struct": ResumeStruct,
    "checkpoint-struct": CheckpointStruct,
    "pictures": Pictures,
    "zips": Zips,
}


def one(reader: Reader, name: str, seed: int) -> Outcome:
    from edgekd.errors import EdgekdError

    rng = random.Random(f"{name} {seed}")
    reader.make(rng)
    try:
        return reader.read()
    except EdgekdError:
        return "refused", ""
    except OSError as error:
        one_line = bool(error.strerror and error.filename)  # as the command says it
        return ("refused", "") if one_line else ("traceback", f"{type(error).__name__}: {error}")
    except MemoryError:
        return "memory", "MemoryError"
    except Exception as error:
        frames = [
            f for f in traceback.extract_tb(error.__traceback__) if "edgekd" in f.filename and "fuzz" not in f.filename
        ]
        inner = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "harness"
        return "traceback", f"{type(error).__name__} at {at} ({Path(inner.filename).name}): {str(error)[:90]}"


def child(base: Path, name: str, seeds: range, shared: mmap.mmap, out: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_GIB << 30,) * 2)
    import logging

    logging.disable()
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        reader = READERS[name](base, Path(folder))
        for seed in seeds:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            shared[:] = struct.pack("qdd", seed, time.monotonic(), time.process_time())
            kind, why = one(reader, name, seed)
            took = time.monotonic() - struct.unpack("qdd", shared[:])[1]
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if grown > peak and grown > MEMORY_MIB * 1024:
                kind, why = "memory", f"{grown // 1024} MiB, then {kind} {why}"
            if Path("pwned").exists():
                kind, why = "executed", "code in a pickle ran"
                Path("pwned").unlink()
            os.write(out, (json.dumps([name, seed, kind, why, round(took, 3)]) + "\n").encode())
        shared[:] = struct.pack("qdd", seeds.stop, time.monotonic(), time.process_time())


def spent(pid: int) -> float:
    """A process's own seconds on the processor."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def tally(lines: list[bytes], found: collections.Counter[str], sink: Any) -> None:
    for line in lines:
        kind = json.loads(line)[2]
        found[kind] += 1
        if kind not in HARMLESS:
            sink.write(line.decode() + "\n")


def run(base: Path, name: str, count: int, seed: int, sink: Any, until: float) -> collections.Counter[str]:
    """Let children read inputs; one that hangs or dies is counted and followed by the next."""
    shared = mmap.mmap(-1, 24)
    found: collections.Counter[str] = collections.Counter()
    at, stop = seed, seed + count
    while at < stop and time.monotonic() < until:
        shared[:] = struct.pack("qdd", at - 1, time.monotonic() + 600, 60)  # setting up may take longer
        read_end, write_end = os.pipe()
        if not (pid := os.fork()):
            os.close(read_end)
            code = 0
            try:
                child(base, name, range(at, stop), shared, write_end)
            except BaseException:
                traceback.print_exc()
                code = 9
            os._exit(code)
        os.close(write_end)
        os.set_blocking(read_end, False)
        pending, ended, hung = b"", False, False
        while not ended:
            ended = bool(os.waitpid(pid, os.WNOHANG)[0])
            _, clock, cpu = struct.unpack("qdd", shared[:])
            hung = not ended and (spent(pid) - cpu > HANG_S or time.monotonic() - clock > 10 * HANG_S)
            if hung or (not ended and time.monotonic() > until):
                os.kill(pid, 9)
                ended = bool(os.waitpid(pid, 0))
            with contextlib.suppress(BlockingIOError):
                while part := os.read(read_end, 1 << 16):
                    pending += part
            *lines, pending = pending.split(b"\n")
            tally(lines, found, sink)
            time.sleep(0.01)
        os.close(read_end)
        now, _, _ = struct.unpack("qdd", shared[:])
        if now < stop and time.monotonic() < until:
            if now < at:
                raise SystemExit(f"{name}: the reader could not be set up")
            kind = "hang" if hung else "crash"
            found[kind] += 1
            sink.write(json.dumps([name, now, kind, "", HANG_S if hung else 0]) + "\n")
        at = now + 1
        sink.flush()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--reader", default="all", help=f"all, or some of {', '.join(READERS)}")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=3600, help="for each reader, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(os.devnull), help="findings, one JSON list a line")
    parser.add_argument("--only", type=int, help="make this one input, read it here, and show what comes of it")
    parser.add_argument("--keep", type=Path, help="with --only: where to leave the input")
    given = parser.parse_args()
    base = given.base.resolve()
    names = list(READERS) if given.reader == "all" else given.reader.split(",")
    if given.only is not None:
        folder = (given.keep or Path(tempfile.mkdtemp())).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        reader = READERS[names[0]](base, folder)
        reader.make(random.Random(f"{names[0]} {given.only}"))
        print(folder)
        print(reader.read())
        return
    import onnxruntime  # noqa: F401
    import torch

    torch.set_num_threads(1)
    summary = {}
    with given.out.open("a") as sink:
        for name in names:
            started = time.monotonic()
            found = summary[name] = run(base, name, given.count, given.seed, sink, started + given.seconds)
            sys.stderr.write(f"{name:20} {found.total():6} in {time.monotonic() - started:5.0f} s  {dict(found)}\n")
    print(json.dumps(summary, indent=1))
    sys.exit(any(kind not in HARMLESS for found in summary.values() for kind in found))


if __name__ == "__main__":
    main()
