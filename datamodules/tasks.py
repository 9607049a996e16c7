"""One LightningDataModule per kind of task. Each trains alone, or with others in a MultiTaskDataModule.

The kinds differ in what a query and a document are, and so in which documents may not be negatives and which are left
out of a ranking. What they share is the table of documents and the examples over its rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from datamodules.batches import BatchOptions, ContrastiveDataModule
from datamodules.conversion import FileReader, stored
from datamodules.examples import Joined, in_memory
from datamodules.pools import pool_of
from datamodules.records import (
    Benchmark,
    Collection,
    Document,
    Example,
    MiningPool,
    Task,
    UserError,
    plain_protocol,
)
from datamodules.store import StoredCollection
from datamodules.tokens import Encoding, token_tables


@runtime_checkable
class Reader(Protocol):
    """What every file of datamodules/readers provides: one data format as a Collection."""

    def read(self) -> Collection: ...


class TaskDataModule(ContrastiveDataModule):
    """One task's collections: a table of documents, and examples over its rows.

    documents: of all collections, each one's corpus and then its queries. A row is the identity of a document in
    batches; a query that is a document has that one's.
    """

    queries_are_documents: ClassVar[bool] = False  # a query's own id, among the documents, is the query itself
    corpus_is_evaluated: ClassVar[bool] = True  # to have trained on documents that are only evaluated is a leak

    def __init__(self, task: Task, readers: Mapping[str, Reader], options: BatchOptions | None = None, tokenizer=None):
        super().__init__()
        self.task, self.readers = task, dict(readers)
        self.options, self.tokenizer = options or BatchOptions(), tokenizer
        self.collections: dict[str, Collection | StoredCollection] = {}
        self.documents: Joined[Document] = Joined()
        self.examples: Joined[Example] = Joined()
        self.stripped = np.zeros(0, dtype=np.int64)  # rows of documents that are not trained on
        self.is_stripped = False
        self._tokens: tuple[Encoding, Joined[np.ndarray]] | None = None  # of the last encoding

    @property
    def tasks(self) -> Sequence[TaskDataModule]:
        return (self,)

    def setup(self, stage: str | None = None) -> None:
        """Read and check all collections, once.

        Raises UserError if no query of the train splits has a positive.
        """
        if self.collections:
            return
        self.collections = {name: self._read(name) for name in self.readers}
        for name, collection in self.collections.items():
            with self._naming(name):
                self._add(collection)
        if not self.examples:
            names = ", ".join(f"{name} ({' '.join(c.splits)})" for name, c in self.collections.items())
            raise UserError(
                f"task {self.task.name}: no query of the train split of {names} has a positive document. What has "
                "dev or test alone is measured beside a collection that is trained on"
            )

    def _read(self, name: str) -> Collection | StoredCollection:
        reader = self.readers[name]
        with self._naming(name):
            if self.options.cache and isinstance(reader, FileReader) and reader.sources():
                return stored(reader, Path(self.options.cache).expanduser())
            return reader.read()

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Errors of a collection with its key."""
        try:
            yield
        except UserError as error:
            raise UserError(f"task.{self.task.name}.data.{name}: {error}") from error

    def _add(self, collection: Collection | StoredCollection) -> None:
        if isinstance(collection, StoredCollection):
            parts, examples = collection.table(self.queries_are_documents)
        else:
            parts, examples = in_memory(collection, self.queries_are_documents)
        self.examples.append(examples, offset=len(self.documents))
        for part in parts:
            self.documents.append(part)

    def tokens(self, encoding: Encoding) -> Joined[np.ndarray]:
        """The ids of all its documents' texts."""
        if self._tokens is None or self._tokens[0] != encoding:
            found: Joined[np.ndarray] = Joined()
            for collection in self.collections.values():
                for table in token_tables(collection, encoding):
                    found.append(table)
            self._tokens = encoding, found
        return self._tokens[1]

    def examples_fingerprint(self) -> str:
        """Of the queries and documents that are trained on, and of the documents that must not be."""
        digest = hashlib.blake2b(self.stripped.tobytes(), digest_size=8)
        for table, _ in self.examples.parts:
            for array in (table.queries, table.starts, table.documents, table.grades):
                digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def collection_of(self, row: int) -> str:
        """The name of the collection that a row of the table is of."""
        for name, collection in self.collections.items():
            row -= len(collection.corpus) + len(collection.queries)
            if row < 0:
                return name
        raise IndexError("no such row")

    def examples_by_collection(self) -> dict[str, int]:
        """Collection -> number of its examples; those without any are left out."""
        counts = zip(self.collections, self.examples.parts, strict=True)
        return {name: len(table) for name, (table, _) in counts if len(table)}

    def strip(self, queries: np.ndarray, documents: np.ndarray) -> None:
        """Train without some queries, and without some documents, by rows of the table.

        Raises UserError if nothing is left.
        """
        if not len(queries) and not len(documents):
            return
        self.examples, self.is_stripped = self.examples.without(queries, documents), True
        self.stripped = np.union1d(self.stripped, documents)
        if not self.examples:
            raise UserError(f"task {self.task.name}: without what is in the evaluation no example is left to train on")

    def corpus_rows(self) -> np.ndarray:
        """(documents,) bool, true where a row is of a corpus."""
        found = np.zeros(len(self.documents), dtype=bool)
        start = 0
        for collection in self.collections.values():
            found[start : start + len(collection.corpus)] = True
            start += len(collection.corpus) + len(collection.queries)
        return found

    def own_pools(self) -> list[MiningPool]:
        found, first_example = [], 0
        for (name, collection), (table, row) in zip(self.collections.items(), self.examples.parts, strict=True):
            if len(table):
                pool = pool_of(self.task.name, name, collection, table, self.documents, row, first_example)
                found.append(dataclasses.replace(pool, excluded=self.stripped - row))
            first_example += len(table)
        return found

    def own_benchmarks(self, split: str) -> list[Benchmark]:
        return [
            Benchmark(
                name=name,
                task=self.task.name,
                split=split,
                corpus=collection.corpus,
                queries=judged[0],
                qrels=judged[1],
                exclude_query=self.queries_are_documents,
                protocol=plain_protocol(name, split, self.queries_are_documents),
            )
            for name, collection in self.collections.items()
            if collection.splits.get(split)
            for judged in [collection.judged(split)]
        ]


class ClassificationDataModule(TaskDataModule):
    """Paper -> label. The corpus is the label space; a paper's other labels are never its negatives."""

    corpus_is_evaluated = False  # labels are known to all


class LinkPredictionDataModule(TaskDataModule):
    """Paper -> paper that it cites. A paper is neither its own negative nor in its own ranking."""

    queries_are_documents = True


class SearchDataModule(TaskDataModule):
    """Query -> paper, with graded relevance; grade 0 in the train split was shown and not clicked."""


KINDS: dict[str, type[TaskDataModule]] = {
    "classification": ClassificationDataModule,
    "link_prediction": LinkPredictionDataModule,
    "search": SearchDataModule,
}
