"""What hard negatives are mined from: each collection of a task as queries, corpus and judgements by number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from datamodules.examples import ExampleTable
from datamodules.records import Collection, Document, MiningPool
from datamodules.store import StoredCollection


class Picked(Sequence[Document]):
    """Documents of a sequence by row numbers."""

    def __init__(self, documents: Sequence[Document], rows: np.ndarray):
        self.documents, self.rows = documents, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.documents[row] for row in self.rows[index].tolist()]
        return self.documents[int(self.rows[index])]


def pool_of(
    task: str,
    name: str,
    collection: Collection | StoredCollection,
    table: ExampleTable,
    documents: Sequence[Document],
    first_row: int,
    first_example: int,
) -> MiningPool:
    """A collection's pool.

    table: its examples, with rows that begin at 0. documents: the task's table, in which its corpus begins at
    first_row; its examples begin at first_example of the task's.
    """
    num_documents = len(collection.corpus)
    corpus = Picked(documents, np.arange(first_row, first_row + num_documents))
    queries = Picked(documents, np.asarray(table.queries, dtype=np.int64) + first_row)
    positives = _judged(table, np.asarray(table.grades) > 0)
    return MiningPool(
        task,
        name,
        corpus,
        queries,
        first_row,
        first_example,
        np.asarray(table.own),
        positives,
        _revealed(collection, corpus, queries, positives),
        _judged(table, np.asarray(table.grades) == 0),
    )


def joined(lists: Iterable[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of numbers as (starts, numbers)."""
    parts = [np.asarray(part, dtype=np.int32) for part in lists]
    starts = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in parts], out=starts[1:])
    return starts, np.concatenate([*parts, np.zeros(0, dtype=np.int32)])


def _judged(table: ExampleTable, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The documents of each example, as (starts, documents), of judgements that are chosen."""
    before = np.concatenate([[0], np.cumsum(chosen)])
    return before[np.asarray(table.starts)], np.asarray(table.documents)[chosen]


def _revealed(
    collection: Collection | StoredCollection,
    corpus: Sequence[Document],
    queries: Sequence[Document],
    positives: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """What splits other than train judge relevant to training queries."""
    found: dict[str, set[str]] = {}
    for split in collection.splits:
        if split != "train":
            for query, grades in collection.judged(split)[1].items():
                found.setdefault(query, set()).update(d for d, grade in grades.items() if grade > 0)
    if not found:
        return np.zeros(len(queries) + 1, dtype=np.int64), np.zeros(0, dtype=np.int32)
    wanted = set().union(*found.values())
    place = {document.id: i for i, document in enumerate(corpus) if document.id in wanted}
    starts, known = positives
    return joined(
        sorted({place[d] for d in found.get(query.id, ())} - set(known[starts[i] : starts[i + 1]].tolist()))
        for i, query in enumerate(queries)
    )
