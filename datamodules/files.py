"""Write files and folders atomically: a killed process never leaves a half-written file under its final name."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import threading
import tokenize
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from datamodules.records import LONGEST_NAME, UserError, reason, short

PARTIAL = ".partial"  # suffix of temporary folders

# Type -> its name in messages.
JSON_TYPES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
}


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary binary file, and move it to path once it is completely on disk. On an error, delete it."""
    name = path.name.encode()[:LONGEST_NAME].decode(errors="ignore")  # the whole name may leave no room for the rest
    partial = path.with_name(f".{name}.{socket.gethostname()}.{os.getpid()}.{threading.get_native_id()}")
    try:
        with _named(path), open_new(partial) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add a path to a system error that names no file, as after a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def open_new(path: Path, keep: bool = False, buffering: int = -1) -> BinaryIO:
    """Open a file for writing, but never write through a link or a pipe.

    In a shared folder, another user may have put a link there. It is deleted instead.

    keep: whether to append to an existing regular file; otherwise, start with an empty file.
    buffering: as in open().
    """
    with contextlib.suppress(FileNotFoundError):
        status = path.lstat()
        if not (keep and stat.S_ISREG(status.st_mode) and status.st_nlink == 1):
            path.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_APPEND if keep else os.O_EXCL)
    return open(path, "ab" if keep else "wb", buffering, opener=lambda name, _: os.open(name, flags, 0o666))


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Create a temporary folder to fill, and move it to path once it is complete. On an error, delete it.

    path: new folder, or existing folder to replace. The parent is created if needed.
    """
    path = path.resolve()  # if it is a link, replace its target and keep the link
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    partial, lock = _locked_folder(path)
    try:
        with _named(path):
            yield partial
        partial.chmod(0o755)
        if path.is_dir() and any(path.iterdir()):
            path.replace(old := partial.with_name(f"{partial.name}.old"))
            try:
                partial.replace(path)
            except BaseException:
                old.replace(path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _locked_folder(path: Path) -> tuple[Path, int]:
    """Create a temporary folder for path, and lock it. Tries again if another process removes it in between."""
    while True:
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=PARTIAL, dir=path.parent))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(partial, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if partial.exists():
                return partial, lock
            os.close(lock)


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary folders that killed processes left behind. Running processes lock theirs.

    The previous version of a folder (.old) is only removed if the new version is in place.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}-????????{PARTIAL}*"):
        if leftover.suffix == ".old" and not path.exists():
            continue
        with contextlib.suppress(OSError):  # the folder is in use, or the file system has no locks
            lock = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(lock)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Any, **options: Any) -> None:
    """Write a JSON file atomically. options: arguments of json.dumps, by default indent=2."""
    write_text(path, json.dumps(content, **{"indent": 2, **options}))


def append_lines(path: Path, text: str) -> None:
    """Append whole lines to a file. If a kill cut off the last line, end it first. On OSError, append nothing."""
    content = text.encode()
    with open(path, "ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            content = content if file.read(1) == b"\n" else b"\n" + content
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(end)
            raise


def expanded(path: str | Path, key: str, advice: str = "") -> Path:
    """Return a path with ~ replaced by the home folder.

    key: setting with the path, for the error.
    advice: alternative to naming a folder, for the error.
    Raises UserError if the user has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # no HOME, and no entry in /etc/passwd, as in containers with an arbitrary uid
        advice = f"name a folder{advice}"
        raise UserError(f"{key}: {path} needs a home folder, but this user has none; {advice}") from error


RECREATED = "Delete it, and it will be created again."


def regular(path: Path, longest: int | None = None) -> Path:
    """Return the path of a regular file. Raises OSError for a pipe or device, which might never end.

    longest: maximum number of bytes; larger files raise OSError.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "expected a regular file", str(path))
    if longest is not None and status.st_size > longest:
        raise OSError(errno.EFBIG, f"expected at most {longest:,} bytes, got {status.st_size:,}", str(path))
    return path


def refuse_other_file(path: Path, start: bytes, content: str) -> None:
    """Raise UserError if an output would replace a file of other content, such as one of the user's papers.

    start: pattern with which a file of this kind starts. content: the kind, for the message.
    """
    if path.is_file() and (head := _head(path)) and not re.match(start, head):
        raise UserError(f"output: {path} exists and is not {content}; choose another file, or delete this one")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1000)


# Errors that numpy raises for damaged array headers, besides OSError and ValueError.
ARRAY_ERRORS = (EOFError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError, tokenize.TokenError)


def file_state(path: Path) -> str:
    """Return a string that changes whenever a file is moved, replaced or written again."""
    status = path.stat()
    return repr((str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns))


def load_array(path: Path, mode: Literal["r", "c"] = "r") -> np.memmap:
    """Return the array of a .npy file, memory-mapped: mode "r" is read-only, "c" copies on write.

    Raises OSError or ValueError for any damage.
    """
    try:
        return np.load(regular(path), mmap_mode=mode)
    except ARRAY_ERRORS as error:
        raise ValueError(f"not an array: {error}") from error


def read_regular(path: Path, longest: int | None = None) -> str:
    """Return the text of a file. Raises OSError like regular()."""
    return regular(path, longest).read_text(encoding="utf-8")


def read_json(path: Path, expected: type | Mapping[str, type] = dict, hint: str = RECREATED) -> Any:
    """Return the content of a JSON file.

    expected: type of the content, or the types of an object's required keys.
    hint: advice on a damaged file, for the error.
    Raises UserError if the file is missing or damaged, or its content is not of the expected type.
    """
    hint = f" {hint}" if hint else ""
    try:
        content = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}).{hint}") from error
    if problem := _type_problem(content, expected):
        raise UserError(f"{path}: {problem}.{hint}")
    return content


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines, or [] if it is missing. All other lines are skipped."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ()
    return [row for line in lines if (row := json_object(line)) is not None]


def json_object(line: str | bytes) -> dict[str, Any] | None:
    """Return the JSON object in a line, or None for anything else, such as a line that a kill cut short."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


@contextmanager
def damage_explained(path: Path, content: str, hint: str = RECREATED) -> Iterator[None]:
    """Turn errors from reading keys of damaged content into a UserError.

    content: what the file should contain, such as "a manifest of a run". hint: advice on a damaged file.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: damaged, or not {content} ({reason(error)}). {hint}".rstrip()) from error


def _type_problem(content: Any, expected: type | Mapping[str, type]) -> str | None:
    kind: Any = expected if isinstance(expected, type) else dict
    if not isinstance(content, kind):
        return f"expected {JSON_TYPES[kind]}, got {short(content)}"
    for key, kind in {} if isinstance(expected, type) else expected.items():
        if not isinstance(value := content.get(key), kind):
            return f"expected {JSON_TYPES[kind]} as {key}, got {short(value)}"
    return None
