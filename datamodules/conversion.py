"""Convert a reader's collection into the format of store.py once, and reuse it while its files are unchanged."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from datamodules.examples import ExampleTable, whole_grade
from datamodules.files import file_state
from datamodules.progress_lines import ProgressLines
from datamodules.readers.collecting import add_id, stream_collection
from datamodules.records import Collection, Document, Sink, UserError, check_name
from datamodules.store import BATCH_ROWS, FIELDS, StoredCollection, StoredDocuments, make_once

log = logging.getLogger(__name__)

# Version of the layout, and of what readers make of files. Collections in any other version are converted again.
VERSION = 7
PATHS = ("folder", "source", "judgements", "train", "dev", "test")  # reader arguments that can be relative paths


@runtime_checkable
class FileReader(Protocol):
    """A reader of files. The same arguments and files always give the same collection, so the result can be cached."""

    def sources(self) -> list[Path]:
        """Return the files to read, or an empty list if they are unknown, as for data on the Hugging Face hub."""
        ...

    def read(self) -> Collection: ...


@runtime_checkable
class StreamingReader(FileReader, Protocol):
    """A reader that never holds all its data in memory."""

    def stream(self, sink: Sink) -> None:
        """Add all documents to the sink, then each query with its judgements."""
        ...


def describe(reader: FileReader) -> str:
    """Describe a reader by its class and settings, except the quarantine file, for the cache key."""
    settings = {name: value for name, value in vars(reader).items() if name != "quarantine" and name[0] != "_"}
    for name, value in settings.items():
        if isinstance(value, Path) or (name in PATHS and isinstance(value, str)):
            settings[name] = str(Path(value).resolve())
    shown = ", ".join(f"{name}={value!r}" for name, value in sorted(settings.items()))
    return f"{type(reader).__module__}.{type(reader).__qualname__}({shown})"


def stored(reader: FileReader, cache: Path) -> StoredCollection:
    """Return the reader's collection from the cache, after converting it if needed.

    The cache key is the reader's description, and the name, size and times of its files.
    """
    description = describe(reader)
    key = hashlib.blake2b(digest_size=10)
    key.update(repr((VERSION, BATCH_ROWS, description)).encode())
    for source in reader.sources():
        key.update(file_state(source).encode())
    folder = cache / key.hexdigest()
    is_new = make_once(folder, lambda new: _convert(reader, new, description))
    collection = StoredCollection(folder)
    if not is_new:
        for warning in collection.meta["warnings"]:
            log.warning("%s (logged when it was converted into %s)", warning, folder)
    return collection


def _convert(reader: FileReader, folder: Path, description: str) -> None:
    sources = [str(source) for source in reader.sources()]
    shown = [*sources[:2], "..."] if len(sources) > 2 else sources
    log.info("converting %s (once) into %s", ", ".join(shown), folder.parent)
    with _recorded_warnings() as warnings:
        if isinstance(reader, StreamingReader):
            meta = write(reader.stream, folder)
        else:
            meta = write(lambda sink: stream_collection(reader.read(), sink), folder)
    meta |= {"version": VERSION, "reader": description, "warnings": warnings, "sources": sources}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


@contextmanager
def _recorded_warnings() -> Iterator[list[str]]:
    """Record the warnings of a reader, such as skipped lines, to log them again whenever the conversion is used."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    readers = logging.getLogger(__package__)
    readers.addHandler(handler)
    try:
        yield messages
    finally:
        readers.removeHandler(handler)


def write(stream: Callable[[Sink], None], folder: Path) -> dict[str, Any]:
    """Write everything that a reader streams, and return the counts and the fingerprint."""
    sink = _Writer(folder)
    try:
        stream(sink)
    finally:
        sink.close()
    first = _write_query_documents(sink, folder)
    first_query = _first_of_same_text(sink.query_hashes, StoredDocuments(folder / "queries.arrow"))
    splits = {split: _write_split(sink, split, first, first_query, folder) for split in sink.judgements}
    return {
        "missing": list(sink.missing),
        "blank": sink.blank,
        "documents": len(sink.documents),
        "queries": len(sink.queries),
        "splits": splits,
        "fingerprint": sink.digest.hexdigest(),
    }


def _write_query_documents(sink: _Writer, folder: Path) -> np.ndarray:
    """Write first.npy, own.npy and same.npy. Return the array of first.npy."""
    same_id = np.fromiter((sink.documents.get(id, -1) for id in sink.queries), dtype=np.int32, count=len(sink.queries))
    corpus, queries = StoredDocuments(folder / "corpus.arrow"), StoredDocuments(folder / "queries.arrow")
    same_text = np.zeros(len(same_id), dtype=bool)
    for number in np.flatnonzero(same_id >= 0).tolist():
        same_text[number] = _equal_texts(corpus.row(int(same_id[number])), queries.row(number))
    first = _first_of_same_text(sink.document_hashes, corpus)
    same_id[same_id >= 0] = first[same_id[same_id >= 0]]
    for name, values in (("first", first), ("own", same_id), ("same", same_text)):
        np.save(folder / f"{name}.npy", values)
    return first


def _write_split(sink: _Writer, split: str, first: np.ndarray, first_query: np.ndarray, folder: Path) -> int:
    """Write the judgements of a split, and the examples of the train split. Return the number of queries.

    first, first_query: for each document and query, the first one with the same text.
    """
    check_name("split", split)
    queries, documents, grades = sink.distinct(split)
    for name, rows in (("queries", queries), ("documents", documents), ("grades", grades)):
        np.save(folder / f"{split}.{name}.npy", rows)
        sink.digest.update(split.encode() + rows.tobytes())
    if split == "train":
        numbers = np.arange(len(sink.queries), dtype=np.int32)
        known = documents >= 0
        judged = (first_query[queries[known]], first[documents[known]], grades[known])
        table = ExampleTable.from_judgements(*judged, numbers, numbers)
        for name in ("queries", "starts", "documents", "grades"):
            np.save(folder / f"examples.{name}.npy", getattr(table, name))
    return len(np.unique(queries))


def _equal_texts(one: Document, other: Document) -> bool:
    return (one.title, one.text) == (other.title, other.text)


def _first_of_same_text(hashes: array, texts: StoredDocuments) -> np.ndarray:
    """Like examples.first_of_same_text, but only hashes of the texts are in memory."""
    _, firsts, group = np.unique(np.frombuffer(hashes, dtype=np.int64), return_index=True, return_inverse=True)
    first = firsts[group].astype(np.int32)
    for row in np.flatnonzero(first != np.arange(len(first))).tolist():
        if not _equal_texts(texts.row(row), texts.row(int(first[row]))):  # different texts may have equal hashes
            first[row] = row
    return first


class _Writer:
    """A sink that writes documents to Arrow files as they arrive, and collects judgements in arrays of rows.

    documents, queries: row of each id.
    missing: negative row of each judged document that is not in the corpus: -1, -2, ...
    blank: rows of documents and queries with neither title nor text. The rows of queries follow the rows of documents.
    document_hashes, query_hashes: hash of each text, only valid in this process.
    """

    def __init__(self, folder: Path):
        self.documents: dict[str, int] = {}
        self.queries: dict[str, int] = {}
        self.missing: dict[str, int] = {}
        self.blank: list[int] = []
        self.document_hashes, self.query_hashes = array("q"), array("q")
        self.judgements: dict[str, tuple[array, array, array]] = {}
        self.keep: str | None = None
        self.digest = hashlib.blake2b(digest_size=8)
        self._document_file = _ArrowFile(folder / "corpus.arrow", self.digest, "documents")
        self._query_file = _ArrowFile(folder / "queries.arrow", self.digest, "queries")
        self._corpus = StoredDocuments(folder / "corpus.arrow")

    def close(self) -> None:
        self._document_file.close()
        self._query_file.close()

    def add_document(self, document: Document) -> None:
        if document.is_blank:
            self.blank.append(len(self.documents))
        add_id(self.documents, document.id, len(self.documents))
        self._document_file.add(document)
        self.document_hashes.append(hash((document.title, document.text)))

    def add_query(self, query: Document) -> None:
        if query.is_blank:
            self.blank.append(len(self.documents) + len(self.queries))
        add_id(self.queries, query.id, len(self.queries))
        self._query_file.add(query)
        self.query_hashes.append(hash((query.title, query.text)))

    def add_judgement(self, split: str, query: str, document: str, grade: int) -> None:
        if split not in self.judgements:
            self.judgements[split] = (array("i"), array("i"), array("i"))
        queries, documents, grades = self.judgements[split]
        queries.append(self.queries[query])
        row = self.documents.get(document)
        documents.append(self.missing.setdefault(document, -1 - len(self.missing)) if row is None else row)
        grades.append(whole_grade(split, query, document, grade))

    def document(self, id: str) -> Document:
        self._document_file.close()  # no documents come after the first query
        return self._corpus.row(self.documents[id])

    def has(self, split: str) -> bool:
        return split in self.judgements

    def distinct(self, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the queries, documents and grades of a split's judgements, (j,) each, without repeated pairs.

        Raises UserError if a pair has two different grades and `keep` is None.
        """
        queries, documents, grades = (np.frombuffer(values, dtype=np.int32) for values in self.judgements[split])
        pairs = queries.astype(np.int64) << 32 | documents.view(np.uint32)  # rows may be negative
        order = np.argsort(pairs, kind="stable")
        repeated = np.flatnonzero(pairs[order][1:] == pairs[order][:-1])
        differ = repeated[grades[order[repeated]] != grades[order[repeated + 1]]]
        if self.keep == "highest":
            _, first, group = np.unique(pairs, return_index=True, return_inverse=True)
            highest = grades[first]
            np.maximum.at(highest, group, grades)
            grades = highest[group]
        elif len(differ) and self.keep == "first":
            log.warning("split %s: %d pairs have a second, different score; keeping the first", split, len(differ))
        elif len(differ):
            first, second = order[differ[0]], order[differ[0] + 1]
            query, document = (
                next(id for id, row in rows.items() if row == wanted)
                for rows, wanted in ((self.queries, queries[first]), (self.documents | self.missing, documents[first]))
            )
            raise UserError(
                f"split {split}: query {query!r} and document {document!r} have the scores {grades[second]} "
                f"and {grades[first]}; keep one of them ({len(differ)} such pairs)"
            )
        kept = np.ones(len(pairs), dtype=bool)
        kept[order[repeated + 1]] = False
        return queries[kept], documents[kept], grades[kept]


class _ArrowFile:
    """Writes documents to an Arrow file, batch by batch. kind: "documents" or "queries", for the log."""

    def __init__(self, path: Path, digest, kind: str):
        import pyarrow as pa

        self._pa, self._digest, self._kind = pa, digest, kind
        self._progress: ProgressLines | None = None
        self._schema = pa.schema([(name, pa.large_string()) for name in FIELDS])
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)
        self._columns: tuple[list[str], ...] = ([], [], [])

    def add(self, document: Document) -> None:
        self._progress = self._progress or ProgressLines("converting", self._kind)  # starts with the first document
        for column, value in zip(self._columns, (document.id, document.title, document.text), strict=True):
            column.append(value)
        if len(self._columns[0]) == BATCH_ROWS:
            self._flush()
            self._progress.advance(BATCH_ROWS)

    def _flush(self) -> None:
        pa = self._pa
        batch = pa.record_batch([pa.array(column, pa.large_string()) for column in self._columns], schema=self._schema)
        for column in batch.columns:
            for buffer in column.buffers()[1:]:
                self._digest.update(buffer)
        self._writer.write_batch(batch)
        for column in self._columns:
            column.clear()

    def close(self) -> None:
        if self._file.closed:
            return
        if self._columns[0]:
            self._flush()
        self._writer.close()
        self._file.close()
