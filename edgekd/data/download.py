"""Fetch public data sets: resumed where a download broke off, checked, unpacked whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import http.client
import shutil
import stat
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgekd._version import __version__
from edgekd.errors import DataError, EdgekdError, nearest
from edgekd.files import atomic_folder, locked

Progress = Callable[[int, int], None]
TIMEOUT_S = 30
CHUNK = 1 << 20


@dataclass(frozen=True)
class Source:
    """Where an archive is, and its published MD5."""

    url: str
    md5: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.url).name


SOURCES = {
    "kather2016": Source(
        "https://zenodo.org/records/53169/files/Kather_texture_2016_image_tiles_5000.zip",
        "0ddbebfc56344752028fda72602aaade",
    ),
    "cifar100": Source(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
    ),
}
SIPAKMED = "https://www.cs.uoi.gr/~marina/sipakmed.html"


def get(name: str, out: Path, *, progress: Progress | None = None) -> None:
    """Download `kather2016` or `cifar100` and write it to `out` as class folders.

    The download is kept beside `out` until it is unpacked, so a broken one goes on where it stopped. An archive of the
    right checksum that lies there already is used and left alone, like every other file.
    progress: bytes done and in all, then images written and in all.

    Raises:
        DataError: an unknown set, one that has to be asked for, `out` in use, no network, or a wrong checksum.
    """
    if name == "sipakmed":
        raise DataError(
            "SIPaKMeD may not be passed on: its authors give it for research",
            fix=f"ask for it at {SIPAKMED} (University of Ioannina), unpack it and give --data that folder",
        )
    if name not in SOURCES:
        raise DataError(f"no data set '{name}' to get", fix=nearest(name, [*SOURCES, "sipakmed"]))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is not empty", fix="remove it or choose another folder")
    source = SOURCES[name]
    archive = own = out.parent / source.name
    if not (own.is_file() and _md5(own) == source.md5):
        archive = out.parent / f".edgekd-{source.name}"  # a name that no file of the user has
    with locked(archive):
        if archive != own:
            fetch(source, archive, progress=progress)
        with atomic_folder(out) as folder:
            if name == "cifar100":
                _write_cifar100(archive, folder, progress)
            else:
                unzip(archive, folder)
        if archive != own:
            archive.unlink()


def fetch(source: Source, path: Path, *, progress: Progress | None = None) -> None:
    """Download to `path`, or finish `path`.part from an earlier try; a file that is there is kept.

    Raises:
        DataError: no network, the connection broke (the part is kept), a wrong checksum (the download is removed), or
            another file at `path` (it is left alone).
    """
    part = path.with_name(path.name + ".part")
    if path.exists():
        if path.is_file() and _md5(path) == source.md5:
            return
        raise DataError(f"{path} is there and is not {source.url}", fix="move it away and run the same command again")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not part.is_file() or _md5(part) != source.md5:
        _download(source.url, part, progress)
    if _md5(part) != source.md5:
        part.unlink()
        raise DataError(f"{source.url} came with a wrong checksum and was removed", fix="run the same command again")
    part.replace(path)


def _download(url: str, part: Path, progress: Progress | None) -> None:
    have = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": f"edgekd/{__version__}", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, headers=headers | ({"Range": f"bytes={have}-"} if have else {}))
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            have = have if answer.status == 206 else 0  # a server without ranges sends all of it again
            total = have + int(answer.headers.get("Content-Length", 0))
            with part.open("ab" if have else "wb") as stream:
                while chunk := answer.read(CHUNK):
                    stream.write(chunk)
                    have += len(chunk)
                    if progress:
                        progress(have, total)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is as long as the file or longer, yet not it
            part.unlink()
        raise DataError(f"{url}: {error.code} {error.reason}", fix="run the same command again later") from None
    except (OSError, http.client.HTTPException) as error:
        raise _broken(url, have, getattr(error, "reason", error)) from None
    if have < total:
        raise _broken(url, have, f"{total - have} bytes are missing")


def _broken(url: str, have: int, reason: object) -> DataError:
    kept = f"; {have / 1e6:.1f} MB are kept, and it goes on from there" if have else ""
    return DataError(
        f"{url} cannot be fetched: {reason}", fix=f"check the network and run the same command again{kept}"
    )


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def unzip(archive: Path, folder: Path) -> None:
    """Unpack into `folder`, without the one folder around everything that an archive may have.

    Raises:
        DataError: not a whole zip file of ordinary files, or one with names that lead out of the folder or that files
            here cannot have.
    """
    try:
        with zipfile.ZipFile(archive) as source:
            files = [i for i in source.infolist() if not i.is_dir() and not i.filename.startswith("__MACOSX")]
            names = _names(files, archive)
            wrapped = len({n.parts[0] for n in names}) == 1 and all(len(n.parts) > 1 for n in names)
            for info, name in zip(files, names):
                target = folder.joinpath(*name.parts[wrapped:])
                target.parent.mkdir(parents=True, exist_ok=True)
                with source.open(info) as inside, target.open("wb") as stream:
                    shutil.copyfileobj(inside, stream)
    except EdgekdError:
        raise
    except Exception as error:  # zipfile and what it unpacks with raise many kinds
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # of the disk, not of the archive
            raise
        what = f"{archive} cannot be unpacked: {error or type(error).__name__}"
        raise DataError(what, fix="remove it and get it again") from None


def _names(files: list[zipfile.ZipInfo], archive: Path) -> list[PurePosixPath]:
    """Where an archive's files go.

    Raises:
        DataError: a link, a name that leads out of the folder or that no file can have, or two in one place.
    """
    names = [PurePosixPath(i.filename) for i in files]
    if not names:
        raise DataError(f"{archive} holds no files", fix="remove it and get it again")
    if stray := [n for n in names if n.is_absolute() or ".." in n.parts or "\\" in str(n)]:
        raise DataError(f"{archive}: {stray[0]} leads out of the folder", fix="do not trust this file")
    taken = {parent for n in names for parent in n.parents} | {n for n, k in Counter(names).items() if k > 1}
    for info, name in zip(files, names):
        is_link = stat.S_ISLNK(info.external_attr >> 16)
        length = max((len(part.encode(errors="surrogateescape")) for part in name.parts), default=256)
        if is_link or length > 255 or len(str(name)) > 1000 or name in taken:
            what = f"{archive}: {str(name)[:80]!r} is no ordinary file, or is there twice"
            raise DataError(what, fix="do not trust this file")
    return names


def _write_cifar100(archive: Path, folder: Path, progress: Progress | None) -> None:
    """train/<class>/00000.png …, read by torchvision, which checks every file of the archive."""
    from torchvision.datasets import CIFAR100

    work = folder / ".torchvision"
    work.mkdir()
    shutil.copy(archive, work / CIFAR100.filename)
    sets = {part: CIFAR100(work, train=part == "train", download=True) for part in ("train", "test")}
    total, done = sum(map(len, sets.values())), 0
    for part, images in sets.items():
        for name in images.classes:
            (folder / part / name).mkdir(parents=True)
        for number, (image, label) in enumerate(images):
            image.save(folder / part / images.classes[label] / f"{number:05d}.png")
            done += 1
            if progress:
                progress(done, total)
    shutil.rmtree(work)
