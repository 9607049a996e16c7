"""The texts of a file, in shards of a fixed number of lines, to be embedded.

Shards are counted in lines and not in documents, so that unwanted shards need not be parsed.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from datamodules.papers.formats import JSON, KNOWN_SUFFIXES, suffix_of
from datamodules.readers.checks import BadLines, Row
from datamodules.readers.io import as_object, find_file
from datamodules.readers.tables import read_tables
from datamodules.records import Document, UserError

LIBRARIES = KNOWN_SUFFIXES - {*JSON, ".parquet"}
ID_KEYS = ("id", "_id", "paper_id", "corpusid")


def text_file(source: Path) -> Path:
    """Return the file itself, or the corpus of a folder. Raises UserError if there is none."""
    if source.is_dir():
        return find_file(source, "corpus.jsonl", "corpus.json")
    if not source.is_file():
        raise UserError(f"input: {source} is neither a file nor a folder with a corpus.jsonl")
    if suffix_of(source) in LIBRARIES:
        raise UserError(
            f"input: {source} is a library of papers; import it first, and use its papers.jsonl (docs/import.md)"
        )
    return source


def count_lines(path: Path, on_error: str) -> int:
    """Return the number of lines (rows of parquet, entries of a JSON list) in a file."""
    bad = BadLines(on_error, os.devnull)  # bad lines are reported when their shard is read
    return sum(1 for _ in read_tables([path], bad))


def read_shards(path: Path, size: int, wanted: Container[int], bad: BadLines) -> Iterator[tuple[int, list[Document]]]:
    """Yield the number and the documents of each wanted shard.

    A line is {"id": ..., "title": ..., "text" (or "abstract"): ...}. Raises UserError for a bad line, unless the policy
    skips it.

    size: number of lines per shard. Bad lines count, and the last shard may be shorter.
    """
    number, documents, line = 0, [], -1
    for line, row in enumerate(read_tables([path], bad)):
        if line // size != number:
            if number in wanted:
                yield number, documents
            number, documents = line // size, []
        if number in wanted:
            with row:
                documents.append(_document(row))
    if line >= 0 and number in wanted:
        yield number, documents


def documents_at(path: Path, lines: Iterable[int]) -> dict[int, Document]:
    """Return the documents of some lines, by line number from 0. Lines that hold no document are left out."""
    documents, wanted = {}, set(lines)
    for line, row in enumerate(read_tables([path], BadLines())):
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
