"""BEIR layout: corpus.jsonl, queries.jsonl and qrels/<split>.tsv, each plain, .gz or .zst."""

from __future__ import annotations

import functools
import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from datamodules.readers.checks import SPLITS, check_grade
from datamodules.readers.collecting import FolderReader, Judgements, SinkReader, stream_collection
from datamodules.readers.io import check_folder, find_split_files, read_lines, warn_of_unread_files
from datamodules.readers.json_files import as_object
from datamodules.readers.rows import BadLines, Record
from datamodules.records import Collection, Document, Qrels, Sink, UserError, check_name, short

TAB_OR_BREAK = re.compile(r"[\t\n\r]")
NUMBER = r"[+-]?[0-9.]+"


@dataclass
class BeirReader(FolderReader, SinkReader):
    """Reader of a folder in BEIR layout.

        folder/corpus.jsonl    {"_id": ..., "title": ..., "text": ...} per line
        folder/queries.jsonl   the same; the title is optional
        folder/qrels/SPLIT.tsv a header, then query-id <tab> corpus-id <tab> score (an integer; above 0 is relevant)

    Every file may be compressed as .gz or .zst. "abstract" is read if "text" is missing or blank. The dev split may
    also be named validation, valid or val; a warning names other files in qrels/.
    """

    def sources(self) -> list[Path]:
        check_folder(self.root, "corpus.jsonl, queries.jsonl and qrels/")
        files = [self.find("corpus.jsonl"), self.find("queries.jsonl")]
        if not (splits := find_split_files(self.root, "qrels/SPLIT.tsv")):
            names = ", ".join(f"{split}.tsv" for split in SPLITS)
            raise UserError(f"{self.root / 'qrels'}: contains none of {names} (plain, .gz or .zst)")
        return [*files, *splits.values()]

    def write(self, sink: Sink, bad: BadLines) -> None:
        corpus, queries, *_ = self.sources()
        for path, add in ((corpus, sink.add_document), (queries, sink.add_query)):
            is_empty = True
            for row in read_lines(path, bad):
                with row:
                    add(_document(as_object(row, " with _id, title and text"), may_be_blank=path == corpus))
                    is_empty = False
            if is_empty:
                raise UserError(f"{path}: contains no {'documents' if path == corpus else 'queries'}")
        splits = find_split_files(self.root, "qrels/SPLIT.tsv")
        warn_of_unread_files(self.root / "qrels", "*.tsv*", splits.values())
        for split, path in splits.items():
            target = functools.partial(sink.add_judgement, split)
            read_qrels(Judgements(path, sink.queries, sink.documents, bad, "queries.jsonl", target))
            if not sink.has(split):
                raise UserError(f"{path}: the split is empty (no judgements below the header)")


def _document(record: Record, may_be_blank: bool) -> Document:
    if not (id := record.text("_id", required=True)):  # unlike in other formats, an id is never an integer
        raise UserError("_id is empty")
    return record.document(body="text", id=id, may_be_blank=may_be_blank)


def read_qrels(judgements: Judgements) -> Qrels:
    """Add the judgements of a qrels file, and return all judgements. A first line without a number is a header."""
    for index, row in enumerate(read_lines(judgements.path, judgements.bad)):
        columns = row.text.split("\t")
        if (
            index == 0
            and not re.fullmatch(NUMBER, columns[-1].strip())
            and columns[0].strip() not in judgements.queries
        ):
            continue
        with row:
            if len(columns) != 3:
                raise UserError(f"expected query-id, corpus-id and score, separated by tabs, got {short(row.text)}")
            query, document, score = (column.strip() for column in columns)
            judgements.add(query, document, check_grade(score))
    return judgements.finish()


def write_beir(collection: Collection, folder: Path | str, compress: bool = False) -> None:
    """Write a collection in BEIR layout. compress: whether to gzip corpus and queries."""
    with BeirWriter(Path(folder), compress) as writer:
        stream_collection(collection, writer)


class BeirWriter:
    """A sink that writes a folder in BEIR layout, used as `with BeirWriter(folder) as sink:`.

    compress: whether to gzip corpus and queries.
    """

    def __init__(self, folder: Path, compress: bool = False):
        self.folder = folder
        (folder / "qrels").mkdir(parents=True, exist_ok=True)
        self._texts = {name: _open_for_writing(folder / f"{name}.jsonl", compress) for name in ("corpus", "queries")}
        self._qrels: dict[str, TextIO] = {}

    def add_document(self, document: Document) -> None:
        self._write("corpus", document)

    def add_query(self, query: Document) -> None:
        self._write("queries", query)

    def add_judgement(self, split: str, query: str, document: str, grade: int) -> None:
        if split not in self._qrels:
            check_name("split", split)
            self._qrels[split] = _open_for_writing(self.folder / "qrels" / f"{split}.tsv", compress=False)
            self._qrels[split].write("query-id\tcorpus-id\tscore\n")
        _check_id(document)  # the document may be missing from the corpus
        self._qrels[split].write(f"{query}\t{document}\t{grade}\n")

    def _write(self, name: str, document: Document) -> None:
        _check_id(document.id)
        record = {"_id": document.id, "title": document.title, "text": document.text}
        self._texts[name].write(json.dumps(record, ensure_ascii=False) + "\n")

    def __enter__(self) -> BeirWriter:
        return self

    def __exit__(self, *error: object) -> None:
        for file in (*self._texts.values(), *self._qrels.values()):
            file.close()


def _check_id(id: str) -> None:
    if id != id.strip() or TAB_OR_BREAK.search(id):
        raise UserError(f"id {id!r}: qrels/*.tsv cannot have tabs, line breaks, or spaces around an id")


def _open_for_writing(path: Path, compress: bool) -> TextIO:
    if compress:
        return gzip.open(f"{path}.gz", "wt", compresslevel=3, encoding="utf-8")
    return open(path, "w", encoding="utf-8")
