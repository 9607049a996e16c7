"""Find files, and read them as text or numbered lines. Files may be plain, .gz or .zst.

Text is UTF-8, with or without a byte order mark, and with any line endings. Large files are never held in memory, and a
file that cannot be read to its end always raises an error.
"""

from __future__ import annotations

import gzip
import io
import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from datamodules.readers.checks import SPLIT_NAMES, SURROGATES
from datamodules.readers.rows import BadLines, Row
from datamodules.records import UserError

log = logging.getLogger(__name__)

MAX_LINE = 64 * 2**20  # characters; a longer line means damage, or a file without line endings
# Compression shrinks texts to a fifth, and repetitive texts to a fiftieth. A malicious file may expand a thousandfold.
EXPANSION, MIN_EXPANSION = 200, 2**30  # maximum ratio, and size up to which any ratio is accepted
CHUNK = 2**20  # characters to read at a time
SUFFIXES = ("", ".gz", ".zst")


def suffix_of(path: Path) -> str:
    """Return the suffix of a file in lower case, without .gz or .zst."""
    return Path(path.stem).suffix.lower() if path.suffix in SUFFIXES[1:] else path.suffix.lower()


def check_folder(folder: Path, expected: str) -> None:
    """Raise UserError if a folder is missing. expected: description of its files, for the error."""
    if folder.is_file():
        raise UserError(f"{folder}: is a file; expected a folder with {expected}")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (expected {expected} in it)")


def find_optional_file(folder: Path, *names: str) -> Path | None:
    """Return the path of the first of the names that exists in the folder, plain or compressed, or None."""
    paths = (folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def find_file(folder: Path, *names: str) -> Path:
    """Return the path of the first of the names that exists in the folder. Raises UserError if none of them does."""
    if path := find_optional_file(folder, *names):
        return path
    check_folder(folder, names[0])
    others = "".join(f", nor {name}" for name in names[1:])
    raise UserError(f"{folder / names[0]}: no such file{others} (also not as .gz or .zst)")


def find_path(path: Path) -> Path:
    """Return the path of a file, plain or compressed. Raises UserError if it is missing."""
    return find_file(path.parent, path.name)


def find_split_files(folder: Path, *patterns: str, names: Mapping[str, str] = SPLIT_NAMES) -> dict[str, Path]:
    """Return the file of each split that has one (the first match, if there are several).

    patterns: file names in order of preference, with SPLIT for the name of the split.
    names: name in file names -> split, in order of preference.
    """
    files: dict[str, Path] = {}
    for name, split in names.items():
        if path := find_optional_file(folder, *(pattern.replace("SPLIT", name) for pattern in patterns)):
            files.setdefault(split, path)
    return files


def warn_of_unread_files(folder: Path, pattern: str, read: Iterable[Path]) -> None:
    """Log a warning about files in a folder that look like splits but are not read.

    pattern: glob pattern of the files. read: files that are read.
    """
    if unread := sorted(path.name for path in set(folder.glob(pattern)) - set(read) if path.is_file()):
        names = ", ".join(dict.fromkeys(SPLIT_NAMES))
        log.warning("%s: not read: %s (a split has one file, named %s)", folder, ", ".join(unread), names)


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a file as text, and decompress it according to its suffix. Bytes that are not UTF-8 become surrogates.

    Raises UserError if it cannot be opened.
    """
    try:
        file: Any = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror})") from error
    if path.suffix == ".zst":
        # pyarrow is installed anyway, and unlike the package zstandard, it raises an error for a truncated file. It
        # rejects files with windows of more than 128 MB (zstd --long=28 and above).
        import pyarrow

        file = pyarrow.input_stream(file, compression="zstd")
    if path.suffix in SUFFIXES[1:]:
        file = io.BufferedReader(_Decompressed(file, path), CHUNK)
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape") as stream:
        yield stream


class _Decompressed(io.RawIOBase):
    """The content of a compressed file. Raises UserError if the content is many times larger than the file."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path, self.size = file, path, 0
        self.limit = max(MIN_EXPANSION, EXPANSION * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self.file.read(len(buffer))
        self.size += len(content)
        if self.size > self.limit:
            raise UserError(
                f"{self.path}: expands to more than {self.limit:,} bytes, {EXPANSION} times its size; if it is the "
                "right file, decompress it"
            )
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self.file.close()
        super().close()


def read_chunk(stream: TextIO, path: Path, number: int, size: int, whole_line: bool = False) -> str:
    """Read up to `size` characters of a text, or of the current line. Raises UserError if the file is damaged.

    number: number of lines read so far, for the error.
    """
    try:
        return stream.readline(size) if whole_line else stream.read(size)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: the gzip file is damaged after line {number} ({error})") from error
    except OSError as error:
        if error.errno is None and path.suffix == ".zst":  # raised by the decompressor, not by the system
            raise UserError(f"{path}: the zstd file is damaged after line {number} ({error})") from error
        raise UserError(f"{path}: cannot be read after line {number} ({error.strerror})") from error


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and text of each line, for formats whose records are not lines.

    Raises UserError if a line is longer than MAX_LINE, or if the file cannot be read to its end.
    """
    for number, line, reason in _lines(path):
        if reason:
            raise UserError(f"{path}, line {number}: {reason}")
        yield number, line


def read_lines(path: Path, bad: BadLines) -> Iterator[Row]:
    """Yield the non-blank lines, numbered from 1.

    Lines that are not text (not UTF-8, with NUL bytes, longer than MAX_LINE) are reported as bad. Raises UserError if
    the file cannot be read to its end.
    """
    num_lines = 0
    for number, line, reason in _lines(path):
        if line.isspace():
            continue
        num_lines += 1
        row = Row(bad, path, number, line.rstrip("\r\n"))
        if reason := reason or not_text(line):
            bad.report(row, reason)
        else:
            yield row
    bad.end_of_file(path, num_lines)


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the number and text of each line, and why it is bad, or "". Lines longer than MAX_LINE are bad, and cut."""
    number = 0
    with open_text(path) as stream:
        while line := read_chunk(stream, path, number, MAX_LINE + 1, whole_line=True):
            number += 1
            is_cut = len(line) > MAX_LINE and not line.endswith("\n")
            yield number, line, f"longer than {MAX_LINE:,} characters" if is_cut else ""
            while is_cut and line and not line.endswith("\n"):
                line = read_chunk(stream, path, number, MAX_LINE, whole_line=True)


def not_text(text: str) -> str:
    """Return the reason why a string is not text, or "" if it is."""
    if text.startswith(("\udcff\udcfe", "\udcfe\udcff")):
        return "UTF-16, as some Windows programs write it; save the file as UTF-8"
    if "\0" in text:
        return "contains NUL bytes, as after a crash or an incomplete copy"
    if not text.isascii() and (match := SURROGATES.search(text)):
        return f"not UTF-8 (byte 0x{ord(match[0]) & 0xFF:02x} at column {match.start() + 1})"
    return ""
