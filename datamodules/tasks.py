"""One LightningDataModule per kind of task. Each trains alone, or with others in a MultiTaskDataModule.

The kinds differ in what a query and a document are, and so in which documents may not be negatives and which are left
out of a ranking. What they share is the table of documents and the examples over its rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import lightning as L
import numpy as np

from datamodules.collate import Collator
from datamodules.conversion import FileReader, stored
from datamodules.examples import Joined, in_memory
from datamodules.loader import MultiTaskBatches, ResumableLoader
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
from datamodules.rounds import Rounds, negatives_of_data
from datamodules.sampler import Phase, Schedule
from datamodules.store import StoredCollection
from datamodules.tokens import Encoding, TokenTable, token_tables


@runtime_checkable
class Reader(Protocol):
    """What every file of datamodules/readers provides: one data format as a Collection."""

    def read(self) -> Collection: ...


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How batches are made. A task's own batch_size, max_length, num_positives and num_hard_negatives hold for its
    batches.

    batch_size: queries on each rank. batch_tokens: tokens on each rank, instead of batch_size. num_batches: in the
    whole training. max_length: tokens of a text, special tokens included. token_budget: padded tokens of one chunk.
    num_positives, num_hard_negatives: for each query, where it has them. carry_texts: batches hold their texts, for
    encoders that judge them. num_workers: processes that prepare batches. phases: of the schedule. cache: folder of
    converted collections, none for data in memory.
    """

    batch_size: int = 32
    batch_tokens: int = 0
    num_batches: int = 1000
    max_length: int = 256
    token_budget: int = 16384
    num_positives: int = 1
    num_hard_negatives: int = 1
    carry_texts: bool = False
    num_workers: int = 0
    seed: int = 0
    phases: tuple[Phase, ...] = (Phase(0),)
    cache: str = ""


class ContrastiveDataModule(L.LightningDataModule):
    """What tasks and their combination have in common: a loader over the schedule, and benchmarks."""

    options: BatchOptions
    # Needed for batches, and set before them: a random backbone takes its vocabulary from the texts.
    tokenizer: Any
    prompts: Mapping[str, str] = {}  # task -> what precedes its texts
    rounds: Rounds | None = None  # of mined hard negatives

    @property
    @abstractmethod
    def tasks(self) -> Sequence[TaskDataModule]:
        """The single tasks."""

    def schedule(self) -> Schedule:
        sizes = {task.task.name: len(task.examples) for task in self.tasks}
        batch_sizes = {t.task.name: t.options.batch_tokens or t.options.batch_size for t in self.tasks}
        costs = {task.task.name: self._costs(task) for task in self.tasks if task.options.batch_tokens}
        parts = {task.task.name: task.examples_by_collection() for task in self.tasks}
        several = {task: counts for task, counts in parts.items() if len(counts) > 1}
        return Schedule(sizes, batch_sizes, self.options.seed, self.options.phases, costs, several)

    def _encoding(self, task: TaskDataModule) -> Encoding:
        return Encoding(self.tokenizer, self.prompts.get(task.task.name, ""), task.options.max_length)

    def _costs(self, task: TaskDataModule) -> np.ndarray:
        lengths = task.tokens(self._encoding(task)).concatenated(TokenTable.lengths)
        return task.examples.costs(lengths, task.options.num_positives, task.options.num_hard_negatives)

    def train_dataloader(self) -> ResumableLoader:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        schedule = self.schedule()
        signature = {
            "seed": self.options.seed,
            # Of all ranks together: another number of them may go on with the same global batches.
            "batch_size": {task: size * world_size for task, size in schedule.batch_sizes.items()},
            "schedule": repr(schedule.phases),
            "examples": schedule.sizes,
            "data": {name: c.fingerprint() for task in self.tasks for name, c in task.collections.items()},
        }
        several = {task.task.name: parts for task in self.tasks if len(parts := task.examples_by_collection()) > 1}
        if several:
            signature["collections"] = several
        if any(task.is_stripped for task in self.tasks):
            signature["examples that are left"] = {t.task.name: t.examples_fingerprint() for t in self.tasks}
        if schedule.costs:
            signature["tokens"] = {task: int(tokens.sum()) for task, tokens in schedule.costs.items()}
        collators = {task.task.name: self._collator(task) for task in self.tasks}
        batches = MultiTaskBatches(collators, schedule, rank, world_size)
        return ResumableLoader(batches, self.options.num_batches, signature, self.options.num_workers, self.rounds)

    def _collator(self, task: TaskDataModule) -> Collator:
        return Collator(
            task.task.name,
            task.examples,
            task.tokens(self._encoding(task)),
            self.tokenizer.pad_token_id,
            token_budget=self.options.token_budget,
            num_positives=task.options.num_positives,
            num_hard_negatives=task.options.num_hard_negatives,
            texts=task.documents if self.options.carry_texts else None,
            seed=self.options.seed,
            negatives_of=self.rounds.of(task.task.name) if self.rounds else negatives_of_data,
        )

    def fingerprints(self) -> dict[str, dict[str, str]]:
        """Task -> collection -> fingerprint, in the order of their rows, and "examples": of which are trained on."""
        return {
            task.task.name: {name: collection.fingerprint() for name, collection in task.collections.items()}
            | {"examples": task.examples_fingerprint()}
            for task in self.tasks
        }

    def pools(self) -> list[MiningPool]:
        """What hard negatives are mined from: every collection with training queries."""
        return [pool for task in self.tasks for pool in task.own_pools()]

    def texts(self) -> Iterator[Document]:
        """Documents and training queries of all tasks."""
        for task in self.tasks:
            for collection in task.collections.values():
                yield from collection.corpus.values()
            corpora = task.corpus_rows()
            yield from (task.documents[row] for row in task.examples.query_rows() if not corpora[row])

    def benchmarks(self, split: str) -> list[Benchmark]:
        """Every collection's queries of a split; collections without that split are left out."""
        return [benchmark for task in self.tasks for benchmark in task.own_benchmarks(split)]


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
        for collection in self.collections.values():
            self._add(collection)
        if not self.examples:
            names = ", ".join(f"{name} ({' '.join(c.splits)})" for name, c in self.collections.items())
            raise UserError(
                f"task {self.task.name}: no query of the train split of {names} has a positive document. What has "
                "dev or test alone is measured beside a collection that is trained on"
            )

    def _read(self, name: str) -> Collection | StoredCollection:
        reader = self.readers[name]
        try:
            if self.options.cache and isinstance(reader, FileReader) and reader.sources():
                return stored(reader, Path(self.options.cache).expanduser())
            return reader.read()
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
