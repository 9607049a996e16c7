"""Archives, member by member: what an interrupted attempt unpacked is not unpacked again."""

from __future__ import annotations

import fnmatch
import gzip
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from datamodules.records import UserError

DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError),
    *(NotImplementedError, RuntimeError),  # zipfile's, for what it cannot read
)


def unpack(archive: Path, kind: str, members: Sequence[str], folder: Path, report: Callable[[str], None]) -> None:
    """Members of a "zip" or "tar" (also compressed) that match one of the patterns.

    Files alone are unpacked, and none outside of the folder. A member that stands there in its full length is left.
    Raises UserError if the archive is damaged, or a pattern has no member.
    """
    found: set[str] = set()
    try:
        for name, size, open_member in _zip(archive) if kind == "zip" else _tar(archive):
            matched = {pattern for pattern in members if fnmatch.fnmatchcase(name, pattern)}
            if not matched:
                continue
            found |= matched
            target = _inside(archive, folder, name)
            if not (target.is_file() and target.stat().st_size == size):
                report(name)
                _write(open_member, target)
    except DAMAGE as error:
        raise UserError(
            f"{archive}: the archive is damaged ({error}). Remove it to have it downloaded again."
        ) from error
    except OSError as error:
        raise UserError(f"{folder}: {archive.name} cannot be unpacked ({error.strerror or error})") from error
    if lacking := [pattern for pattern in members if pattern not in found]:
        raise UserError(f"{archive}: holds no {', no '.join(lacking)}: not the archive that is meant, or a new layout")


def _zip(archive: Path) -> Iterator[tuple[str, int, Callable[[], IO[bytes]]]]:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            if not info.is_dir():
                yield info.filename, info.file_size, lambda info=info: opened.open(info)


def _tar(archive: Path) -> Iterator[tuple[str, int, Callable[[], IO[bytes]]]]:
    with tarfile.open(archive) as opened:
        for info in opened:
            if info.isfile():  # no links, no devices
                yield info.name.removeprefix("./"), info.size, lambda info=info: opened.extractfile(info)
        while opened.fileobj.read(1 << 20):  # gzip's checksum stands behind the last member
            pass


def _inside(archive: Path, folder: Path, name: str) -> Path:
    """Where a member goes. Raises UserError if that is outside of the folder."""
    target = Path(os.path.normpath(folder / name))
    if "\\" in name or not target.is_relative_to(folder) or target == folder:
        raise UserError(f"{archive}: has a member outside of its folder ({name!r}), and is not unpacked")
    return target


def _write(open_member: Callable[[], IO[bytes]], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    with open_member() as source, open(partial, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)  # a zip's checksum is checked at the member's end
    os.replace(partial, target)
