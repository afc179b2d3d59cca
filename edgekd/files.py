"""Atomic writes of files and folders, locks, and cleaning up after processes that were killed.

A file or folder NAME is written beside its place as `.NAME.MACHINE-….partial`, under a lock on `.NAME.edgekd-lock`. The
lock ends with its process, so the next writer in that folder can tell abandoned files from files in progress.
"""

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
"""Paths locked by this process. A command locks its outputs, and the functions that write them lock them again."""


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Provide a temporary path beside `path` to write one file to; it replaces `path` if the block succeeds.

    If `path` is a symbolic link, its target is replaced and the link is kept.

    Args:
        path: The file to write.
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
    """Write a file completely or not at all."""
    with atomic_path(path) as part:
        part.write_bytes(data)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Provide a temporary folder beside `path`; it replaces `path` if the block succeeds. Links as for `atomic_path`.

    The two are exchanged atomically where the system supports it. Elsewhere the old folder is moved aside first; if
    the process is killed at that moment, `recover` or the next writer moves it back.

    Args:
        path: The folder to write.
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
def temporary_folder(purpose: str, *, parent: Path | None = None) -> Iterator[Path]:
    """Provide a folder in `parent`, removed after the block or, if the process was killed, by the next call.

    Args:
        purpose: Part of its name.
        parent: Where it is; in TMPDIR if None.
    """
    path = real((parent or Path(tempfile.gettempdir())) / f"edgekd-{purpose}-{secrets.token_hex(4)}")
    with locked(path):
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path), suffix=PARTIAL))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing `path` until the block or the process ends.

    Missing parent folders are created, and removed again if they stay empty. A file system without locks causes a
    warning.

    Args:
        path: A file or folder, which need not exist.
        wait: Wait for another process to release it.

    Raises:
        ArtifactError: Another process holds it, and `wait` is False.
        OSError: The folder is not writable.
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
                fix="wait until it has finished, or choose another path",
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
    """Remove what killed processes of this machine left in `folder`, and move back what they had moved aside.

    Locked paths are left alone, and so are files of other machines on a shared disk, because not every network file
    system propagates locks.
    """
    for lock in folder.glob(f".*{LOCK}"):
        path = real(folder) / lock.name[1 : -len(LOCK)]
        with contextlib.suppress(OSError):  # another user's, or removed in the meantime
            if path not in _held and (handle := _acquire(lock, wait=False, create=False)) is not None:
                _release(lock, handle, path)


def recover(path: Path) -> None:
    """Move back a folder that a killed process had moved aside before it wrote the new one; for readers."""
    if not path.exists() and path.parent.is_dir():
        sweep(path.parent)


def real(path: Path) -> Path:
    """Resolve symbolic links: the path that is written when a link is given."""
    return Path(os.path.realpath(path))


def _acquire(lock: Path, *, wait: bool, create: bool = True) -> int | None:
    """Lock a file with a POSIX record lock; unlike flock's, child processes do not inherit it.

    Args:
        lock: The lock file.
        wait: Wait for another process to release it.
        create: Create the file; without locks on the file system, return its descriptor all the same.

    Returns:
        The file descriptor, or None if another process holds the lock or the file disappeared.
    """
    while True:
        handle = os.open(lock, os.O_RDWR | (os.O_CREAT if create else 0) | getattr(os, "O_NOFOLLOW", 0), 0o644)
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
            if create and error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                _warn_no_locks(lock.parent)
                return handle
            os.close(handle)
            raise
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # removed by its last owner while it was being opened here
        if not create:
            return None


@functools.cache
def _warn_no_locks(folder: Path) -> None:
    log.warning("%s: this file system has no locks; do not run a second command that writes there", folder)


def _release(lock: Path, handle: int, path: Path) -> None:
    """Remove leftovers of `path` and release its lock."""
    try:
        if not _clear(path):
            lock.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _clear(path: Path) -> bool:
    """Move back or remove leftovers of `path`; return True if another machine has some there."""
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
    """Identify this machine by digests of its name and its boot: containers change the one, restarts the other."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    marks = (platform.node(), boot.read_text() if boot.is_file() else platform.node())
    return "-".join(hashlib.sha256(mark.encode()).hexdigest()[:6] for mark in marks)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths atomically; return False if the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2  # Linux, glibc 2.28
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems do not support it
        _sync(path)


def _sync_all(folder: Path) -> None:
    found = [path for path in folder.rglob("*") if not path.is_symlink()]
    if len(found) > 100:  # a data set: file by file takes minutes on a memory card
        os.sync()
        return
    for path in found:
        (_sync_folder if path.is_dir() else _sync)(path)
    _sync_folder(folder)


@dataclass(frozen=True)
class Kind:
    """A kind of file that edgekd writes, recognised by its content.

    Attributes:
        name: Name in errors, with its article.
        prefixes: Possible first bytes.
        contained: Bytes that occur somewhere in the file.
    """

    name: str
    prefixes: tuple[bytes, ...]
    contained: bytes

    def matches(self, path: Path) -> bool:
        """Return True if a file is of this kind, or empty."""
        if not path.is_file():
            return False
        if not path.stat().st_size:
            return True
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return data[:16].startswith(self.prefixes) and data.find(self.contained) >= 0


NETWORK = Kind("a student.onnx", (b"\x08",), b"\n\x06edgekd\x12")
ENGINE = Kind("an engine", (b'{\n "metadata": ',), b'"backend_version": ')
PLOT = Kind("a plot", (b"\x89PNG", b"<?xml", b"%PDF"), b"Matplotlib")
MEASURES = Kind("a file of edgekd evaluate", (b'{\n "subset": ',), b'"metrics": ')
MARKDOWN = Kind("a table of edgekd bench", (b"## ",), b"| variant |")
CSV = Kind("a table of edgekd bench", (b"variant,network,",), b"")
PREDICTIONS = Kind("a file of edgekd predict", (b"file,label,confi", b'[\n{"file": ', b"[\n]"), b"")
PAGE = Kind("a report of edgekd bench", (b"<!doctype html>",), b"How it was measured")
SUMMARY = Kind("a summary of a sweep", (b'{\n "n": ',), b'"runs": ')
RESULT = Kind("a table of edgekd reproduce", (b'{\n "table": ',), b'"caption": ')
PAPER = Kind("a table of edgekd reproduce", (b"## ",), b"ours: mean")


def refuse_other(path: Path, kind: Kind) -> None:
    """Check that writing a file of this kind to `path` replaces nothing but such a file.

    Raises:
        ArtifactError: `path` is a folder, or a file of another kind.
    """
    if path.exists() and not kind.matches(path):
        what = "is a folder" if path.is_dir() else f"exists and is not {kind.name}: it would be replaced"
        raise ArtifactError(f"{path} {what}", fix="choose another name")


def cache_folder(kind: str) -> Path:
    """Return the folder of files that can be regenerated: `$XDG_CACHE_HOME/edgekd/KIND`, by default in `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edgekd" / kind


def sha256(path: Path) -> str:
    """Compute the SHA-256 hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
