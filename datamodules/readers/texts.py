"""Texts of one file, one after the other, in shards of a fixed number of lines: what is embedded.

A shard is lines, not documents, so that who wants only some of them need not parse the others.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from datamodules.readers import fields
from datamodules.readers.bad_lines import BadLines, Place
from datamodules.readers.json_values import as_object
from datamodules.readers.lines import find_file
from datamodules.readers.rows import rows_of_files
from datamodules.records import Document, UserError

ID_KEYS = ("id", "_id", "paper_id", "corpusid")


def text_file(source: Path) -> Path:
    """The file itself, or the corpus of a folder. Raises UserError if there is none."""
    if source.is_dir():
        return find_file(source, "corpus.jsonl", "corpus.json")
    if not source.is_file():
        raise UserError(f"input: {source} is no file, and no folder with a corpus.jsonl")
    return source


def count_lines(path: Path, on_error: str) -> int:
    """Lines (rows of parquet, entries of one JSON list) that shards are made of. Raises UserError."""
    bad = BadLines(on_error, os.devnull)  # they are told of when their shard is read
    return sum(1 for _ in rows_of_files([path], bad))


def read_shards(path: Path, size: int, wanted: Container[int], bad: BadLines) -> Iterator[tuple[int, list[Document]]]:
    """Numbers and documents of the wanted shards, of `size` lines each, but for bad lines and the last shard.

    A line is {"id": ..., "title": ..., "text" or "abstract": ...}. Raises UserError for a bad line, unless the policy
    skips it.
    """
    number, documents, line = 0, [], -1
    for line, place in enumerate(rows_of_files([path], bad)):
        if line // size != number:
            if number in wanted:
                yield number, documents
            number, documents = line // size, []
        if number in wanted:
            with place:
                documents.append(_document(place))
    if line >= 0 and number in wanted:
        yield number, documents


def _document(place: Place) -> Document:
    record = as_object(place, " with id, title and text")
    body = "text" if "text" in record or "abstract" not in record else "abstract"
    document = fields.document(record, ID_KEYS, body=body)
    if "\n" in document.id or "\r" in document.id:
        raise UserError(f"the id {document.id!r} has a line end")
    return document


def documents_at(path: Path, lines: Iterable[int]) -> dict[int, Document]:
    """The documents of some lines, counted from 0, of a file without bad ones; of those that are none now, nothing."""
    found, wanted = {}, set(lines)
    for line, place in enumerate(rows_of_files([path], BadLines())):
        if line in wanted:
            with suppress(UserError):
                found[line] = _document(place)
            if len(wanted) == len(found):
                break
    return found
