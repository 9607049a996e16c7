"""Read texts to embed from one or several files, in shards of a fixed number of lines.

The size of a shard is a number of lines, not of documents, so that unwanted shards need not be parsed.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from datamodules.papers.formats import JSON, KNOWN_SUFFIXES
from datamodules.readers.io import find_optional_file, suffix_of
from datamodules.readers.json_files import as_object
from datamodules.readers.rows import BadLines, Row
from datamodules.readers.tables import read_tables
from datamodules.records import Document, UserError

LIBRARIES = KNOWN_SUFFIXES - {*JSON, ".parquet"}
TEXTS = re.compile(r"(?<!^queries)\.(jsonl(\.gz|\.zst)?|parquet)$")
NUMBERS = re.compile(r"(\d+)")
ID_KEYS = ("id", "_id", "paper_id", "corpusid")


def text_files(source: Path, key: str = "input") -> list[Path]:
    """Return a file itself, the corpus or all shards of a folder, or all files that match a pattern such as
    part-*.jsonl.gz.

    Shards are in order of their paths, with numbers sorted by value.

    key: option that names the source, for errors.
    Raises UserError if there are no files.
    """
    if source.is_file():
        files, expected = [source], ""
    elif source.is_dir():
        if corpus := find_optional_file(source, "corpus.jsonl", "corpus.json"):
            return [corpus]
        files = [path for path in source.iterdir() if TEXTS.search(path.name) and path.is_file()]
        expected = "a corpus.jsonl, or shards that end in .jsonl, .jsonl.gz, .jsonl.zst or .parquet"
    else:
        files = [Path(path) for path in glob.glob(str(source)) if Path(path).is_file()]
        expected = "an existing file, a folder, or a pattern of files"
    if not files:
        raise UserError(f"{key}: {source}: expected {expected}")
    if library := next((path for path in files if suffix_of(path) in LIBRARIES), None):
        raise UserError(
            f"{key}: {library} is a table or a library of papers; expected JSON lines or .parquet. make import turns "
            "it into papers.jsonl (docs/import.md)"
        )
    return sorted(files, key=_numbers_by_value)


def _numbers_by_value(path: Path) -> list[int | str]:
    return [int(text) if text.isdecimal() else text for text in NUMBERS.split(str(path))]


def count_lines(paths: Sequence[Path], on_error: str) -> int:
    """Return the number of lines (rows of parquet, entries of a JSON list) in files."""
    bad = BadLines(on_error, os.devnull)  # bad lines will be reported when their shard is read
    return sum(1 for _ in read_tables(paths, bad))


def check_ids(paths: Sequence[Path], on_error: str) -> None:
    """Raise UserError, naming both lines, if two lines have the same id, because results could not tell them apart."""
    seen: set[str] = set()
    for row, id in _ids(paths, on_error):
        if id in seen:
            first = next(earlier for earlier, other in _ids(paths, on_error) if other == id)
            raise UserError(f"{row}: the id {id!r} is also in {first}; remove one of the two lines, or change its id")
        seen.add(id)


def _ids(paths: Sequence[Path], on_error: str) -> Iterator[tuple[Row, str]]:
    bad = BadLines(on_error, os.devnull)
    for row in read_tables(paths, bad):
        with row:
            yield row, _document(row).id


def read_shards(
    paths: Sequence[Path], size: int, wanted: Container[int], bad: BadLines
) -> Iterator[tuple[int, list[Document]]]:
    """Yield the number and the documents of each wanted shard.

    A line is {"id": ..., "title": ..., "text" (or "abstract"): ...}. Raises UserError for a bad line, unless the policy
    skips it.

    size: number of lines per shard. Bad lines count too, and the last shard may be shorter.
    """
    number, documents, line = 0, list[Document](), -1
    for line, row in enumerate(read_tables(paths, bad)):
        if line // size != number:
            if number in wanted:
                yield number, documents
            number, documents = line // size, []
        if number in wanted:
            with row:
                documents.append(_document(row))
    if line >= 0 and number in wanted:
        yield number, documents


def documents_at(paths: Sequence[Path], lines: Iterable[int]) -> dict[int, Document]:
    """Return line number (from 0) -> document for some lines. Lines without a document are left out."""
    documents, wanted = {}, set(lines)
    for line, row in enumerate(read_tables(paths, BadLines())):
        if line in wanted:
            with suppress(UserError):
                documents[line] = _document(row)
            if len(wanted) == len(documents):
                break
    return documents


def _document(row: Row) -> Document:
    document = as_object(row, " with id, title and text").document(*ID_KEYS, body="text")
    if "\n" in document.id or "\r" in document.id:
        raise UserError(f"the id {document.id!r} contains a line break")
    return document
