"""What a reader gives, on its way into the files of store.py."""

from __future__ import annotations

import hashlib
import logging
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.examples import ExampleTable, whole_grade
from datamodules.records import Document, Sink, UserError
from datamodules.store import FIELDS, ROWS, StoredDocuments

log = logging.getLogger(__name__)


def write(stream: Callable[[Sink], None], folder: Path) -> dict[str, Any]:
    """Write all that a stream gives. Returns counts and a fingerprint."""
    sink = _Writer(folder)
    with sink:
        stream(sink)
    corpus, queries = sink.documents, sink.queries
    own = np.fromiter((corpus.get(name, -1) for name in queries), dtype=np.int32, count=len(queries))
    texts, questions = StoredDocuments(folder / "corpus.arrow"), StoredDocuments(folder / "queries.arrow")
    same = np.zeros(len(queries), dtype=bool)
    for number in np.flatnonzero(own >= 0).tolist():
        a, b = texts.row(int(own[number])), questions.row(number)
        same[number] = (a.title, a.text) == (b.title, b.text)
    first = _first_of_same_text(sink.hashes, texts)
    own[own >= 0] = first[own[own >= 0]]
    np.save(folder / "first.npy", first)
    np.save(folder / "own.npy", own)
    np.save(folder / "same.npy", same)
    splits = {}
    for split in sink.judgements:
        arrays = sink.distinct(split)
        for name, rows in zip(("queries", "documents", "grades"), arrays, strict=True):
            np.save(folder / f"{split}.{name}.npy", rows)
            sink.digest.update(split.encode() + rows.tobytes())
        splits[split] = len(np.unique(arrays[0]))
        if split == "train":
            numbers = np.arange(len(queries), dtype=np.int32)
            judging, judged, grades = arrays
            table = ExampleTable.of_judgements(judging, first[judged], grades, numbers, numbers)
            for name in ("queries", "starts", "documents", "grades"):
                np.save(folder / f"examples.{name}.npy", getattr(table, name))
    return {
        "documents": len(corpus),
        "queries": len(queries),
        "splits": splits,
        "fingerprint": sink.digest.hexdigest(),
    }


def _first_of_same_text(hashes: array, texts: StoredDocuments) -> np.ndarray:
    """As examples.first_of_same_text, without the texts in memory. hashes: of their texts."""
    _, firsts, group = np.unique(np.frombuffer(hashes, dtype=np.int64), return_index=True, return_inverse=True)
    first = firsts[group].astype(np.int32)
    for row in np.flatnonzero(first != np.arange(len(first))).tolist():
        a, b = texts.row(row), texts.row(int(first[row]))
        if (a.title, a.text) != (b.title, b.text):
            first[row] = row
    return first


class _Writer:
    """The sink: documents go to Arrow files as they come, judgements to arrays of rows.

    documents, queries: id -> row. hashes: of the documents' texts, of this process alone.
    """

    def __init__(self, folder: Path):
        self.documents: dict[str, int] = {}
        self.queries: dict[str, int] = {}
        self.hashes = array("q")
        self.judgements: dict[str, tuple[array, array, array]] = {}
        self.keep_first = False
        self.digest = hashlib.blake2b(digest_size=8)
        self._files = {
            "documents": _ArrowFile(folder / "corpus.arrow", self.digest, "documents"),
            "queries": _ArrowFile(folder / "queries.arrow", self.digest, "queries"),
        }
        self._corpus = StoredDocuments(folder / "corpus.arrow")

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, traceback) -> None:
        for file in self._files.values():
            file.close()

    def add_document(self, document: Document) -> None:
        self._add(self.documents, "documents", document)
        self.hashes.append(hash((document.title, document.text)))

    def add_query(self, query: Document) -> None:
        self._add(self.queries, "queries", query)

    def _add(self, places: dict[str, int], what: str, document: Document) -> None:
        if document.id in places:
            raise UserError(f"the id {document.id!r} stands on an earlier line too")
        places[document.id] = len(places)
        self._files[what].add(document)

    def add_judgement(self, split: str, query: str, document: str, grade: int) -> None:
        if split not in self.judgements:
            self.judgements[split] = (array("i"), array("i"), array("i"))
        queries, documents, grades = self.judgements[split]
        queries.append(self.queries[query])
        documents.append(self.documents[document])
        grades.append(whole_grade(split, query, document, grade))

    def document(self, id: str) -> Document:
        self._files["documents"].close()  # no document comes after the first query
        return self._corpus.row(self.documents[id])

    def has(self, split: str) -> bool:
        return split in self.judgements

    def distinct(self, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A split's judgements by rows, (j,) each, in their order; a pair that comes again is left out.

        Raises UserError if it comes with another grade, unless keep_first.
        """
        queries, documents, grades = (np.frombuffer(part, dtype=np.int32) for part in self.judgements[split])
        pairs = queries.astype(np.int64) << 32 | documents
        order = np.argsort(pairs, kind="stable")
        again = np.flatnonzero(pairs[order][1:] == pairs[order][:-1])
        differ = again[grades[order[again]] != grades[order[again + 1]]]
        if len(differ) and self.keep_first:
            log.warning("%d judgements of split %s with another score than the same pair before", len(differ), split)
        elif len(differ):
            first, second = order[differ[0]], order[differ[0] + 1]
            names = [
                next(name for name, row in places.items() if row == wanted)
                for places, wanted in ((self.queries, queries[first]), (self.documents, documents[first]))
            ]
            raise UserError(
                f"split {split}: query {names[0]!r} and document {names[1]!r} have score {grades[second]} and "
                f"{grades[first]} ({len(differ)} such pairs)"
            )
        kept = np.ones(len(pairs), dtype=bool)
        kept[order[again + 1]] = False
        return queries[kept], documents[kept], grades[kept]


class _ArrowFile:
    """Documents on their way into an Arrow file, batch by batch."""

    def __init__(self, path: Path, digest, what: str):
        import pyarrow as pa

        self._pa, self._digest, self._what = pa, digest, what
        self._schema = pa.schema([(name, pa.large_string()) for name in FIELDS])
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)
        self._columns: tuple[list[str], ...] = ([], [], [])
        self._count, self._started = 0, 0.0
        self._told = 0.0
        self._closing = False

    def add(self, document: Document) -> None:
        if not self._count:
            self._started = self._told = time.monotonic()
        self._count += 1
        for column, value in zip(self._columns, (document.id, document.title, document.text), strict=True):
            column.append(value)
        if len(self._columns[0]) == ROWS:
            self._flush()

    def _flush(self) -> None:
        pa = self._pa
        batch = pa.record_batch([pa.array(column, pa.large_string()) for column in self._columns], schema=self._schema)
        for column in batch.columns:
            for buffer in column.buffers()[1:]:
                self._digest.update(buffer)
        self._writer.write_batch(batch)
        for column in self._columns:
            column.clear()
        now = time.monotonic()
        if now - self._told > 10 and not self._closing:
            self._told = now
            rate = self._count / (now - self._started)
            log.info("  %s %s, %s a second", f"{self._count:,}", self._what, f"{rate:,.0f}")

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True  # long after its last document: no rate to tell
        if self._columns[0]:
            self._flush()
        self._writer.close()
        self._file.close()
