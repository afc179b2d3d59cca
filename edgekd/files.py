"""Files that are there whole or not at all: atomic writing, locks, leftovers of processes that were killed, JSON.

What is being written to NAME lies beside it as `.NAME.MACHINE-….partial`, under a lock on `.NAME.edgekd-lock`. The lock
ends with its process, so whoever writes to that folder next can tell what is abandoned from what is being written."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import logging
import mmap
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgekd.errors import ArtifactError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)
LOCK, PARTIAL, OLD = ".edgekd-lock", ".partial", ".old"
_held: set[Path] = set()
"""What this process holds: its commands hold their outputs, and the functions that write them do so again."""


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, to write one file to; renamed to `path` when the block ends well.

    Where `path` is a symbolic link, what it points to is replaced and the link stays.
    """
    path = real(path)
    with locked(path, wait=True):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path), suffix=f"{PARTIAL}{path.suffix}")
        os.close(handle)
        part = Path(name)
        try:
            yield part
            part.chmod(0o644)
            _sync(part)
            part.replace(path)
            _sync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)


def atomic_write(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that it is there whole or not at all."""
    with atomic_path(path) as part:
        part.write_bytes(data)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, put in its place (replacing it) when the block ends well; links as above.

    The two are exchanged in one step where the system can. Where it cannot, the old folder is moved aside first; if the
    process is killed just then, `recover` or the next writer puts it back.
    """
    path = real(path)
    with locked(path, wait=True):
        part = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path), suffix=PARTIAL))
        old = part.with_suffix(OLD)
        try:
            yield part
            part.chmod(0o755)
            _sync_all(part)
            if not (path.exists() and _exchange(part, path)):
                if path.exists():
                    path.replace(old)
                part.replace(path)
            _sync_folder(path.parent)
        finally:
            _put_back(old, path)
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """A folder in TMPDIR that is gone after the block, or, if the process is killed, when the next one is made."""
    path = real(Path(tempfile.gettempdir(), f"edgekd-{purpose}-{secrets.token_hex(4)}"))
    with locked(path):
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path), suffix=PARTIAL))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing `path`, a file or folder that is there or not, until the block or process ends.

    Folders above it that are missing are made, and removed again if nothing came to be in them. Where the file system
    has no locks, a warning says so.

    Raises:
        ArtifactError: another process holds it, and `wait` is off. OSError: nothing can be written there.
    """
    path = real(path)
    if path in _held:
        yield
        return
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    lock = path.with_name(f".{path.name}{LOCK}")
    _held.add(path)
    try:
        handle = _acquire(lock, wait=wait)
        if handle is None:
            raise ArtifactError(
                f"{path} is being written by {lock.read_text(errors='replace') or 'another process'}",
                fix="wait until it has ended, or choose another place",
            )
        try:
            os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
            yield
        finally:
            _release(lock, handle, path)
    finally:
        _held.discard(path)
        for folder in made:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def sweep(folder: Path) -> None:
    """Remove what processes of this machine were writing in `folder` when they were killed.

    What they had moved aside is put back. Whatever is locked is left alone, and what other machines wrote on a shared
    disk, too: not every one of those passes on locks.
    """
    for lock in folder.glob(f".*{LOCK}"):
        path = real(folder) / lock.name[1 : -len(LOCK)]
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            if path not in _held and (handle := _acquire(lock, wait=False, make=False)) is not None:
                _release(lock, handle, path)


def recover(path: Path) -> None:
    """For readers: put back a folder that was moved aside by a process which was killed before it wrote the new one."""
    if not path.exists() and path.parent.is_dir():
        sweep(path.parent)


def real(path: Path) -> Path:
    """The path without symbolic links: what is written when a link is given."""
    return Path(os.path.realpath(path))


def _acquire(lock: Path, *, wait: bool, make: bool = True) -> int | None:
    """Descriptor of the lock file; None if another process has it, or if there are no locks and it is not `make`.

    A record lock of POSIX: unlike flock's, it is not handed down to child processes that live longer.
    """
    while True:
        handle = os.open(lock, os.O_RDWR | (os.O_CREAT if make else 0) | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            if fcntl is None:
                raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
            fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if lock.exists() and os.path.samestat(os.fstat(handle), lock.stat()):
                os.ftruncate(handle, 0)
                return handle
        except (BlockingIOError, PermissionError):
            os.close(handle)
            return None
        except OSError as error:
            if make and error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                _say_no_locks(lock.parent)
                return handle
            os.close(handle)
            raise
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # removed by its last owner while this one was opening it
        if not make:
            return None


@functools.cache
def _say_no_locks(folder: Path) -> None:
    log.warning("%s: no locks on this file system; see that no second command writes there", folder)


def _release(lock: Path, handle: int, path: Path) -> None:
    """Clear away what its owner left of `path`, and give the lock up."""
    try:
        if not _clear(path):
            lock.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _clear(path: Path) -> bool:
    """Put back or remove what was being written to `path`; whether another machine has something there."""
    name = re.compile(rf"\.{re.escape(path.name)}\.([0-9a-f]{{6}})-([0-9a-f]{{6}})-\w+({PARTIAL}|{OLD})(\.[^.]+)?")
    others = False
    for left in path.parent.glob(".*"):
        if not (found := name.fullmatch(left.name)):
            continue
        if not set(found.groups()[:2]) & set(_machine().split("-")):
            others = True
            continue
        if found[3] == OLD:
            _put_back(left, path)
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    return others


def _put_back(old: Path, path: Path) -> None:
    if old.exists() and not path.exists():
        old.replace(path)


def _prefix(path: Path) -> str:
    return f".{path.name}.{_machine()}-"


@functools.cache
def _machine() -> str:
    """This machine: digests of its name and of its start. Containers change the one, restarts the other."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    marks = (platform.node(), boot.read_text() if boot.is_file() else platform.node())
    return "-".join(hashlib.sha256(mark.encode()).hexdigest()[:6] for mark in marks)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; whether the system can."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2  # Linux, glibc 2.28
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _sync(path: Path) -> None:
    """See that a file, or what a folder lists, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot be asked
        _sync(path)


def _sync_all(folder: Path) -> None:
    found = [path for path in folder.rglob("*") if not path.is_symlink()]
    if len(found) > 100:  # a data set: one by one takes minutes on a memory card
        os.sync()
        return
    for path in found:
        (_sync_folder if path.is_dir() else _sync)(path)
    _sync_folder(folder)


@dataclass(frozen=True)
class Kind:
    """What files of one kind are known by: their first bytes, and bytes that are somewhere in them."""

    name: str
    starts: tuple[bytes, ...]
    holds: bytes

    def has(self, path: Path) -> bool:
        """Whether a file is of this kind, or empty."""
        if not path.is_file():
            return False
        if not path.stat().st_size:
            return True
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return data[:16].startswith(self.starts) and data.find(self.holds) >= 0


NETWORK = Kind("student.onnx", (b"\x08",), b"\n\x06edgekd\x12")
ENGINE = Kind("engine", (b'{\n "metadata": ',), b'"backend_version": ')
PLOT = Kind("plot", (b"\x89PNG", b"<?xml", b"%PDF"), b"Matplotlib")
MEASURES = Kind("file of edgekd evaluate", (b'{\n "subset": ',), b'"metrics": ')
MARKDOWN = Kind("table of edgekd bench", (b"## ",), b"| variant |")
CSV = Kind("table of edgekd bench", (b"variant,network,",), b"")
ANSWERS = Kind("file of edgekd predict", (b"file,label,confi", b'[\n{"file": ', b"[\n]"), b"")
PAGE = Kind("report of edgekd bench", (b"<!doctype html>",), b"How it was measured")
SUMMARY = Kind("summary of a sweep", (b'{\n "n": ',), b'"runs": ')
RESULT = Kind("table of edgekd reproduce", (b'{\n "table": ',), b'"caption": ')
PAPER = Kind("table of edgekd reproduce", (b"## ",), b"ours: mean")


def refuse_other(path: Path, kind: Kind) -> None:
    """See that nothing is lost when a file of this kind is written to `path`.

    Raises:
        ArtifactError: there is a folder, or a file of another kind.
    """
    if path.exists() and not kind.has(path):
        what = "is a folder" if path.is_dir() else f"is there and is no {kind.name}: it would be replaced"
        raise ArtifactError(f"{path} {what}", fix="choose another name")


def cache_folder(kind: str) -> Path:
    """Where what can be made again is kept: `$XDG_CACHE_HOME/edgekd/KIND`, by default under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edgekd" / kind


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
