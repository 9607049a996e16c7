"""One LightningDataModule per kind of task, to train alone, or together with others in a MultiTaskDataModule.

The kinds differ in their queries and documents, and therefore in the documents that are never negatives, or that
rankings leave out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import numpy as np

from datamodules.batches import BatchOptions, ContrastiveDataModule
from datamodules.conversion import FileReader, stored
from datamodules.examples import ExampleTable, Joined, JoinedExamples, blank_rows, in_memory
from datamodules.files import expanded
from datamodules.ragged import Ragged
from datamodules.records import (
    Benchmark,
    Collection,
    Document,
    MiningPool,
    Reader,
    Task,
    UserError,
    check_name,
    plain_protocol,
)
from datamodules.store import Rows, StoredCollection
from datamodules.tokens import Encoding, token_tables


class CollectionError(UserError):
    """An error in a task's collection. problem: message without the names of task and collection."""

    def __init__(self, task: str, collection: str, problem: str):
        super().__init__(task, collection, problem)
        self.task, self.collection, self.problem = task, collection, problem

    def __str__(self) -> str:
        return f"task {self.task}, collection {self.collection}: {self.problem}"


class Part(NamedTuple):
    """A collection of a task.

    table: examples of the collection.
    first_row: first row of the collection's documents in the task's document table.
    """

    name: str
    collection: Collection | StoredCollection
    table: ExampleTable
    first_row: int

    @property
    def corpus_rows(self) -> np.ndarray:
        """Rows of the corpus in the task's document table, ascending and without gaps."""
        return np.arange(self.first_row, self.first_row + len(self.collection.corpus))


class TaskDataModule(ContrastiveDataModule):
    """The data of one task: its collections, a table of their documents, and examples over the table's rows.

        SearchDataModule("search", BeirReader("data/scifact"), batch_size=16)

    task: the task, or its name.
    data: a reader, a Collection, or several of them by name. A single collection gets the task's name.
    options: options of the batches, which may also be passed as keyword arguments.
    tokenizer: tokenizer of the encoder, by default the trained module's.

    documents: corpus and then queries of each collection. Batches identify a document by its row. A query that is a
        document has the document's row.
    """

    queries_are_documents: ClassVar[bool] = False  # whether a query is the document with the same id
    corpus_is_evaluated: ClassVar[bool] = True  # whether training on evaluation documents is a leak

    def __init__(
        self,
        task: Task | str,
        data: Reader | Collection | Mapping[str, Reader | Collection],
        options: BatchOptions | None = None,
        tokenizer: Any = None,
        **overrides: Any,
    ):
        super().__init__()
        self.task = Task(task) if isinstance(task, str) else task
        self.readers = dict(data) if isinstance(data, Mapping) else {self.task.name: data}
        for name in self.readers:
            check_name("collection", name)
        self._overrides = overrides if options is None else None
        self.options, self.tokenizer = (options or BatchOptions()).override(**overrides), tokenizer
        self.collections: dict[str, Collection | StoredCollection] = {}
        self.documents: Joined[Document] = Joined()
        self.examples = JoinedExamples()
        self.stripped = np.zeros(0, dtype=np.int64)  # rows of documents left out of training
        self.is_stripped = False
        self._tokens: tuple[Encoding, Joined[np.ndarray]] | None = None  # the last encoding and its ids

    def inherit_options(self, options: BatchOptions) -> None:
        """Use shared options with this task's keyword arguments. Does nothing if the task has its own options."""
        if self._overrides is not None:
            self.options = options.override(**self._overrides)

    @property
    def tasks(self) -> Sequence[TaskDataModule]:
        return (self,)

    def setup(self, stage: str | None = None) -> None:
        """Read and check all collections, once.

        Raises UserError if no query of the train splits has a positive.
        """
        if self.collections:
            return
        collections = {name: self._read(name) for name in self.readers}
        self.documents, self.examples = Joined(), JoinedExamples()  # an earlier call may have raised an error
        self.stripped = np.zeros(0, dtype=np.int64)
        for name, collection in collections.items():
            with self._naming(name):
                self._add(collection)
        if not self.examples:
            names = ", ".join(f"{name} ({' '.join(c.splits)})" for name, c in collections.items())
            raise UserError(
                f"task {self.task.name}: in {names}, no query of a train split has a positive; add a collection to "
                f"train on (collections with only dev or test are only evaluated)"
            )
        self.collections = collections

    @property
    def parts(self) -> list[Part]:
        """The collections with their examples, in row order."""
        parts = zip(self.collections.items(), self.examples.parts, strict=True)
        return [Part(*collection, *examples) for collection, examples in parts]

    def _read(self, name: str) -> Collection | StoredCollection:
        reader = self.readers[name]
        if isinstance(reader, Collection):
            return reader
        with self._naming(name):
            if self.options.cache and isinstance(reader, FileReader) and reader.sources():
                return stored(reader, expanded(self.options.cache, "cache"))
            return reader.read()

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Add the names of task and collection to errors."""
        try:
            yield
        except UserError as error:
            raise CollectionError(self.task.name, name, str(error)) from error

    def _add(self, collection: Collection | StoredCollection) -> None:
        if isinstance(collection, StoredCollection):
            documents, examples = collection.table(self.queries_are_documents)
            blank = collection.blank_rows()
        else:
            documents, examples = in_memory(collection, self.queries_are_documents)
            blank = blank_rows(document for part in documents for document in part)
        if len(blank):  # nothing to learn from
            examples = examples.without(blank, blank)
            self.stripped = np.union1d(self.stripped, blank + len(self.documents))
        self.examples.append(examples, offset=len(self.documents))
        for part in documents:
            self.documents.append(part)

    def tokens(self, encoding: Encoding) -> Joined[np.ndarray]:
        """Return the token ids of each row of the document table."""
        if self._tokens is None or self._tokens[0] != encoding:
            tokens: Joined[np.ndarray] = Joined()
            for collection in self.collections.values():
                for table in token_tables(collection, encoding):
                    tokens.append(table)
            self._tokens = encoding, tokens
        return self._tokens[1]

    def examples_fingerprint(self) -> str:
        """Return a hash of the examples and of the documents left out of training."""
        digest = hashlib.blake2b(self.stripped.tobytes(), digest_size=8)
        for table, _ in self.examples.parts:
            for array in (table.queries, table.starts, table.documents, table.grades):
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def collection_of(self, row: int) -> str:
        """Return the name of the collection to which a row of the document table belongs."""
        return next(part.name for part in reversed(self.parts) if part.first_row <= row)

    def examples_by_collection(self) -> dict[str, int]:
        """Return each collection's number of examples, without collections that have none."""
        return {part.name: len(part.table) for part in self.parts if len(part.table)}

    def strip(self, queries: np.ndarray, documents: np.ndarray) -> None:
        """Remove queries and documents from the training, given as rows of the document table.

        Raises UserError if no example remains.
        """
        if not len(queries) and not len(documents):
            return
        self.examples, self.is_stripped = self.examples.without(queries, documents), True
        self.stripped = np.union1d(self.stripped, documents)
        if not self.examples:
            raise UserError(f"task {self.task.name}: no training examples remain after removing the evaluation texts")

    def corpus_rows(self) -> np.ndarray:
        """Return for each row of the document table whether it belongs to a corpus, (documents,) bool."""
        in_corpus = np.zeros(len(self.documents), dtype=bool)
        for part in self.parts:
            in_corpus[part.corpus_rows] = True
        return in_corpus

    def pools(self) -> list[MiningPool]:
        pools, first_example = [], 0
        for part in self.parts:
            if len(part.table):
                pools.append(self._pool(part, first_example))
            first_example += len(part.table)
        return pools

    def _pool(self, part: Part, first_example: int) -> MiningPool:
        name, collection, table, first_row = part
        queries = selected(self.documents, np.asarray(table.queries, dtype=np.int64) + first_row)
        positives = table.judged(np.asarray(table.grades) > 0)
        return MiningPool(
            task=self.task.name,
            name=name,
            corpus=selected(self.documents, part.corpus_rows),
            queries=queries,
            first_row=first_row,
            first_example=first_example,
            document_of_query=np.asarray(table.document_of_query),
            positives=positives,
            held_out_positives=_held_out_positives(collection, queries, positives),
            judged_negatives=table.judged(np.asarray(table.grades) == 0),
            excluded=self.stripped - first_row,
        )

    def benchmarks(self, split: str) -> list[Benchmark]:
        benchmarks = []
        for name, collection in self.collections.items():
            if collection.splits.get(split):
                queries, qrels = collection.judged(split)
                benchmarks.append(
                    Benchmark(
                        name=name,
                        task=self.task.name,
                        split=split,
                        corpus=collection.corpus,
                        queries=queries,
                        qrels=qrels,
                        exclude_query=self.queries_are_documents,
                        protocol=plain_protocol(name, split, self.queries_are_documents),
                    )
                )
        return benchmarks


class Selection(Sequence[Document]):
    """Documents of a sequence, selected by row."""

    def __init__(self, documents: Sequence[Document], rows: np.ndarray):
        self.documents, self.rows = documents, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.documents[row] for row in self.rows[index].tolist()]
        return self.documents[int(self.rows[index])]


def selected(documents: Joined[Document], rows: np.ndarray) -> Sequence[Document]:
    """Return the documents of some rows. If one stored file has all of them, return Rows, with stored token ids."""
    part, positions = documents.part_of(rows)
    return part.select(positions) if isinstance(part, Rows) else Selection(documents, rows)


def _held_out_positives(
    collection: Collection | StoredCollection, queries: Sequence[Document], positives: Ragged
) -> Ragged:
    """Return, for each training query, the corpus rows that are only relevant in splits other than train."""
    relevant: dict[str, set[str]] = {}
    for split in collection.splits:
        if split != "train":
            for query, grades in collection.judged(split)[1].items():
                relevant.setdefault(query, set()).update(d for d, grade in grades.items() if grade > 0)
    if not relevant:
        return Ragged.empty(len(queries))
    ids = set().union(*relevant.values())
    row_of = {id: row for row, id in enumerate(collection.corpus) if id in ids}
    starts, known = positives
    return Ragged.of(
        sorted(
            {row_of[d] for d in relevant.get(query.id, ()) if d in row_of}
            - set(known[starts[i] : starts[i + 1]].tolist())
        )
        for i, query in enumerate(queries)
    )


class ClassificationDataModule(TaskDataModule):
    """Rank labels for a paper. The corpus is the label space. A paper's other labels are never its negatives."""

    corpus_is_evaluated = False  # labels may be seen in training


class LinkPredictionDataModule(TaskDataModule):
    """Find the papers that a paper cites. A paper is never its own negative and never in its own ranking."""

    queries_are_documents = True


class SearchDataModule(TaskDataModule):
    """Rank papers for a query, by graded relevance. In the train split, grade 0 means shown but not clicked."""


KINDS: dict[str, type[TaskDataModule]] = {
    "classification": ClassificationDataModule,
    "link_prediction": LinkPredictionDataModule,
    "search": SearchDataModule,
}
