"""Our own layout for pairs of queries and documents: corpus.jsonl, train.jsonl, dev.jsonl and test.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.readers import fields
from datamodules.readers.bad_lines import BadLines, Place
from datamodules.readers.gathered import gathered
from datamodules.readers.json_values import as_object, records
from datamodules.readers.lines import find_file
from datamodules.records import Collection, Document, Sink, UserError


class JsonlReader:
    """A folder with a corpus, and a file of queries with their documents for each split.

    folder/corpus.jsonl   {"id": ..., "title": ..., "text": ...} a line (or "_id"); title or text may be missing
    folder/train.jsonl    {"query": ..., "positives": [id, ...], "negatives": [id, ...]} a line; negatives are optional
    folder/dev.jsonl, folder/test.jsonl   the same

    A query is {"id": ...}, which is a document of the corpus; {"title": ..., "text": ...}; or a string: the document
    with that id if the corpus has it, else a text. Positives may be {id: grade, ...}, grades above 0; negatives are
    judged and not relevant, hard negatives in the train split. At least one split must be there.

    train_until: for citations, a year. The lines of all files are then divided anew: those whose query is a paper of a
    later year are the test split, dev_percent of the others, by a hash of the query's id, are dev, and the rest is
    train. Every query must be a document of the corpus with a "year".

    Every file may end in .gz or .zst, and may be one JSON list instead of JSON lines. on_error, quarantine: see
    BadLines.
    """

    def __init__(
        self,
        folder: str,
        train_until: int | None = None,
        dev_percent: int = 5,
        on_error: str = "fail",
        quarantine: str | None = None,
    ):
        if not 0 <= dev_percent < 100:
            raise UserError(f"dev_percent: got {dev_percent}, allowed are 0 to 99")
        self.folder, self.train_until, self.dev_percent = Path(folder), train_until, dev_percent
        self.on_error, self.quarantine = on_error, quarantine
        BadLines(on_error)

    def read(self) -> Collection:
        """Raises UserError naming the file, the line and what is wrong with it."""
        return gathered(self.stream)

    def sources(self) -> list[Path]:
        """The files that it reads."""
        return [self._corpus(), *self._splits().values()]

    def _corpus(self) -> Path:
        return find_file(self.folder, "corpus.jsonl", "corpus.json")

    def _splits(self) -> dict[str, Path]:
        found = {s: find_file(self.folder, f"{s}.jsonl", f"{s}.json", required=False) for s in fields.SPLITS}
        if not any(found.values()):
            raise UserError(f"{self.folder}: holds none of train.jsonl, dev.jsonl and test.jsonl")
        return {split: path for split, path in found.items() if path}

    def stream(self, sink: Sink) -> None:
        """The whole folder into a sink, without holding it in memory. Raises UserError as read does."""
        sink.keep_first = self.on_error == "skip"
        years: dict[str, int] = {}
        with BadLines(self.on_error, self.quarantine) as bad:
            for place in records(self._corpus(), bad):
                with place:
                    record = as_object(place)
                    document = fields.document(record, ("id", "_id"), body="text")
                    year = None if self.train_until is None else record.get("year")
                    if year is not None:
                        years[document.id] = fields.grade(year, "year")
                    sink.add_document(document)
            if not sink.documents:
                raise UserError(f"{self._corpus()}: holds no document")
            for split, path in self._splits().items():
                for place in records(path, bad):
                    with place:
                        self._add(place, split, sink, years)
                if self.train_until is None and not sink.has(split):
                    raise UserError(f"{path}: the split is empty ({split})")
            if not any(sink.has(split) for split in fields.SPLITS):
                raise UserError(f"{self.folder}: holds no line with a query")

    def _add(self, place: Place, split: str, sink: Sink, years: Mapping[str, int]) -> None:
        query, judged = _example(place, split, sink)
        if self.train_until is not None:
            if query.id not in years:
                raise UserError(f"train_until: the query {query.id!r} is no document of the corpus with a year")
            split = fields.split_of(query.id, self.dev_percent, 0, years[query.id], self.train_until)
        if query.id not in sink.queries:
            sink.add_query(query)
        wrong = []
        for document, grade in judged.items():
            try:
                sink.add_judgement(split, query.id, document, grade)
            except UserError as error:  # of this pair, an earlier grade counts
                wrong.append(error)
        if wrong:
            raise wrong[0]


def _example(place: Place, split: str, sink: Sink) -> tuple[Document, dict[str, int]]:
    """A line's query, and the grades of its documents."""
    record = as_object(place, " with query, positives and negatives")
    if isinstance(record.get("positives"), dict):
        positives = fields.grades(record, "positives")
        if any(grade <= 0 for grade in positives.values()):
            raise UserError(f"positives: grades must be above 0, got {positives}")
    else:
        positives = dict.fromkeys(fields.identifiers(record, "positives", required=True), 1)
    negatives = dict.fromkeys(fields.identifiers(record, "negatives"), 0)
    if not positives:
        raise UserError("positives is empty")
    both = [id for id in negatives if id in positives]
    if both:
        raise UserError(f"{both[0]!r} is among the positives and the negatives")
    fields.all_known(list(positives), sink.documents, "positives")
    fields.all_known(list(negatives), sink.documents, "negatives")
    query = _query(record, f"{split}.{place.ordinal}", sink)
    if query.id in sink.documents and sink.document(query.id) != query:
        raise UserError(f"the query is a text that would be named {query.id!r}, which is a document of the corpus")
    if query.id in positives | negatives:
        raise UserError(f"{query.id!r} is the query itself, and among its positives or negatives")
    return query, positives | negatives


def _query(record: Mapping[str, Any], id: str, sink: Sink) -> Document:
    """id: of a query that is no document."""
    query = record.get("query")
    if isinstance(query, dict) and "id" not in query:
        return fields.document(query, (), body="text", id=id)
    if isinstance(query, str) and query not in sink.documents:
        if not query.strip():
            raise UserError("query is empty")
        return Document(id, "", fields.as_text(query, "query"))
    named = fields.identifier(query, "id") if isinstance(query, dict) else fields.identifier(record, "query")
    fields.all_known([named], sink.documents, "query")
    return sink.document(named)
