"""Files from the web: whole, or with a .part beside them that the next attempt goes on from."""

from __future__ import annotations

import errno
import http.client
import logging
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from datamodules.files import write_text
from datamodules.records import UserError

log = logging.getLogger(__name__)

Report = Callable[[int, int | None], None]  # bytes received, and in all where the server says so

PAUSES = (1, 2, 4, 8, 16)  # seconds before a further attempt; one that brought nothing after the last is an error
LONGEST_PAUSE = 120  # that a server may ask for
TIMEOUT = 60  # seconds without a byte
CHUNK = 1 << 20
TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
PASSING = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Interrupted(Exception):
    """The file did not come to its end; a further attempt, after so many seconds, may bring the rest."""

    def __init__(self, reason: str, seconds: float = 0):
        super().__init__(reason)
        self.seconds = min(seconds, LONGEST_PAUSE)


class NotThere(UserError):
    """The server has no such file."""


def download(url: str, path: Path, size: int | None, verified: bool, report: Report = lambda done, total: None) -> Path:
    """The whole file at a url, as path.part: who calls verifies it, and then calls `keep` or `discard`.

    size: in bytes, where it is known. verified: whether its checksum is known; where it is not, a part is gone on with
    only if the server says that it still has the same file. Raises UserError, after a number of attempts without any
    progress; the part stays.
    """
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        before = length(part)
        try:
            _receive(url, part, size, verified, report)
            return part
        except Interrupted as error:
            failures = 1 if length(part) > before else failures + 1
            if failures > len(PAUSES):
                raise UserError(f"{url}: {error}, {failures} times without progress. {by_hand(path)}") from error
            pause = max(error.seconds, PAUSES[failures - 1])
            log.info("%s: %s; once more in %g s", url, error, pause)
            time.sleep(pause)


def keep(part: Path) -> None:
    """Under its name, from now on."""
    part.replace(part.with_name(part.name.removesuffix(".part")))
    _sign(part).unlink(missing_ok=True)


def discard(part: Path) -> None:
    part.unlink()
    _sign(part).unlink(missing_ok=True)


def _sign(part: Path) -> Path:
    """The file that holds what the server calls this version of what it sends."""
    return part.with_name(f"{part.name}.sign")


def by_hand(path: Path) -> str:
    return f"Give the same command again to go on, or place the file by hand as {path}, and give it then."


def length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _receive(url: str, part: Path, size: int | None, verified: bool, report: Report) -> None:
    """What is missing of the part. Raises Interrupted and UserError."""
    sign = _sign(part)
    version = sign.read_text(encoding="utf-8") if sign.exists() else ""
    start = length(part) if version or verified else 0
    headers = {"User-Agent": "scimult", "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-"} | ({"If-Range": version} if version else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
            if response.headers.get_content_type() == "text/html":
                path = part.with_name(part.name.removesuffix(".part"))
                raise UserError(f"{url}: the server sends a web page instead of the file. {by_hand(path)}")
            start = _start(response, start)
            total = _total(response, start)
            if size is not None and total is not None and total != size:
                raise UserError(f"{url}: the recipe says {size:,} bytes, the server has {total:,}: not this file")
            write_text(sign, _version(response))
            _append(response, part, start, size if total is None else total, report)
    except urllib.error.HTTPError as error:
        _refused(url, part, error, start, size)
    except PASSING as error:
        raise Interrupted(f"cannot be reached ({getattr(error, 'reason', error)})") from error
    except OSError as error:
        kind = "the disk is full" if error.errno in NO_SPACE else f"cannot be written ({error.strerror})"
        raise UserError(f"{part}: {kind}; the same command goes on from here") from error


def _start(response: http.client.HTTPResponse, wanted: int) -> int:
    """The byte with which the answer begins: servers may send all of the file."""
    if response.status != 206:
        return 0
    found = response.headers.get("Content-Range", "")
    if not found.startswith(f"bytes {wanted}-"):
        raise Interrupted(f"asked for bytes from {wanted} on, and got {found!r}")
    return wanted


def _total(response: http.client.HTTPResponse, start: int) -> int | None:
    rest = response.headers.get("Content-Length", "")
    return start + int(rest) if rest.isdecimal() else None


def _version(response: http.client.HTTPResponse) -> str:
    tag = response.headers.get("ETag", "")
    return response.headers.get("Last-Modified", "") if tag.startswith("W/") or not tag else tag


def _append(response: http.client.HTTPResponse, part: Path, start: int, total: int | None, report: Report) -> None:
    if total is not None and (free := shutil.disk_usage(part.parent).free) < total - start:
        raise UserError(f"{part}: needs {total - start:,} bytes, and {free:,} are free there")
    done = start
    with open(part, "ab" if start else "wb", buffering=0) as file:  # who is killed has what was received
        while chunk := response.read1(CHUNK):
            file.write(chunk)
            done += len(chunk)
            report(done, total)
        os.fsync(file.fileno())
    if total is not None and done < total:
        raise Interrupted(f"the connection ended after {done:,} of {total:,} bytes")


def _refused(url: str, part: Path, error: urllib.error.HTTPError, start: int, size: int | None) -> None:
    """Raises, unless it is that there is nothing left to send."""
    if error.code == 416 and start:  # the part is as long as the file, or longer
        if size == start or error.headers.get("Content-Range") == f"bytes */{start}":
            return
        part.unlink()
        raise Interrupted("the file there is shorter than what was received; from the beginning")
    if error.code in TRY_AGAIN:
        asked = error.headers.get("Retry-After", "")
        raise Interrupted(f"the server says {error.code} {error.reason}", int(asked) if asked.isdecimal() else 0)
    path = part.with_name(part.name.removesuffix(".part"))
    kind = NotThere if error.code in (404, 410) else UserError
    raise kind(f"{url}: the server says {error.code} {error.reason}. {by_hand(path)}")
