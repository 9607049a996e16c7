"""What a reader streams, as a Collection in memory."""

from __future__ import annotations

from collections.abc import Callable

from datamodules.records import Collection, Document, Sink, UserError


class Gathered:
    """The sink of a collection in memory. Another grade of the same pair is an error at once, so that it has a line."""

    def __init__(self) -> None:
        self.keep_first = False
        self.documents: dict[str, Document] = {}
        self.queries: dict[str, Document] = {}
        self.qrels: dict[str, dict[str, dict[str, int]]] = {}

    def add_document(self, document: Document) -> None:
        _add(self.documents, document)

    def add_query(self, query: Document) -> None:
        _add(self.queries, query)

    def add_judgement(self, split: str, query: str, document: str, grade: int) -> None:
        before = self.qrels.setdefault(split, {}).setdefault(query, {}).setdefault(document, grade)
        if before != grade:
            pair = f"query {query!r} and document {document!r}"
            raise UserError(f"{pair} have score {grade} here and {before} above")

    def document(self, id: str) -> Document:
        return self.documents[id]

    def has(self, split: str) -> bool:
        return split in self.qrels


def _add(documents: dict[str, Document], new: Document) -> None:
    if new.id in documents:
        raise UserError(f"the id {new.id!r} stands on an earlier line too")
    documents[new.id] = new


def gathered(stream: Callable[[Sink], None]) -> Collection:
    """All that a reader's stream gives."""
    sink = Gathered()
    stream(sink)
    return Collection(sink.documents, sink.queries, sink.qrels)


def pour(collection: Collection, sink: Sink) -> None:
    """All of a collection into a sink."""
    for document in collection.corpus.values():
        sink.add_document(document)
    for query in collection.queries.values():
        sink.add_query(query)
    for split, qrels in collection.qrels.items():
        for query, grades in qrels.items():
            for document, grade in grades.items():
                sink.add_judgement(split, query, document, grade)
