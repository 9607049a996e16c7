"""Download one file, and unpack one archive. Both resume after an interruption.

An unfinished download is called FILE.part; FILE.part.sign stores the server's version of the file. pooch also downloads
and unpacks, but restarts an interrupted download from the beginning, and our files have several GB. huggingface_hub
resumes, but works with only one host.
"""

from __future__ import annotations

import errno
import fnmatch
import gzip
import http.client
import logging
import lzma
import os
import re
import shutil
import ssl
import stat
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from datamodules.files import open_new, read_regular, write_text
from datamodules.readers.io import EXPANSION, MIN_EXPANSION
from datamodules.records import UserError, explained

log = logging.getLogger(__name__)

Report = Callable[[int, int | None], None]  # receives the number of bytes so far, and the total if known

PAUSES = (1, 2, 4, 8, 16)  # seconds before each retry; after the last one, give up unless there is progress
MAX_PAUSE = 120  # seconds, even if the server asks for more
TIMEOUT = 60  # seconds without receiving a byte
CHUNK = 1 << 20
RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)
RETRIED_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
RESERVE = 1 << 28  # bytes that unpacking leaves free on the disk
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
DAMAGED_ARCHIVE = (
    *(zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError),
    *(NotImplementedError, RuntimeError),  # raised by zipfile for archives it cannot read
)


# --- downloads ---


class Interrupted(Exception):
    """The download stopped early; another attempt may get the rest. seconds: pause that the server asks for."""

    def __init__(self, reason: str, seconds: float = 0):
        super().__init__(reason)
        self.seconds = min(seconds, MAX_PAUSE)


class NotOnServer(UserError):
    """The server does not have the file."""


def download(
    url: str, path: Path, size: int | None, has_checksum: bool, report: Report = lambda done, total: None
) -> Path:
    """Download a file as path.part, and return that path. The caller verifies the file, then calls `keep` or `discard`.

    size: number of bytes, if known.
    has_checksum: whether the caller can verify the file. If not, a partial download is only resumed if the server still
        has the same version.

    Raises UserError after several attempts without progress. The partial download stays.
    """
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = most = 0
    while True:
        most = max(most, _size(part))  # no progress if a server always sends less than it announces
        try:
            _receive(url, part, size, has_checksum, report)
            return part
        except Interrupted as error:
            failures = 1 if _size(part) > most else failures + 1
            if failures > len(PAUSES):
                raise UserError(
                    f"{url}: {error}; gave up after {failures} attempts without progress. {manual_help(path)}"
                ) from error
            pause = max(error.seconds, PAUSES[failures - 1])
            log.info("%s: %s; trying again in %g s", url, error, pause)
            time.sleep(pause)


def check_url(key: str, url: str) -> None:
    """Raise UserError unless a text is an http or https URL. key: key that sets it."""
    with explained(f"{key}: {url!r} is not a valid URL", ValueError):
        parts = urllib.parse.urlsplit(url)
        parts.netloc.encode("idna")
        is_url = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    if not is_url or re.search(r"[\x00-\x20\x7f]", url):
        raise UserError(f"{key}: expected http:// or https:// and a host, got {url!r}")


def keep(part: Path) -> None:
    """Give a verified download its final name."""
    part.replace(_final_path(part))
    _version_file(part).unlink(missing_ok=True)


def discard(part: Path) -> None:
    """Delete a partial download."""
    part.unlink()
    _version_file(part).unlink(missing_ok=True)


def manual_help(path: Path) -> str:
    """Return advice for a failed download."""
    return f"Run the same command again to resume, or place the file yourself as {path} and run it."


def _final_path(part: Path) -> Path:
    return part.with_name(part.name.removesuffix(".part"))


def _version_file(part: Path) -> Path:
    """Return the file that stores the version of a partial download: the server's ETag or date."""
    return part.with_name(f"{part.name}.sign")


def _size(path: Path) -> int:
    """Return the size of a partial download, or 0 for a link or anything else that we must not append to."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else 0


def _read_version(part: Path) -> tuple[str, int | None]:
    """Return the server's version of a partial download ("" if unknown), and the size of the whole file."""
    try:
        version, _, total = read_regular(_version_file(part)).partition("\n")
    except (OSError, ValueError):
        return "", None
    return version, int(total) if total.isdecimal() else None


def _receive(url: str, part: Path, size: int | None, has_checksum: bool, report: Report) -> None:
    """Download the rest of a file. Raises Interrupted and UserError."""
    version, whole = _read_version(part)
    start = _size(part) if version or has_checksum else 0
    whole = whole if start and size is None else size
    headers = {"User-Agent": "scimult", "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-"} | ({"If-Range": version} if version else {})
    try:
        check_url(url, url)
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
            if response.headers.get_content_type() == "text/html":
                advice = manual_help(_final_path(part))
                raise UserError(f"{url}: the server sent a web page instead of the file. {advice}")
            start = _first_byte(response, start)
            rest = response.headers.get("Content-Length", "")
            total = start + int(rest) if rest.isdecimal() else None
            if size is not None and total is not None and total != size:
                raise UserError(f"{url}: expected a file of {size:,} bytes, but the server has {total:,}")
            if start and None not in (whole, total) and total != whole:
                part.unlink()
                raise Interrupted(
                    f"the size of the file was {whole:,} bytes, and is now {total:,}; starting from the beginning"
                )
            total = (whole if start else size) if total is None else total
            write_text(_version_file(part), f"{_version(response)}\n{'' if total is None else total}")
            _append(response, part, start, total, report)
    except urllib.error.HTTPError as error:
        _handle_refusal(url, part, error, start, whole)
    except UserError:
        raise
    except ValueError as error:  # raised if the URL, or the target of a redirect, cannot be parsed
        raise UserError(f"{url}: not a valid URL ({error})") from error
    except RETRIED_ERRORS as error:
        raise Interrupted(f"cannot be reached ({getattr(error, 'reason', error)})") from error
    except OSError as error:
        reason = "the disk is full" if error.errno in NO_SPACE else f"cannot be written ({error.strerror})"
        raise UserError(f"{part}: {reason}; the same command resumes the download") from error


def _first_byte(response: http.client.HTTPResponse, requested: int) -> int:
    """Return the position of a response's first byte: the requested one, or 0 if the server sends the whole file."""
    if response.status != 206:
        return 0
    content_range = response.headers.get("Content-Range", "")
    if not content_range.startswith(f"bytes {requested}-"):
        raise Interrupted(f"requested bytes from {requested} on, but got {content_range!r}")
    return requested


def _version(response: http.client.HTTPResponse) -> str:
    """Return the ETag, or the date if the ETag is missing or weak."""
    tag = response.headers.get("ETag", "")
    return response.headers.get("Last-Modified", "") if tag.startswith("W/") or not tag else tag


def _append(response: http.client.HTTPResponse, part: Path, start: int, total: int | None, report: Report) -> None:
    if total is not None and (free := shutil.disk_usage(part.parent).free) < total - start:
        raise UserError(f"{part}: needs {total - start:,} bytes, but only {free:,} are free on the disk")
    done = start
    with open_new(part, keep=start > 0, buffering=0) as file:  # unbuffered, so that a kill loses nothing
        while chunk := response.read1(CHUNK):
            file.write(chunk)
            done += len(chunk)
            report(done, total)
        os.fsync(file.fileno())
    if total is not None and done < total:
        raise Interrupted(f"the connection ended after {done:,} of {total:,} bytes")


def _handle_refusal(url: str, part: Path, error: urllib.error.HTTPError, start: int, size: int | None) -> None:
    """Raise Interrupted or UserError, unless the partial download is already complete."""
    if error.code == 416 and start:  # the requested range starts at or after the end of the file
        if size == start or (size is None and error.headers.get("Content-Range") == f"bytes */{start}"):
            return
        part.unlink()
        raise Interrupted("the size of the file on the server has changed; starting from the beginning")
    if error.code in RETRIED_STATUS:
        seconds = error.headers.get("Retry-After", "")
        raise Interrupted(f"the server answers {error.code} {error.reason}", int(seconds) if seconds.isdecimal() else 0)
    kind = NotOnServer if error.code in (404, 410) else UserError
    raise kind(f"{url}: the server answers {error.code} {error.reason}. {manual_help(_final_path(part))}")


# --- archives ---


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    size: int
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, kind: str, members: Sequence[str], folder: Path, report: Callable[[str], None]) -> None:
    """Unpack the members of an archive that match a pattern. Complete files from an earlier attempt are kept.

    Only regular files inside the folder are written.

    kind: "zip", or "tar" (compressed or not).
    report: function that receives the name of each unpacked member.

    Raises UserError if the archive is damaged, or if nothing matches a pattern.
    """
    matched: set[str] = set()
    limit, expanded = max(MIN_EXPANSION, EXPANSION * archive.stat().st_size), 0
    try:
        for member in _zip_members(archive) if kind == "zip" else _tar_members(archive):
            expanded += member.size
            if expanded > limit:
                raise UserError(
                    f"{archive}: unpacking stopped at {limit:,} bytes, {EXPANSION} times the size of the archive. If "
                    f"it is the right file, unpack it yourself into {folder}"
                )
            patterns = {pattern for pattern in members if fnmatch.fnmatchcase(member.name, pattern)}
            if not patterns:
                continue
            matched |= patterns
            target = _target_path(archive, folder, member.name)
            if target.is_symlink() or not (target.is_file() and target.stat().st_size == member.size):
                report(member.name)
                _check_space(archive, folder, member)
                _write_member(member, target)
    except DAMAGED_ARCHIVE as error:
        raise UserError(f"{archive}: the archive is damaged ({error}); delete it to download it again.") from error
    except OSError as error:
        raise UserError(f"{folder}: {archive.name} cannot be unpacked ({error.strerror or error})") from error
    if missing := [pattern for pattern in members if pattern not in matched]:
        raise UserError(f"{archive}: does not contain {', '.join(missing)}; is it the right archive?")


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            if not info.is_dir():
                yield _Member(info.filename, info.file_size, lambda info=info: opened.open(info))


def _tar_members(archive: Path) -> Iterator[_Member]:
    with tarfile.open(archive) as opened:
        for info in opened:
            if info.isfile():  # not a link or device
                yield _Member(info.name.removeprefix("./"), info.size, lambda info=info: opened.extractfile(info))
        while opened.fileobj.read(CHUNK):  # reads on to gzip's checksum after the last member
            pass


def _target_path(archive: Path, folder: Path, name: str) -> Path:
    """Return the path of an unpacked member. Raises UserError if it is outside the folder."""
    target = Path(os.path.normpath(folder / name))
    is_inside = target.is_relative_to(folder) and target.parent.resolve().is_relative_to(folder.resolve())
    if "\\" in name or not is_inside or target == folder:
        raise UserError(f"{archive}: not unpacked, because its member {name!r} is outside the folder")
    return target


def _check_space(archive: Path, folder: Path, member: _Member) -> None:
    """Raise UserError if a member would fill the disk."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if member.size > (free := shutil.disk_usage(existing).free - RESERVE):
        raise UserError(
            f"{folder}: {member.name} from {archive.name} needs {member.size:,} bytes, but only {max(0, free):,} are "
            "free on the disk; the same command unpacks the rest"
        )


def _write_member(member: _Member, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    with member.open() as source, open_new(partial) as file:
        shutil.copyfileobj(source, file, CHUNK)  # at the end of a zip member, this verifies its checksum
    os.replace(partial, target)
