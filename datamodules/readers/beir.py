"""BEIR layout: corpus.jsonl, queries.jsonl and qrels/<split>.tsv, each plain, .gz or .zst."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from datamodules.readers import fields
from datamodules.readers.bad_lines import BadLines
from datamodules.readers.gathered import gathered
from datamodules.readers.json_values import as_object
from datamodules.readers.lines import find_file, lines
from datamodules.records import Collection, Document, Qrels, Sink, UserError


class BeirReader:
    """A folder in BEIR layout.

    folder/corpus.jsonl    {"_id": ..., "title": ..., "text": ...} a line
    folder/queries.jsonl   the same, title optional
    folder/qrels/SPLIT.tsv a header, then query-id <tab> corpus-id <tab> score (an integer, above 0 is relevant)

    Every file may end in .gz or .zst. on_error, quarantine: see BadLines.
    """

    SPLITS = fields.SPLITS

    def __init__(self, folder: str, on_error: str = "fail", quarantine: str | None = None):
        self.folder = Path(folder)
        self.on_error, self.quarantine = on_error, quarantine
        BadLines(on_error)

    def read(self) -> Collection:
        """Read and check the whole folder.

        Raises UserError naming the file, the line and what is wrong with it.
        """
        return gathered(self.stream)

    def sources(self) -> list[Path]:
        """The files that it reads."""
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder (expected corpus.jsonl, queries.jsonl and qrels/ in it)")
        files = [find_file(self.folder, "corpus.jsonl"), find_file(self.folder, "queries.jsonl")]
        splits = [find_file(self.folder, f"qrels/{split}.tsv", required=False) for split in self.SPLITS]
        if not any(splits):
            allowed = ", ".join(f"{split}.tsv" for split in self.SPLITS)
            raise UserError(f"{self.folder / 'qrels'}: holds none of {allowed} (plain, .gz or .zst)")
        return [*files, *(path for path in splits if path)]

    def stream(self, sink: Sink) -> None:
        """The whole folder into a sink, without holding it in memory. Raises UserError as read does."""
        self.sources()
        sink.keep_first = self.on_error == "skip"
        with BadLines(self.on_error, self.quarantine) as bad:
            for name, add in (("corpus.jsonl", sink.add_document), ("queries.jsonl", sink.add_query)):
                path, empty = find_file(self.folder, name), True
                for place in lines(path, bad):
                    with place:
                        add(document(as_object(place, " with _id, title and text")))
                        empty = False
                if empty:
                    raise UserError(f"{path}: holds no document")
            for split in self.SPLITS:
                path = find_file(self.folder, f"qrels/{split}.tsv", required=False)
                if path is not None:
                    put = functools.partial(sink.add_judgement, split)
                    homes = ("queries.jsonl", "corpus.jsonl")
                    judgements(path, fields.Judgements(sink.queries, sink.documents, bad, *homes, put=put))
                    if not sink.has(split):
                        raise UserError(f"{path}: the split is empty (no judgement below the header)")


def document(record: Mapping) -> Document:
    id, title, text = (fields.text(record, key) for key in ("_id", "title", "text"))
    if not id:
        raise UserError(f"_id is missing or empty (keys here: {', '.join(map(str, record)) or 'none'})")
    if not (title.strip() or text.strip()):
        raise UserError(f"document {id!r} has neither title nor text")
    return Document(id, title, text)


def judgements(path: Path, found: fields.Judgements) -> Qrels:
    """The judgements of a qrels file."""
    for order, place in enumerate(lines(path, found.bad)):
        columns = place.text.split("\t")
        if order == 0 and columns[-1].strip() == "score":
            continue
        with place:
            if len(columns) != 3:
                raise UserError(f"expected query-id, corpus-id and score between tabs, got {place.text[:60]!r}")
            query, document, score = (column.strip() for column in columns)
            found.add(query, document, fields.grade(score))
    return found.finished(path)


def write_beir(collection: Collection, folder: Path | str, compress: bool = False) -> None:
    """Write a collection as a folder that BeirReader reads. compress: its texts, with gzip."""
    folder = Path(folder)
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, texts in (("corpus", collection.corpus), ("queries", collection.queries)):
        with _written(folder / f"{name}.jsonl", compress) as file:
            for one in texts.values():
                record = {"_id": one.id, "title": one.title, "text": one.text}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    for split, qrels in collection.qrels.items():
        with open(folder / "qrels" / f"{split}.tsv", "w", encoding="utf-8") as file:
            file.write("query-id\tcorpus-id\tscore\n")
            for query, grades in qrels.items():
                file.writelines(f"{query}\t{document}\t{grade}\n" for document, grade in grades.items())


def _written(path: Path, compress: bool) -> TextIO:
    if compress:
        return gzip.open(f"{path}.gz", "wt", compresslevel=3, encoding="utf-8")
    return open(path, "w", encoding="utf-8")
