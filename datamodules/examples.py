"""The training examples of a task as integer arrays. An Example object only exists while a batch is made.

The integers are rows of the task's document table, which has the corpus and queries of the first collection, then of
the second, and so on.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from datamodules.ragged import Ragged
from datamodules.readers.checks import MAX_GRADE
from datamodules.records import Collection, Document, Example, UserError

log = logging.getLogger(__name__)

Item = TypeVar("Item")


@dataclass(eq=False, repr=False)
class ExampleTable(Sequence[Example]):
    """Examples of one collection, whose rows start at 0. The arrays may be memory-mapped.

    queries: row of each query, (n,) int32.
    document_of_query: row of each query that is itself a document, else -1, (n,) int32.
    starts: (n + 1,) int64; the judgements of example i are at starts[i] to starts[i + 1].
    documents: row of each judged document, (j,) int32.
    grades: grade of each judgement, (j,) int32; above 0 is a positive, 0 a hard negative.
    """

    queries: np.ndarray
    document_of_query: np.ndarray
    starts: np.ndarray
    documents: np.ndarray
    grades: np.ndarray

    @classmethod
    def from_judgements(
        cls,
        queries: np.ndarray,
        documents: np.ndarray,
        grades: np.ndarray,
        rows: np.ndarray,
        document_of_query: np.ndarray,
    ) -> ExampleTable:
        """Group judgements by query, in order of each query's first appearance.

        Queries without a positive are dropped. If a pair is repeated, its highest grade counts.

        queries, documents, grades: query number, document row, and grade of each judgement, (j,).
        rows: by query number, the row of the query.
        document_of_query: by query number, the row of the query as a document, or -1 if it is not a document.
        """
        best = _highest_grades(queries, documents, grades)
        queries, documents, grades = queries[best], documents[best], grades[best]
        has_positive = np.zeros(len(rows), dtype=bool)
        has_positive[queries[grades > 0]] = True
        kept = has_positive[queries]
        queries, documents, grades = queries[kept], documents[kept], grades[kept]
        _, first, inverse = np.unique(queries, return_index=True, return_inverse=True)
        order = np.argsort(first[inverse], kind="stable")  # queries in order of appearance
        grouped = queries[order]
        starts = np.flatnonzero(np.diff(grouped, prepend=-1, append=-2))
        numbers = grouped[starts[:-1]]
        return cls(
            rows[numbers].astype(np.int32),
            document_of_query[numbers].astype(np.int32),
            starts,
            documents[order].astype(np.int32),
            grades[order].astype(np.int32),
        )

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.example(i) for i in range(*index.indices(len(self)))]
        return self.example(range(len(self))[index])

    def example(self, index: int, offset: int = 0) -> Example:
        """Return an example, with `offset` added to its rows."""
        judgements = slice(int(self.starts[index]), int(self.starts[index + 1]))
        grades = self.grades[judgements].tolist()
        rows = [row + offset for row in self.documents[judgements].tolist()]
        positives = tuple(row for row, grade in zip(rows, grades, strict=True) if grade > 0)
        document = int(self.document_of_query[index])
        return Example(
            query=int(self.queries[index]) + offset,
            positives=positives,
            grades=tuple(grade for grade in grades if grade > 0),
            hard_negatives=tuple(row for row, grade in zip(rows, grades, strict=True) if grade == 0),
            not_negatives=positives + (() if document < 0 else (document + offset,)),
        )

    def judged(self, chosen: np.ndarray) -> Ragged:
        """Return, for each example, the documents of its chosen judgements. chosen: (j,) bool."""
        before = np.concatenate([[0], np.cumsum(chosen)])
        return Ragged(before[np.asarray(self.starts)], np.asarray(self.documents)[chosen])

    def costs(self, lengths: np.ndarray, num_positives: int, num_hard_negatives: int) -> np.ndarray:
        """Return the expected number of tokens of each example, (n,) int64.

        It counts up to num_positives positives and num_hard_negatives hard negatives, each with the mean length of its
        kind in the example.

        lengths: number of tokens of each row.
        """
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        judged_lengths, positive = lengths[self.documents], np.asarray(self.grades) > 0
        tokens = lengths[self.queries].astype(np.float64)
        for chosen, limit in ((positive, num_positives), (~positive, num_hard_negatives)):
            total = np.add.reduceat(judged_lengths * chosen, self.starts[:-1])
            count = np.add.reduceat(chosen.astype(np.int64), self.starts[:-1])
            tokens += total / np.maximum(count, 1) * np.minimum(count, limit)
        return np.ceil(tokens).astype(np.int64)

    def without(self, queries: np.ndarray, documents: np.ndarray) -> ExampleTable:
        """Return the table without some query and document rows. Examples left without a positive are dropped."""
        example = self._example_of_judgement()
        return self._keep(~np.isin(self.queries, queries)[example] & ~np.isin(self.documents, documents))

    def without_self_links(self) -> ExampleTable:
        """Return the table without judgements of a query with itself."""
        kept = self.document_of_query[self._example_of_judgement()] != self.documents
        if kept.all():
            return self
        log.warning(
            "ignored %d of %d judgements, which relate a paper to itself or to a paper with the same text",
            len(kept) - int(kept.sum()),
            len(kept),
        )
        return self._keep(kept)

    def _example_of_judgement(self) -> np.ndarray:
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def _keep(self, kept: np.ndarray) -> ExampleTable:
        """Keep some judgements, and the examples that still have a positive. kept: judgements to keep, (j,) bool."""
        example, documents, grades = self._example_of_judgement(), np.asarray(self.documents), np.asarray(self.grades)
        return ExampleTable.from_judgements(
            example[kept], documents[kept], grades[kept], np.asarray(self.queries), np.asarray(self.document_of_query)
        )


def whole_grade(split: str, query: str, document: str, grade: float) -> int:
    """Return a grade as an integer. Raises UserError for other numbers, which only probes can use."""
    if not abs(grade) <= MAX_GRADE or grade != int(grade):
        raise UserError(
            f"split {split}: query {query!r} and document {document!r}: grades must be whole numbers up to "
            f"{MAX_GRADE:,}, got {grade}; a reader with view: number is for benchmarks with a probe, not for training"
        )
    return int(grade)


def _highest_grades(queries: np.ndarray, documents: np.ndarray, grades: np.ndarray) -> np.ndarray:
    """Return, for each pair, the index of the judgement with the highest grade. Indices are in ascending order."""
    pairs = queries.astype(np.int64) << 32 | documents
    order = np.lexsort((-grades, pairs))
    first = np.ones(len(order), dtype=bool)
    first[1:] = pairs[order][1:] != pairs[order][:-1]
    return np.sort(order[first])


def first_of_same_text(documents: Sequence[Document]) -> np.ndarray:
    """Return the row of the first document with the same title and text, for each document, (M,) int32."""
    first: dict[tuple[str, str], int] = {}
    rows = (first.setdefault((d.title, d.text), row) for row, d in enumerate(documents))
    return np.fromiter(rows, dtype=np.int32, count=len(documents))


def blank_rows(documents: Iterable[Document]) -> np.ndarray:
    """Return the rows of documents that have neither title nor text, int64."""
    return np.array([row for row, document in enumerate(documents) if document.is_blank], dtype=np.int64)


class Joined(Sequence[Item]):
    """Several sequences read as one."""

    def __init__(self) -> None:
        self._parts: list[Any] = []  # sequences of items
        self._ends: list[int] = []

    def append(self, part: Sequence[Item]) -> None:
        self._parts.append(part)
        self._ends.append(len(self) + len(part))

    @property
    def sequences(self) -> Sequence[Sequence[Item]]:
        """The joined sequences."""
        return self._parts

    def concatenated(self, function: Callable[[Any], np.ndarray]) -> np.ndarray:
        """Apply a function to each sequence and concatenate the resulting arrays."""
        return np.concatenate([function(part) for part in self._parts])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, inside = self._locate(index)
        return self._parts[number][inside]

    def part_of(self, rows: np.ndarray) -> tuple[Sequence[Item] | None, np.ndarray]:
        """Return the one sequence that has all the rows, or None, and the rows' positions in it."""
        if len(rows):
            number, _ = self._locate(int(rows.min()))
            start = self._ends[number - 1] if number else 0
            if rows.max() < self._ends[number]:
                return self._parts[number], rows - start
        return None, rows

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the number of an item's sequence, and the item's index in that sequence."""
        index = range(len(self))[index]
        number = bisect.bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)


class JoinedExamples(Joined[Example]):
    """The examples of a task: one table per collection, with the first row of its documents."""

    def __init__(self) -> None:
        super().__init__()
        self._offsets: list[int] = []

    def append(self, part: ExampleTable, offset: int = 0) -> None:
        super().append(part)
        self._offsets.append(offset)

    @property
    def parts(self) -> Sequence[tuple[ExampleTable, int]]:
        """The tables and their offsets."""
        return list(zip(self._parts, self._offsets, strict=True))

    def __getitem__(self, index):
        if isinstance(index, slice):
            return super().__getitem__(index)
        number, inside = self._locate(index)
        return self._parts[number].example(inside, self._offsets[number])

    def without(self, queries: np.ndarray, documents: np.ndarray) -> JoinedExamples:
        """Apply ExampleTable.without, with rows of the task's document table."""
        remaining = JoinedExamples()
        for table, offset in self.parts:
            remaining.append(table.without(queries - offset, documents - offset), offset)
        return remaining

    def costs(self, lengths: np.ndarray, num_positives: int, num_hard_negatives: int) -> np.ndarray:
        """Return the expected number of tokens of each example (ExampleTable.costs)."""
        return np.concatenate(
            [table.costs(lengths[offset:], num_positives, num_hard_negatives) for table, offset in self.parts]
        )

    def query_rows(self) -> Iterator[int]:
        """Yield the query's row of each example."""
        for table, offset in self.parts:
            yield from (np.asarray(table.queries) + offset).tolist()

    def judged_rows(self) -> np.ndarray:
        """Return the distinct rows of all judged documents."""
        return np.unique(np.concatenate([np.unique(table.documents) + offset for table, offset in self.parts]))


def rows_of_queries(
    numbers: np.ndarray, num_documents: int, same_id: np.ndarray, same_text: np.ndarray, queries_are_documents: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return two rows per query, (n,) int32 each: the row of its text, and the row of its document or -1.

    If queries are documents, a query's document is the one with the same id. If the query and its document have the
    same text, the two rows are equal. Otherwise, the query's text has a row after the documents.

    numbers: index of each query in the collection.
    same_id: for each query, the document with the same id (the first copy, if there are several), or -1.
    same_text: whether that document also has the query's text.
    """
    if not queries_are_documents:
        return (numbers + num_documents).astype(np.int32), np.full(len(numbers), -1, dtype=np.int32)
    documents = same_id[numbers]
    rows = np.where((documents >= 0) & same_text[numbers], documents, numbers + num_documents)
    return rows.astype(np.int32), documents.astype(np.int32)


def in_memory(collection: Collection, queries_are_documents: bool) -> tuple[list[Sequence[Document]], ExampleTable]:
    """Return a collection's documents (corpus, then queries), and its training examples as rows of those documents.

    In training, documents with the same text count as one document, so that a copy of a positive is never a negative.
    So do queries with the same text, so that a positive of one is never a negative of the other. Judgements of
    documents outside the corpus are left out.
    """
    corpus = {id: row for row, id in enumerate(collection.corpus)}
    queries = {id: number for number, id in enumerate(collection.queries)}
    documents: list[Sequence[Document]] = [list(collection.corpus.values()), list(collection.queries.values())]
    first, first_query = map(first_of_same_text, documents)
    same_id = np.array([first[corpus[id]] if id in corpus else -1 for id in queries], dtype=np.int32)
    same_text = np.array([collection.corpus.get(id) == query for id, query in collection.queries.items()], bool)
    numbers = np.arange(len(queries))
    rows, document_of_query = rows_of_queries(numbers, len(corpus), same_id, same_text, queries_are_documents)
    judgements = []
    for query, grades in (collection.judged("train")[1] if "train" in collection.qrels else {}).items():
        for document, grade in grades.items():
            if document in corpus:
                judgements.append((queries[query], corpus[document], whole_grade("train", query, document, grade)))
    example, judged, values = np.array(judgements, dtype=np.int64).reshape(-1, 3).T
    table = ExampleTable.from_judgements(first_query[example], first[judged], values, rows, document_of_query)
    return documents, table.without_self_links() if queries_are_documents else table
