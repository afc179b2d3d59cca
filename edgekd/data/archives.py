"""Unpacking archives from the internet: only ordinary files, and only below the target folder."""

from __future__ import annotations

import errno
import shutil
import stat
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath

from edgekd.errors import DataError, EdgekdError
from edgekd.types import Progress


def unzip(archive: Path, folder: Path, progress: Progress | None = None) -> None:
    """Unpack a zip file, without the single top-level folder that an archive may have.

    Args:
        archive: The zip file.
        folder: The target folder.
        progress: Called with the files written and their number.

    Raises:
        DataError: The archive is damaged, contains anything but ordinary files, or has names that lead out of the
            folder or that the file system cannot hold.
    """
    try:
        with zipfile.ZipFile(archive) as source:
            files = [i for i in source.infolist() if not i.is_dir() and not i.filename.startswith("__MACOSX")]
            names = _checked_names(files, archive)
            wrapped = len({n.parts[0] for n in names}) == 1 and all(len(n.parts) > 1 for n in names)
            for done, (info, name) in enumerate(zip(files, names), start=1):
                target = folder.joinpath(*name.parts[wrapped:])
                target.parent.mkdir(parents=True, exist_ok=True)
                with source.open(info) as content, target.open("wb") as stream:
                    shutil.copyfileobj(content, stream)
                if progress:
                    progress(done, len(files))
    except EdgekdError:
        raise
    except Exception as error:  # zipfile and its decompressors raise many types
        if isinstance(error, OSError) and error.errno not in (
            None,
            errno.EINVAL,
        ):  # the disk's fault, not the archive's
            raise
        what = f"{archive} cannot be unpacked: {error or type(error).__name__}"
        raise DataError(what, fix="remove it and download it again") from None


def _checked_names(files: list[zipfile.ZipInfo], archive: Path) -> list[PurePosixPath]:
    """Return the relative path of each file.

    Raises:
        DataError: A link, a name that leads out of the folder or is too long, or two files at one path.
    """
    names = [PurePosixPath(i.filename) for i in files]
    if not names:
        raise DataError(f"{archive} contains no files", fix="remove it and download it again")
    if stray := [n for n in names if n.is_absolute() or ".." in n.parts or "\\" in str(n)]:
        raise DataError(f"{archive}: {stray[0]} leads out of the folder", fix="do not trust this file")
    taken = {parent for n in names for parent in n.parents} | {n for n, k in Counter(names).items() if k > 1}
    for info, name in zip(files, names):
        is_link = stat.S_ISLNK(info.external_attr >> 16)
        length = max((len(part.encode(errors="surrogateescape")) for part in name.parts), default=256)
        if is_link or length > 255 or len(str(name)) > 1000 or name in taken:
            what = f"{archive}: {str(name)[:80]!r} is not an ordinary file, or occurs twice"
            raise DataError(what, fix="do not trust this file")
    return names
