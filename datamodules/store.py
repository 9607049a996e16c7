"""Collections on disk: texts in memory-mapped Arrow, all else as integers in memory-mapped arrays.

A training process maps them, and holds no Python object for a document or a judgement. conversion.py makes them.

    FOLDER/corpus.arrow, queries.arrow     id, title, text
    FOLDER/first.npy                       (M,) the first document with each document's text
    FOLDER/own.npy                         (Q,) the document with a query's id, by its first; -1 if there is none
    FOLDER/same.npy                        (Q,) whether that has the query's text too
    FOLDER/SPLIT.{queries,documents,grades}.npy    judgements, by rows
    FOLDER/examples.{queries,starts,documents,grades}.npy    of the train split, by first documents (examples.py)
    FOLDER/meta.json                       what it was made from, counts, fingerprint
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.examples import ExampleTable, query_rows
from datamodules.records import Document, Qrels

ROWS = 1 << 15  # documents of one Arrow batch
FIELDS = ("id", "title", "text")


class StoredDocuments(Mapping[str, Document]):
    """Documents in an Arrow file, by id or, through rows, by their number."""

    def __init__(self, path: Path):
        self.path = path
        self._batches: list[Any] | None = None
        self._places: dict[str, int] | None = None

    def __getstate__(self) -> Path:  # workers map the file themselves
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)

    @property
    def batches(self) -> list[Any]:
        """Columns of each batch, mapped at the first use."""
        if self._batches is None:
            import pyarrow as pa

            reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
            found = (reader.get_batch(i) for i in range(reader.num_record_batches))
            self._batches = [tuple(batch.column(name) for name in FIELDS) for batch in found]
        return self._batches

    def __len__(self) -> int:
        return ROWS * (len(self.batches) - 1) + len(self.batches[-1][0]) if self.batches else 0

    def row(self, index: int) -> Document:
        columns = self.batches[index // ROWS]
        return Document(*(column[index % ROWS].as_py() for column in columns))

    @property
    def rows(self) -> Rows:
        return Rows(self)

    def __iter__(self) -> Iterator[str]:
        for ids, _, _ in self.batches:
            yield from ids.to_pylist()

    def values(self) -> Rows:
        return self.rows

    def __getitem__(self, key: str) -> Document:
        if self._places is None:
            self._places = {name: i for i, name in enumerate(self)}
        return self.row(self._places[key])

    def ids(self, rows: Sequence[int]) -> list[str]:
        return [self.batches[row // ROWS][0][row % ROWS].as_py() for row in rows]


class Rows(Sequence[Document]):
    """Stored documents by number."""

    def __init__(self, documents: StoredDocuments):
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.documents.row(i) for i in range(*index.indices(len(self)))]
        return self.documents.row(range(len(self))[index])


class StoredCollection:
    """A converted collection. It stands where a Collection stands."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.corpus = StoredDocuments(folder / "corpus.arrow")
        self.queries = StoredDocuments(folder / "queries.arrow")

    def fingerprint(self) -> str:
        return self.meta["fingerprint"]

    def array(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    @property
    def splits(self) -> Mapping[str, int]:
        """Split -> its number of queries."""
        return self.meta["splits"]

    def judged(self, split: str) -> tuple[dict[str, Document], Qrels]:
        """A split's queries and judgements, in memory: for evaluation."""
        queries, documents, grades = (self.array(f"{split}.{name}") for name in ("queries", "documents", "grades"))
        qrels: dict[str, dict[str, int]] = {}
        found = {number: self.queries.row(number) for number in dict.fromkeys(queries.tolist())}
        for query, document, grade in zip(queries.tolist(), self.corpus.ids(documents), grades.tolist(), strict=True):
            qrels.setdefault(found[query].id, {})[document] = grade
        return {query.id: query for query in found.values()}, qrels

    def table(self, queries_are_documents: bool) -> tuple[list[Sequence[Document]], ExampleTable]:
        """Its documents (corpus, then queries), and the examples of its train split over their rows."""
        numbers = self.array("examples.queries") if "train" in self.splits else np.zeros(0, dtype=np.int32)
        parts = [self.array(f"examples.{n}") for n in ("starts", "documents", "grades")] if len(numbers) else None
        parts = parts or [np.zeros(1, dtype=np.int64), numbers, numbers]
        rows, own = query_rows(numbers, len(self.corpus), self.array("own"), self.array("same"), queries_are_documents)
        table = ExampleTable(rows, own, *parts)
        return [self.corpus.rows, self.queries.rows], table.without_itself() if queries_are_documents else table
