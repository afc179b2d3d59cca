"""Downloads from a real HTTP server on this machine: resumed, checked, unpacked."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR100

from edgekd.data.archives import unzip
from edgekd.data.download import fetch, get
from edgekd.data.folders import check, scan
from edgekd.data.layouts import DATA_LAYOUTS, Source
from edgekd.errors import ConfigError, DataError

CONTENT = np.random.default_rng(0).bytes(300_000)


class Server(ThreadingHTTPServer):
    """Serves `files` with ranges; breaks the connection after `limit` bytes of an answer."""

    files: dict[str, bytes]
    limit: int | None = None
    ranges = True
    asked: list[str | None]


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        content = self.server.files.get(self.path.strip("/"))
        if content is None:
            return self.send_error(404)
        asked = self.headers["Range"]
        self.server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.server.limit])
        return None

    def log_message(self, *_: Any) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(("127.0.0.1", 0), Handler) as server:
        server.files, server.asked = {"set.zip": CONTENT}, []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def source(server: Server, name: str = "set.zip", content: bytes = CONTENT) -> Source:
    return Source(f"http://127.0.0.1:{server.server_address[1]}/{name}", hashlib.md5(content).hexdigest())


def serve(name: str, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a data set come from another address, in its own form."""
    layout = DATA_LAYOUTS[name]
    assert layout.source
    source = dataclasses.replace(source, unpack=layout.source.unpack)
    monkeypatch.setitem(DATA_LAYOUTS._loaded, name, dataclasses.replace(layout, source=source))


def test_an_interrupted_download_is_resumed(server: Server, tmp_path: Path) -> None:
    target, steps = tmp_path / "set.zip", []
    server.limit = 100_000
    with pytest.raises(DataError, match=r"(?s)200000 bytes are missing.*0\.1 MB are kept"):
        fetch(source(server), target)
    assert not target.exists()
    server.limit = None
    fetch(source(server), target, progress=lambda done, total: steps.append((done, total)))
    assert target.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-"]
    assert steps[-1] == (300_000, 300_000)
    fetch(source(server), target)
    assert len(server.asked) == 2  # what is there and right is not fetched again


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.zip.part").write_bytes(b"old")
    server.ranges = False
    fetch(source(server), tmp_path / "set.zip")
    assert (tmp_path / "set.zip").read_bytes() == CONTENT


def test_wrong_checksum_and_wrong_partial_download(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="had a wrong checksum"):
        fetch(Source(source(server).url, "0" * 32), tmp_path / "set.zip")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "set.zip.part").write_bytes(CONTENT + b"more")
    with pytest.raises(DataError, match="416"):
        fetch(source(server), tmp_path / "set.zip")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("right", [True, False])
def test_the_users_own_archive_is_left_alone(
    right: bool, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = zipped({"set/a/1.png": b"1", "set/b/2.png": b"2"})
    server.files["set.zip"] = content
    serve("kather2016", source(server, "set.zip", content), monkeypatch)
    own = {"set.zip": content if right else b"something else", "set.zip.part": b"of a browser"}
    for name, data in own.items():
        (tmp_path / name).write_bytes(data)
    get("kather2016", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "b"]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == own
    assert len(server.asked) == (0 if right else 1)


def test_no_file_and_no_server(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="404"):
        fetch(source(server, "none.zip"), tmp_path / "none.zip")
    with pytest.raises(DataError, match=r"(?s)cannot be downloaded: .*refused.*check the network"):
        fetch(Source("http://127.0.0.1:9/set.zip", ""), tmp_path / "set.zip")


def zipped(names: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return stream.getvalue()


def test_kather_arrives_as_class_folders(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: Path
) -> None:
    data = shared / "data" / "kather2016_tif"
    tiles = {f"Kather/{p.relative_to(data)}": p.read_bytes() for p in data.rglob("*.tif")}
    content = zipped({**tiles, "__MACOSX/Kather/._x": b""})
    server.files["k.zip"] = content
    serve("kather2016", source(server, "k.zip", content), monkeypatch)
    get("kather2016", tmp_path / "kather")
    assert len(check(scan(tmp_path / "kather")).folder.items) == 24
    assert [p.name for p in tmp_path.iterdir()] == ["kather"]
    with pytest.raises(DataError, match="is not empty"):
        get("kather2016", tmp_path / "kather")


@pytest.mark.parametrize("name", ["../out.txt", "/tmp/out.txt", "a/../../out.txt"])
def test_archive_members_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "bad.zip").write_bytes(zipped({"a/fine.txt": b"", name: b"x"}))
    with pytest.raises(DataError, match="leads out of the folder"):
        unzip(tmp_path / "bad.zip", tmp_path / "in")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.zip"]
    (tmp_path / "bad.zip").write_bytes(CONTENT)
    with pytest.raises(DataError, match="cannot be unpacked"):
        unzip(tmp_path / "bad.zip", tmp_path / "in")


def links(archive: zipfile.ZipFile) -> None:
    info = zipfile.ZipInfo("a/link")
    info.external_attr = 0o120777 << 16
    archive.writestr(info, "/etc/passwd")


def twice(archive: zipfile.ZipFile) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a/1.png", b"y")


ODD: dict[str, Callable[[zipfile.ZipFile], Any]] = {
    "a link": links,
    "a name twice": twice,
    "a file that is a folder": lambda archive: archive.writestr("a", b"x"),
    "a name too long": lambda archive: archive.writestr("a/" + "x" * 300, b"x"),
    "no name": lambda archive: archive.writestr(".", b"x"),
}


@pytest.mark.parametrize("what", [*ODD, "encrypted", "an unknown compression", "damaged data", "cut short", "no files"])
def test_invalid_archives_are_refused(what: str, tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        if what != "no files":
            archive.writestr("a/1.png", bytes(1000))
        if what in ODD:
            ODD[what](archive)
    data = bytearray(stream.getvalue())
    head, directory = 0, data.find(b"PK\x01\x02")
    if what == "encrypted":
        data[head + 6] |= 1
        data[directory + 8] |= 1
    if what == "an unknown compression":
        data[head + 8] = data[directory + 10] = 99
    if what == "damaged data":
        data[40:50] = bytes(10)
    if what == "cut short":
        del data[len(data) // 2 :]
    (tmp_path / "odd.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"odd\.zip"):
        unzip(tmp_path / "odd.zip", tmp_path / "in")
    assert not [p for p in tmp_path.rglob("*") if p.is_symlink()]


def test_cifar100_through_torchvision(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny archive of CIFAR-100's own form, read by torchvision's own class."""
    pixels = np.random.default_rng(1).integers(0, 256, (4, 3072), dtype=np.uint8)
    files = {
        "meta": pickle.dumps({"fine_label_names": ["apple", "bear"]}),
        "train": pickle.dumps({"data": pixels, "fine_labels": [0, 1, 0, 1]}),
        "test": pickle.dumps({"data": pixels[:2] ^ 1, "fine_labels": [1, 0]}),
    }
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    content = stream.getvalue()
    server.files["cifar-100-python.tar.gz"] = content
    here = source(server, "cifar-100-python.tar.gz", content)
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    serve("cifar100", here, monkeypatch)
    monkeypatch.setattr(CIFAR100, "tgz_md5", here.md5)
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    get("cifar100", tmp_path / "cifar")
    folder = scan(tmp_path / "cifar")
    assert [(i.path, i.subset) for i in folder.items][:2] == [
        ("test/apple/00001.png", "test"),
        ("test/bear/00000.png", "test"),
    ]
    first = np.asarray(Image.open(tmp_path / "cifar" / "train" / "apple" / "00000.png"))
    np.testing.assert_array_equal(first, pixels[0].reshape(3, 32, 32).transpose(1, 2, 0))
    assert [p.name for p in tmp_path.iterdir()] == ["cifar"]


def test_the_cifar100_source_is_torchvisions() -> None:
    shipped = DATA_LAYOUTS["cifar100"].source
    assert shipped
    assert (shipped.url, shipped.md5) == (CIFAR100.url, CIFAR100.tgz_md5)


def test_data_sets_without_a_download(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"request it at https://www\.cs\.uoi\.gr"):
        get("sipakmed", tmp_path)
    with pytest.raises(ConfigError, match=r"no data layout 'kather'[\s\S]*Did you mean 'kather2016'"):
        get("kather", tmp_path)
