"""Base classes of readers, and functions that collect and check documents and judgements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from datamodules.options import check_options, option
from datamodules.readers.checks import first_ids
from datamodules.readers.io import find_file
from datamodules.readers.json_files import as_object
from datamodules.readers.rows import BadLines, Row
from datamodules.records import Collection, CollectionWriter, Document, Qrels, Sink, UserError, check_name

JudgementTarget = Callable[[str, str, int], None]  # receives query id, document id and grade


@dataclass(kw_only=True)
class LineReader(ABC):
    """Base class of readers for files that may have bad lines. The fields of a reader are its arguments."""

    on_error: str = option("fail", "policy for bad lines: fail, or skip them (see BadLines)", choices=BadLines.POLICIES)
    quarantine: str | None = option(None, "file for skipped lines (see BadLines)")

    def __post_init__(self) -> None:
        check_options(self)

    def read(self) -> Collection:
        """Read and check all data. Raises UserError with file, line and reason."""
        with BadLines(self.on_error, self.quarantine) as bad:
            return self.collect(bad)

    @abstractmethod
    def collect(self, bad: BadLines) -> Collection:
        """Read and check all data. bad: policy for bad lines."""


@dataclass
class FolderReader(LineReader):
    """Base class of readers for one folder, whose files may be compressed as .gz or .zst."""

    folder: str

    @property
    def root(self) -> Path:
        """The folder."""
        return Path(self.folder)

    @abstractmethod
    def sources(self) -> list[Path]:
        """Return the files to read."""

    def find(self, *names: str) -> Path:
        """Return the path of the first of the names that exists. Raises UserError if none of them does."""
        return find_file(self.root, *names)


class SinkReader(LineReader):
    """Base class of readers that never hold all their data in memory."""

    keep: ClassVar[str | None] = None  # "highest" if the highest grade of a pair counts, None if it may have only one

    @abstractmethod
    def write(self, sink: Sink, bad: BadLines) -> None:
        """Write the data to a sink. bad: policy for bad lines."""

    def stream(self, sink: Sink) -> None:
        """Write the data to a sink. Raises UserError like `read`."""
        sink.keep = self.keep or ("first" if self.on_error == "skip" else None)
        with BadLines(self.on_error, self.quarantine) as bad:
            self.write(sink, bad)

    def collect(self, bad: BadLines) -> Collection:
        sink = MemorySink(self.keep)
        self.write(sink, bad)
        return Collection(sink.documents, sink.queries, sink.qrels)


def add_id(values: dict[str, Any], id: str, value: Any) -> None:
    """Add a value under an id, which must be unique."""
    if id in values:
        raise UserError(f"duplicate id {id!r}, which an earlier line also has")
    values[id] = value


def add_document(documents: dict[str, Document], document: Document) -> None:
    """Add a document, whose id must be unique."""
    add_id(documents, document.id, document)


def add_documents(documents: dict[str, Document], rows: Iterable[Row], *id_keys: str, **keywords: Any) -> None:
    """Add the document of each row. id_keys, keywords: arguments of Record.document."""
    for row in rows:
        with row:
            add_document(documents, as_object(row).document(*id_keys, **keywords))


def add_repeated(documents: dict[str, Document], new: Sequence[Document]) -> None:
    """Add all documents of a line, or none if one conflicts. Lines may repeat a document."""
    added: dict[str, Document] = {}
    for document in new:
        earlier = documents.get(document.id) or added.setdefault(document.id, document)
        if earlier != document:
            raise UserError(f"document {document.id!r} has a different text on an earlier line")
    documents.update(added)


def add_grades(qrels: dict[str, dict[str, int]], query: str, grades: Mapping[str, int]) -> None:
    """Add all judgements of a query, or none if one conflicts."""
    merged = dict(qrels.get(query, {}))
    for document, grade in grades.items():
        add_grade(merged, query, document, grade)
    qrels[query] = merged


def add_grade(grades: dict[str, int], query: str, document: str, grade: int) -> None:
    """Add a judgement of a query. Raises UserError if the document already has another grade."""
    if (earlier := grades.setdefault(document, grade)) != grade:
        raise UserError(f"query {query!r} and document {document!r} have score {grade} here and {earlier} earlier")


def check_known(id: str, corpus: Container[str]) -> None:
    """Raise UserError if a query, given as the id of a document, is not in the corpus."""
    if id not in corpus:
        raise UserError(f"query: {id!r} is not the id of a document in the corpus")


@dataclass
class Judgements:
    """The judgements of one split, collected line by line from its own file.

    path: the file.
    queries, corpus: known ids. A judged document may be missing from the corpus (see Gaps).
    query_file: name of the file with the queries, for errors.
    target: function that receives the judgements, instead of `qrels`.

    Under "fail", `finish` reports all unknown queries together. Under "skip", each unknown query is a bad line.
    """

    path: Path
    queries: Container[str]
    corpus: Container[str]
    bad: BadLines
    query_file: str
    target: JudgementTarget | None = None
    qrels: dict[str, dict[str, int]] = field(default_factory=dict, init=False)
    unknown: list[str] = field(default_factory=list, init=False)

    def add(self, query: str, document: str, grade: int) -> None:
        if query in self.queries:
            if self.target:
                self.target(query, document, grade)
            else:
                add_grade(self.qrels.setdefault(query, {}), query, document, grade)
            self.bad.gaps.add_judgements(self.path, (document,), self.corpus)
        elif self.bad.fails:
            self.unknown.append(query)
        else:
            raise UserError(f"the query id {query!r} is not in {self.query_file}")

    def finish(self) -> Qrels:
        """Return all judgements. Raises UserError if there were unknown queries."""
        if self.unknown:
            distinct = list(dict.fromkeys(self.unknown))
            raise UserError(
                f"{self.path}: these query ids are not in {self.query_file} ({len(self.unknown)} lines, "
                f"{len(distinct)} different ids): {first_ids(distinct)}"
            )
        return self.qrels


class MemorySink:
    """A sink in memory. Unless it keeps the highest, a line with a second, different grade of a pair is an error."""

    def __init__(self, keep: str | None = None) -> None:
        self.keep = keep
        self.documents: dict[str, Document] = {}
        self.queries: dict[str, Document] = {}
        self.qrels: dict[str, dict[str, dict[str, int]]] = {}

    def add_document(self, document: Document) -> None:
        add_document(self.documents, document)

    def add_query(self, query: Document) -> None:
        add_document(self.queries, query)

    def add_judgement(self, split: str, query: str, document: str, grade: int) -> None:
        grades = self.qrels.setdefault(split, {}).setdefault(query, {})
        if self.keep == "highest":
            grades[document] = max(grade, grades.get(document, grade))
        else:
            add_grade(grades, query, document, grade)

    def document(self, id: str) -> Document:
        return self.documents[id]

    def has(self, split: str) -> bool:
        return split in self.qrels


def stream_collection(collection: Collection, sink: CollectionWriter) -> None:
    """Write a collection to a sink."""
    for document in collection.corpus.values():
        sink.add_document(document)
    for query in collection.queries.values():
        sink.add_query(query)
    for split, qrels in collection.qrels.items():
        for query_id, grades in qrels.items():
            for document_id, grade in grades.items():
                sink.add_judgement(split, query_id, document_id, grade)


def check_collection(collection: Collection, source: Path | str) -> Collection:
    """Return a collection after checking that it has documents, and that all splits have judgements."""
    if not collection.corpus:
        raise UserError(f"{source}: contains no documents")
    if not collection.qrels:
        raise UserError(f"{source}: contains no splits")
    for split, qrels in collection.qrels.items():
        check_name(f"{source}: split", split)
        if not qrels:
            raise UserError(f"{source}: the {split} split is empty")
    return collection
