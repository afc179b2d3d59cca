"""Locks, leftovers, folders that are exchanged, and what may be replaced."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.other_process import Other

from edgekd import files
from edgekd.errors import ArtifactError
from edgekd.files import Kind, atomic_folder, atomic_path, atomic_write, locked, recover, refuse_other, temporary_folder


@pytest.fixture
def others() -> Iterator[list[Other]]:
    started: list[Other] = []
    yield started
    for other in started:
        other.kill()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_lock_ends_with_its_process(tmp_path: Path, others: list[Other]) -> None:
    out = tmp_path / "run"
    others.append(Other(f"locked(Path({str(out)!r}))"))
    pid = others[0].process.pid
    for path in (out, tmp_path / "." / "run"):
        with pytest.raises(ArtifactError, match=f"is being written by process {pid} on "), locked(path):
            pass
    others[0].kill()
    with locked(out), locked(out):  # what a command holds, the functions it calls may write
        assert names(tmp_path) == [".run.edgekd-lock"]
    assert names(tmp_path) == []


def test_a_lock_is_known_by_what_a_link_points_to(tmp_path: Path, others: list[Other]) -> None:
    (tmp_path / "link").symlink_to("run")
    others.append(Other(f"locked(Path({str(tmp_path / 'link')!r}))"))
    with pytest.raises(ArtifactError, match="is being written"), locked(tmp_path / "run"):
        pass


def test_forked_children_do_not_keep_a_lock(tmp_path: Path, others: list[Other]) -> None:
    """The workers of a data loader live on for seconds when their parent is killed."""
    code = """
import os, sys, time
from pathlib import Path
from edgekd.files import locked
with locked(Path(sys.argv[1])):
    if pid := os.fork():
        print(pid, flush=True)
    time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code, tmp_path / "x"], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    with locked(tmp_path / "x"):
        os.kill(pid, signal.SIGKILL)


def test_folders_of_an_output_that_is_not_written_are_removed(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b" / "record.json"):
        assert (tmp_path / "a" / "b").is_dir()
    assert names(tmp_path) == []
    atomic_write(tmp_path / "a" / "b" / "record.json", b"{}")
    assert names(tmp_path / "a" / "b") == ["record.json"]


@pytest.mark.parametrize("what", ["atomic_path", "atomic_folder"])
def test_leftovers_are_swept_once_their_owner_is_gone(tmp_path: Path, others: list[Other], what: str) -> None:
    others.append(Other(f"{what}(Path({str(tmp_path / 'a.onnx')!r}))"))
    atomic_write(tmp_path / "b.json", b"{}")
    assert len(list(tmp_path.glob(".a.onnx.*.partial*"))) == 1  # somebody is at work on it
    others[0].kill()
    atomic_write(tmp_path / "b.json", b"{}")
    assert names(tmp_path) == ["b.json"]


def test_leftovers_of_other_machines_stay(tmp_path: Path, others: list[Other]) -> None:
    """Not every shared disk passes on locks: what looks abandoned may be at work elsewhere."""
    elsewhere = "files._machine = lambda: '000000-000000'"
    others.append(Other(f"atomic_path(Path({str(tmp_path / 'a.json')!r}))", elsewhere))
    others[0].kill()
    atomic_write(tmp_path / "a.json", b"{}")
    (left,) = tmp_path.glob(".a.json.000000-000000-*.partial.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_machine", lambda: "000000-000000")
        files.sweep(tmp_path)
    assert not left.exists()
    assert names(tmp_path) == ["a.json"]


def test_files_of_others_are_never_leftovers(tmp_path: Path) -> None:
    for name in (".a.json.partial", ".a.json.0-0-x.partial", ".conda.lock", "a.json.old", ".a.json.old"):
        (tmp_path / name).write_text("mine")
    before = names(tmp_path)
    atomic_write(tmp_path / "a.json", b"{}")
    assert names(tmp_path) == sorted([*before, "a.json"])


def test_temporary_folders_of_killed_processes_are_removed(
    tmp_path: Path, others: list[Other], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    others += [Other("temporary_folder('bench')", TMPDIR=str(tmp_path)) for _ in range(2)]
    others[0].kill()
    with temporary_folder("quantize"):
        assert len(list(tmp_path.glob("*.partial"))) == 2
    others[1].kill()
    with temporary_folder("bench") as folder:
        assert names(tmp_path) == sorted([folder.name, folder.name[: len(".edgekd-bench-12345678")] + files.LOCK])
    assert names(tmp_path) == []


def write(out: Path, content: str) -> None:
    with atomic_folder(out) as folder:
        (folder / "file").write_text(content)


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced(tmp_path: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    write(tmp_path / "engine", "old")
    write(tmp_path / "engine", "new")
    assert (tmp_path / "engine" / "file").read_text() == "new"
    assert names(tmp_path) == ["engine"]
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "engine"):
        raise KeyboardInterrupt
    assert (tmp_path / "engine" / "file").read_text() == "new"


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_folders_are_exchanged_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "engine", "old")
    monkeypatch.setattr(Path, "replace", lambda self, other: pytest.fail("moved"))
    write(tmp_path / "engine", "new")
    assert (tmp_path / "engine" / "file").read_text() == "new"


@pytest.mark.parametrize("by", ["reader", "writer"])
def test_a_folder_that_was_moved_aside_comes_back(tmp_path: Path, by: str) -> None:
    """Where folders cannot be exchanged, and the kill comes between the two renames."""
    write(tmp_path / "engine", "old")
    process = multiprocessing.get_context("fork").Process(target=_killed_between, args=(tmp_path / "engine",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "engine").exists()
    if by == "reader":
        recover(tmp_path / "engine")
    else:
        atomic_write(tmp_path / "other.json", b"{}")
    assert (tmp_path / "engine" / "file").read_text() == "old"
    assert not list(tmp_path.glob(".*"))


def _killed_between(out: Path) -> None:
    files._exchange = lambda one, other: False
    rename = Path.replace

    def replace(self: Path, to: Path) -> Path:
        moved = rename(self, to)
        os.kill(os.getpid(), signal.SIGKILL)
        return moved

    Path.replace = replace  # type: ignore[method-assign]
    write(out, "new")


@pytest.mark.parametrize("what", ["file", "folder", "missing"])
def test_a_link_is_kept_and_its_target_replaced(tmp_path: Path, what: str) -> None:
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "target", tmp_path / "link"
    link.symlink_to("far/target")
    if what == "folder":
        write(target, "old")
        write(link, "new")
        assert (target / "file").read_text() == "new"
    else:
        if what == "file":
            target.write_text("old")
        atomic_write(link, b"new")
        assert target.read_text() == "new"
    assert link.is_symlink()
    assert names(tmp_path) == ["far", "link"]
    assert names(tmp_path / "far") == ["target"]


def test_only_its_own_kind_is_replaced(tmp_path: Path) -> None:
    kind = Kind("a page", (b"<!doctype",), b"by edgekd")
    cases = {"ours": b"<!doctype html> by edgekd", "empty": b"", "another": b"<!doctype html>", "text": b"by edgekd"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    for name in ("ours", "empty", "missing"):
        refuse_other(tmp_path / name, kind)
    for name in ("another", "text"):
        with pytest.raises(ArtifactError, match=f"{name} exists and is not a page"):
            refuse_other(tmp_path / name, kind)
    with pytest.raises(ArtifactError, match="is a folder"):
        refuse_other(tmp_path / "folder", kind)
    with pytest.raises(ArtifactError, match="is not a page"):
        refuse_other(Path(os.devnull), kind)


def test_a_file_system_without_locks_causes_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*given: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "lockf", none)
    with atomic_path(tmp_path / "a.json") as part:
        part.write_text("{}")
    assert "this file system has no locks" in caplog.text
    assert names(tmp_path) == ["a.json"]
