"""Our own JSON lines layout for pairs of queries and documents: corpus.jsonl, train.jsonl, dev.jsonl and test.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from datamodules.options import option
from datamodules.readers.checks import SPLITS, check_grade, check_text, content_id, split_of
from datamodules.readers.collecting import FolderReader, SinkReader, check_known
from datamodules.readers.io import find_split_files, warn_of_unread_files
from datamodules.readers.json_files import as_object, read_records
from datamodules.readers.rows import BadLines, Record, Row
from datamodules.records import Document, Sink, UserError


@dataclass
class JsonlReader(FolderReader, SinkReader):
    """Reader of a folder with a corpus, and one file per split with queries and their documents.

        folder/corpus.jsonl  {"id" or "_id": ..., "title": ..., "text": ...} per line; title or text may be missing
        folder/train.jsonl   {"query": ..., "positives": [id, ...], "negatives": [id, ...]} per line, without negatives
                             if there are none
        folder/dev.jsonl     the same
        folder/test.jsonl    the same; at least one of the three files must exist

    "abstract" is read if "text" is missing or blank. The dev split may also be named validation, valid or val.

    A query is {"id": ...}, a document of the corpus; {"title": ..., "text": ...}; or a string, which is an id if the
    corpus has it, and otherwise a text. Positives may be {id: grade, ...} with grades above 0. Negatives have grade 0,
    and are hard negatives in the train split. The lines of a split with the same query are joined, and the highest
    grade of a document counts.

    Every file may be compressed as .gz or .zst, and may be one JSON list instead of JSON lines.
    """

    keep: ClassVar[str] = "highest"

    train_until: int | None = option(
        None,
        "last year of training. If set, the lines of all files are split by the year of their query, which must be a "
        'corpus document with a "year". Later queries form the test split. Of the others, dev_percent form the dev '
        "split, chosen by a hash of their ids",
    )
    dev_percent: int = option(5, "percentage of queries in the dev split, used with train_until", minimum=0, maximum=99)

    def sources(self) -> list[Path]:
        return [self._corpus_file(), *self._split_files().values()]

    def _corpus_file(self) -> Path:
        return self.find("corpus.jsonl", "corpus.json")

    def _split_files(self) -> dict[str, Path]:
        if not (files := find_split_files(self.root, "SPLIT.jsonl", "SPLIT.json")):
            raise UserError(
                f"{self.folder}: contains none of train.jsonl, dev.jsonl (or validation, valid, val) and test.jsonl"
            )
        return files

    def write(self, sink: Sink, bad: BadLines) -> None:
        years = self._write_corpus(sink, bad)
        splits, ids = self._split_files(), dict[str, str]()
        warn_of_unread_files(self.root, "*.json*", [self._corpus_file(), *splits.values()])
        for split, path in splits.items():
            for row in read_records(path, bad):
                with row:
                    self._add_example(row, split, sink, years, ids)
            if self.train_until is None and not sink.has(split):
                raise UserError(f"{path}: the {split} split is empty")
        if not any(sink.has(split) for split in SPLITS):
            raise UserError(f"{self.folder}: contains no queries")

    def _write_corpus(self, sink: Sink, bad: BadLines) -> dict[str, int]:
        """Write the corpus to a sink, and return the years of its documents if train_until is set."""
        years: dict[str, int] = {}
        for row in read_records(self._corpus_file(), bad):
            with row:
                record = as_object(row)
                document = record.document("id", "_id", body="text", may_be_blank=True)
                year = None if self.train_until is None else record.get("year")
                if year is not None:
                    years[document.id] = check_grade(year, "year")
                sink.add_document(document)
        if not sink.documents:
            raise UserError(f"{self._corpus_file()}: contains no documents")
        return years

    def _add_example(self, row: Row, split: str, sink: Sink, years: Mapping[str, int], ids: dict[str, str]) -> None:
        """Write the query and judgements of a line. ids: ids of queries that are texts, by split and content_id."""
        query, grades = _read_example(row, split, sink)
        if query.id not in sink.documents:
            first = ids.setdefault(f"{split}.{content_id(query.title, query.text)}", query.id)
            query = replace(query, id=first)
        if self.train_until is not None:
            if query.id not in years:
                raise UserError(f"train_until: query {query.id!r} must be a corpus document with a year")
            split = split_of(query.id, self.dev_percent, 0, years[query.id], self.train_until)
        if query.id not in sink.queries:
            sink.add_query(query)
        for document, grade in grades.items():
            sink.add_judgement(split, query.id, document, grade)


def _read_example(row: Row, split: str, sink: Sink) -> tuple[Document, dict[str, int]]:
    """Return the query of a line, and the grade of each of its documents."""
    record = as_object(row, " with query, positives and negatives")
    if isinstance(record.get("positives"), dict):
        positives = record.grades("positives")
    else:
        positives = dict.fromkeys(record.ids("positives", required=True), 1)
    if not positives:
        raise UserError("positives is empty")
    grades = judgements(positives, record.ids("negatives"))
    query = _read_query(record, f"{split}.{row.ordinal}", sink)
    if query.id in sink.documents and sink.document(query.id) != query:
        raise UserError(
            f"the query gets the id {query.id!r} from its line number, but a document has that id; rename the document"
        )
    if query.id in grades:
        raise UserError(f"the query {query.id!r} is one of its own positives or negatives")
    record.judged(list(grades), sink.documents)
    return query, grades


def judgements(positives: Mapping[str, int], negatives: Sequence[str]) -> dict[str, int]:
    """Return the grade of each document of a query.

    Raises UserError if the grade of a positive is not above 0, or if a document is both a positive and a negative.
    """
    if any(grade <= 0 for grade in positives.values()):
        raise UserError(f"positives: grades must be above 0, got {positives}")
    if both := [id for id in negatives if id in positives]:
        raise UserError(f"{both[0]!r} is both a positive and a negative")
    return {**positives, **dict.fromkeys(negatives, 0)}


def _read_query(record: Record, new_id: str, sink: Sink) -> Document:
    """Return the query of a record. new_id: id of a query that is not a document."""
    query = record.get("query")
    if isinstance(query, dict) and "id" not in query:
        return Record.of(record.row, query).document(body="text", id=new_id)
    if isinstance(query, str) and query not in sink.documents:
        if not query.strip():
            raise UserError("query is empty")
        return Document(new_id, "", check_text(query, "query"))
    id = Record(query).id("id") if isinstance(query, dict) else record.id("query")
    check_known(id, sink.documents)
    return sink.document(id)
