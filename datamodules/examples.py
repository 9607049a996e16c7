"""The examples of a task as integer arrays: no Python object stands for an example until it is drawn.

Rows are those of the task's document table: all corpora and queries of its collections, one after the other.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, overload

import numpy as np

from datamodules.records import Collection, Document, Example, UserError

log = logging.getLogger(__name__)

Item = TypeVar("Item")


class ExampleTable(Sequence[Example]):
    """Examples of one collection, whose rows begin at 0.

    queries  (n,) int32    row of each query
    own      (n,) int32    row of the document that the query itself is, -1 if it is none
    starts   (n + 1,) int64, documents (j,) int32, grades (j,) int32: the judgements of example i are those from
             starts[i] to starts[i + 1]; above 0 is positive, 0 a hard negative

    Arrays may be memory-mapped.
    """

    def __init__(
        self, queries: np.ndarray, own: np.ndarray, starts: np.ndarray, documents: np.ndarray, grades: np.ndarray
    ):
        self.queries, self.own, self.starts, self.documents, self.grades = queries, own, starts, documents, grades

    def __len__(self) -> int:
        return len(self.queries)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.example(i) for i in range(*index.indices(len(self)))]
        return self.example(range(len(self))[index])

    def example(self, index: int, offset: int = 0) -> Example:
        """An example whose rows begin at offset."""
        part = slice(int(self.starts[index]), int(self.starts[index + 1]))
        grades = self.grades[part].tolist()
        rows = [row + offset for row in self.documents[part].tolist()]
        positives = tuple(row for row, grade in zip(rows, grades, strict=True) if grade > 0)
        own = int(self.own[index])
        return Example(
            query=int(self.queries[index]) + offset,
            positives=positives,
            grades=tuple(grade for grade in grades if grade > 0),
            hard_negatives=tuple(row for row, grade in zip(rows, grades, strict=True) if grade == 0),
            not_negatives=positives + (() if own < 0 else (own + offset,)),
        )

    def costs(self, lengths: np.ndarray, num_positives: int, num_hard_negatives: int) -> np.ndarray:
        """See Joined.costs. lengths: of the tokens of this collection's rows."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        of_judged, positive = lengths[self.documents], np.asarray(self.grades) > 0
        found = lengths[self.queries].astype(np.float64)
        for chosen, wanted in ((positive, num_positives), (~positive, num_hard_negatives)):
            total = np.add.reduceat(of_judged * chosen, self.starts[:-1])
            count = np.add.reduceat(chosen.astype(np.int64), self.starts[:-1])
            found += total / np.maximum(count, 1) * np.minimum(count, wanted)
        return np.ceil(found).astype(np.int64)

    def without(self, queries: np.ndarray, documents: np.ndarray) -> ExampleTable:
        """The examples of other queries, without some documents, by rows. Those without a positive left are dropped."""
        counts = np.diff(self.starts)
        example = np.repeat(np.arange(len(self)), counts)
        kept = ~np.isin(self.queries, queries)[example] & ~np.isin(self.documents, documents)
        judgements = (example[kept], np.asarray(self.documents)[kept], np.asarray(self.grades)[kept])
        return ExampleTable.of_judgements(*judgements, np.asarray(self.queries), np.asarray(self.own))

    def without_itself(self) -> ExampleTable:
        """Without judgements of the document that the query itself is. Examples without a positive left are dropped."""
        example = np.repeat(np.arange(len(self)), np.diff(self.starts))
        kept = self.own[example] != self.documents
        if kept.all():
            return self
        judgements = (example[kept], np.asarray(self.documents)[kept], np.asarray(self.grades)[kept])
        log.warning(
            "%d of %d judgements say that a paper is relevant, or not, to itself or to one of the same text: left out",
            *(len(kept) - int(kept.sum()), len(kept)),
        )
        return ExampleTable.of_judgements(*judgements, np.asarray(self.queries), np.asarray(self.own))

    @classmethod
    def of_judgements(
        cls,
        queries: np.ndarray,
        documents: np.ndarray,
        grades: np.ndarray,
        rows: np.ndarray,
        own: np.ndarray,
    ) -> ExampleTable:
        """From judgements (queries, documents, grades: (j,)), in the order in which queries first come.

        queries are numbers from 0; rows and own, by that number: the query's row, and the row that it itself is or -1.
        Queries without a positive are left out. Of several judgements of one pair the highest grade counts.
        """
        best = _best(queries, documents, grades)
        queries, documents, grades = queries[best], documents[best], grades[best]
        with_positive = np.zeros(len(rows), dtype=bool)
        with_positive[queries[grades > 0]] = True
        kept = with_positive[queries]
        queries, documents, grades = queries[kept], documents[kept], grades[kept]
        numbers, first, inverse, counts = np.unique(queries, return_index=True, return_inverse=True, return_counts=True)
        rank = np.empty(len(numbers), dtype=np.int64)
        by_first = np.argsort(first, kind="stable")
        rank[by_first] = np.arange(len(numbers))
        order = np.argsort(rank[inverse], kind="stable")
        starts = np.zeros(len(numbers) + 1, dtype=np.int64)
        np.cumsum(counts[by_first], out=starts[1:])
        chosen = numbers[by_first]
        return cls(
            rows[chosen].astype(np.int32),
            own[chosen].astype(np.int32),
            starts,
            documents[order].astype(np.int32),
            grades[order].astype(np.int32),
        )


def whole_grade(split: str, query: str, document: str, grade: float) -> int:
    """A grade of a judgement. Raises UserError for a number that is no grade, which only linear models learn."""
    if not isinstance(grade, int) and grade != int(grade):
        raise UserError(
            f"split {split}: query {query!r} and document {document!r} have score {grade}; grades are whole numbers "
            "(a reader with view: number is for benchmarks with a probe, not for training)"
        )
    return int(grade)


def _best(queries: np.ndarray, documents: np.ndarray, grades: np.ndarray) -> np.ndarray:
    """Of each pair the place of its highest grade; sorted."""
    pairs = queries.astype(np.int64) << 32 | documents
    order = np.lexsort((-grades, pairs))
    first = np.ones(len(order), dtype=bool)
    first[1:] = pairs[order][1:] != pairs[order][:-1]
    return np.sort(order[first])


def first_of_same_text(documents: Sequence[Document]) -> np.ndarray:
    """(documents,) int32: the first of the documents that has the same title and text."""
    seen: dict[tuple[str, str], int] = {}
    rows = (seen.setdefault((d.title, d.text), row) for row, d in enumerate(documents))
    return np.fromiter(rows, dtype=np.int32, count=len(documents))


class Joined(Sequence[Item]):
    """Several sequences as one. The rows in an ExampleTable's examples are moved by its offset."""

    def __init__(self) -> None:
        self._parts: list[tuple[Sequence[Item], int]] = []
        self._ends: list[int] = []

    def append(self, part: Sequence[Item], offset: int = 0) -> None:
        self._parts.append((part, offset))
        self._ends.append(len(self) + len(part))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def without(self, queries: np.ndarray, documents: np.ndarray) -> Joined[Item]:
        """See ExampleTable.without; rows are those of the task's document table."""
        left: Joined[Item] = Joined()
        for table, offset in self._parts:
            left.append(table.without(queries - offset, documents - offset), offset)
        return left

    def judged_rows(self) -> np.ndarray:
        """Rows of all documents of the examples, each once, where the parts are ExampleTables."""
        return np.unique(np.concatenate([np.unique(table.documents) + offset for table, offset in self._parts]))

    def concatenated(self, of: Callable[[Sequence[Item]], np.ndarray]) -> np.ndarray:
        """What a function gives for each part, as one array."""
        return np.concatenate([of(part) for part, _ in self._parts])

    def costs(self, lengths: np.ndarray, num_positives: int, num_hard_negatives: int) -> np.ndarray:
        """Tokens of each example, (examples,) int64, where the parts are ExampleTables: of its query, num_positives
        positives and num_hard_negatives hard negatives, of mean length. lengths: (documents,) of each row's tokens.
        """
        wanted = (num_positives, num_hard_negatives)
        return np.concatenate([table.costs(lengths[offset:], *wanted) for table, offset in self._parts])

    @property
    def parts(self) -> Sequence[tuple[Sequence[Item], int]]:
        """The sequences, and the offset of each."""
        return self._parts

    def query_rows(self) -> Iterator[int]:
        """The queries' rows, where the parts are ExampleTables."""
        for part, offset in self._parts:
            yield from (np.asarray(part.queries) + offset).tolist()

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        place = bisect.bisect_right(self._ends, index)
        part, offset = self._parts[place]
        inside = index - (self._ends[place - 1] if place else 0)
        return part.example(inside, offset) if isinstance(part, ExampleTable) else part[inside]


def query_rows(
    numbers: np.ndarray, num_documents: int, own: np.ndarray, same: np.ndarray, queries_are_documents: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Of queries, by their numbers: the row of each, and the row of the document that it itself is, or -1.

    own: the document with a query's id, by first_of_same_text, or -1. same: whether that has its text too; then both
    are one row. Other queries have rows after the documents.
    """
    if not queries_are_documents:
        return (numbers + num_documents).astype(np.int32), np.full(len(numbers), -1, dtype=np.int32)
    itself = own[numbers]
    rows = np.where((itself >= 0) & same[numbers], itself, numbers + num_documents)
    return rows.astype(np.int32), itself.astype(np.int32)


def in_memory(collection: Collection, queries_are_documents: bool) -> tuple[list[Sequence[Document]], ExampleTable]:
    """A collection's documents (corpus, then queries), and the examples of its train split over their rows.

    A text that stands twice in the corpus is one document in training, its first: neither is the other's negative.
    """
    corpus = {name: row for row, name in enumerate(collection.corpus)}
    queries = {name: number for number, name in enumerate(collection.queries)}
    documents = [list(collection.corpus.values()), list(collection.queries.values())]
    first = first_of_same_text(documents[0])
    own = np.array([first[corpus[name]] if name in corpus else -1 for name in queries], dtype=np.int32)
    same = np.array([collection.corpus.get(name) == document for name, document in collection.queries.items()], bool)
    rows, itself = query_rows(np.arange(len(queries)), len(corpus), own, same, queries_are_documents)
    judgements = [
        (queries[query], corpus[document], whole_grade("train", query, document, grade))
        for query, grades in collection.qrels.get("train", {}).items()
        for document, grade in grades.items()
    ]
    numbers, judged, grades = np.array(judgements, dtype=np.int64).reshape(-1, 3).T
    table = ExampleTable.of_judgements(numbers, first[judged], grades, rows, itself)
    return documents, table.without_itself() if queries_are_documents else table
