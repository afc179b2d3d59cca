"""Download public data sets: resumed after an interruption, verified, and unpacked completely or not at all."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from edgekd._version import __version__
from edgekd.data.layouts import DATA_LAYOUTS, Source
from edgekd.errors import DataError
from edgekd.files import atomic_folder, locked
from edgekd.types import Progress

TIMEOUT_S = 30
CHUNK = 1 << 20


def get(name: str, out: Path, *, progress: Progress | None = None) -> None:
    """Download a data set and write it as class folders.

    The download is kept beside `out` until it is unpacked, so an interrupted one is resumed. An archive with the right
    checksum that already exists is used and, like every other file, not changed.

    Args:
        name: Name of a data layout.
        out: A new or empty folder.
        progress: Called with the bytes downloaded and their number, then with the files written and their number.

    Raises:
        ConfigError: Unknown data layout.
        DataError: The data set cannot be downloaded, `out` is not empty, no network, or a wrong checksum.
    """
    layout = DATA_LAYOUTS[name]
    if layout.how_to_get:
        reason, fix = layout.how_to_get
        raise DataError(reason, fix=fix)
    if layout.source is None:
        raise DataError(f"the data layout '{name}' has no download", fix="give the folder of its images as --data")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is not empty", fix="remove it or choose another folder")
    archive = users = out.parent / layout.source.name
    if not (users.is_file() and _md5(users) == layout.source.md5):
        archive = out.parent / f".edgekd-{layout.source.name}"  # never the name of a user's file
    with locked(archive):
        if archive != users:
            fetch(layout.source, archive, progress=progress)
        with atomic_folder(out) as folder:
            layout.source.unpack(archive, folder, progress)
        if archive != users:
            archive.unlink()


def fetch(source: Source, path: Path, *, progress: Progress | None = None) -> None:
    """Download to `path`, or resume `path`.part of an earlier attempt; an intact file is kept.

    Args:
        source: The archive.
        path: The file to write.
        progress: Called with the bytes downloaded and their number.

    Raises:
        DataError: No network, a broken connection (the part is kept), a wrong checksum (the download is removed), or
            a different file at `path` (it is left alone).
    """
    part = path.with_name(path.name + ".part")
    if path.exists():
        if path.is_file() and _md5(path) == source.md5:
            return
        raise DataError(f"{path} exists and is not {source.url}", fix="move it away and run the same command again")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not part.is_file() or _md5(part) != source.md5:
        _download(source.url, part, progress)
    if _md5(part) != source.md5:
        part.unlink()
        raise DataError(f"{source.url} had a wrong checksum and was removed", fix="run the same command again")
    part.replace(path)


def _download(url: str, part: Path, progress: Progress | None) -> None:
    have = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": f"edgekd/{__version__}", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, headers=headers | ({"Range": f"bytes={have}-"} if have else {}))
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            have = have if response.status == 206 else 0  # a server without range support sends it all again
            total = have + int(response.headers.get("Content-Length", 0))
            with part.open("ab" if have else "wb") as stream:
                while chunk := response.read(CHUNK):
                    stream.write(chunk)
                    have += len(chunk)
                    if progress:
                        progress(have, total)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is as long as the file or longer, but differs
            part.unlink()
        raise DataError(f"{url}: {error.code} {error.reason}", fix="run the same command again later") from None
    except (OSError, http.client.HTTPException) as error:
        raise _broken(url, have, getattr(error, "reason", error)) from None
    if have < total:
        raise _broken(url, have, f"{total - have} bytes are missing")


def _broken(url: str, have: int, reason: object) -> DataError:
    kept = f"; {have / 1e6:.1f} MB are kept, and the download resumes from there" if have else ""
    return DataError(
        f"{url} cannot be downloaded: {reason}", fix=f"check the network and run the same command again{kept}"
    )


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
