"""Collections on disk: texts in memory-mapped Arrow files, everything else in memory-mapped integer arrays.

So a training process has no Python object per document or judgement. conversion.py writes the folder:

    FOLDER/corpus.arrow, queries.arrow     id, title, text
    FOLDER/first.npy                       (M,) for each document, the first document with the same text
    FOLDER/own.npy                         (Q,) for each query, the same for the document with the query's id, or -1
    FOLDER/same.npy                        (Q,) whether that document also has the query's text
    FOLDER/SPLIT.{queries,documents,grades}.npy    judgements as rows; negative rows are outside the corpus
    FOLDER/examples.{queries,starts,documents,grades}.npy    examples of the train split (examples.py)
    FOLDER/meta.json                       reader, counts, fingerprint
    FOLDER/files.json                      size and checksum of each file, written by make_once
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.examples import ExampleTable, rows_of_queries
from datamodules.files import atomic_folder, load_array, read_json, write_json
from datamodules.locks import lock_file
from datamodules.records import Document, Qrels, UserError, explained

log = logging.getLogger(__name__)

SEAL = "files.json"  # size and checksum of each file in a cache folder
CHECKED = 1 << 28  # bytes; checksums of larger files are not verified at every start
BATCH_ROWS = 1 << 15  # documents in one Arrow batch
FIELDS = ("id", "title", "text")


class StoredDocuments(Mapping[str, Document]):
    """Documents in an Arrow file, accessible by id, or by row through `values()`."""

    def __init__(self, path: Path):
        self.path = path
        self._batches: list[Any] | None = None
        self._row_by_id: dict[str, int] | None = None

    def __getstate__(self) -> Path:  # workers map the file by themselves
        return self.path

    def __setstate__(self, path: Path) -> None:
        StoredDocuments.__init__(self, path)

    @property
    def batches(self) -> list[Any]:
        """Columns of each Arrow batch. The file is mapped on first use."""
        if self._batches is None:
            import pyarrow as pa

            reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            self._batches = [tuple(batch.column(name) for name in FIELDS) for batch in batches]
        return self._batches

    def __len__(self) -> int:
        return BATCH_ROWS * (len(self.batches) - 1) + len(self.batches[-1][0]) if self.batches else 0

    def row(self, index: int) -> Document:
        columns = self.batches[index // BATCH_ROWS]
        return Document(*(column[index % BATCH_ROWS].as_py() for column in columns))

    def __iter__(self) -> Iterator[str]:
        for ids, _, _ in self.batches:
            yield from ids.to_pylist()

    def values(self) -> Rows:
        return Rows(self)

    def __getitem__(self, key: str) -> Document:
        if self._row_by_id is None:
            self._row_by_id = {name: i for i, name in enumerate(self)}
        return self.row(self._row_by_id[key])

    def ids(self, rows: Sequence[int]) -> list[str]:
        """Return the ids of some rows, without reading their texts."""
        return [self.batches[row // BATCH_ROWS][0][row % BATCH_ROWS].as_py() for row in rows]


class Rows(Sequence[Document]):
    """Stored documents by row. Slices and selections are only read when they are used.

    numbers: rows of the file, in the order of this sequence; by default all of them.
    """

    def __init__(self, documents: StoredDocuments, numbers: np.ndarray | range | None = None):
        self.documents = documents
        self.numbers: np.ndarray | range = range(len(documents)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Rows(self.documents, self.numbers[index])
        return self.documents.row(int(self.numbers[index]))

    def select(self, positions: np.ndarray) -> Rows:
        """Return the documents at some positions, (n,)."""
        return Rows(self.documents, np.asarray(self.numbers)[positions])


class StoredCollection:
    """A converted collection, with the interface of Collection."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.corpus = StoredDocuments(folder / "corpus.arrow")
        self.queries = StoredDocuments(folder / "queries.arrow")

    def fingerprint(self) -> str:
        return self.meta["fingerprint"]

    def array(self, name: str) -> np.ndarray:
        return load_array(self.folder / f"{name}.npy")

    def blank_rows(self) -> np.ndarray:
        """Return the rows of documents (corpus, then queries) that have neither title nor text."""
        return np.array(self.meta["blank"], dtype=np.int64)

    @property
    def splits(self) -> Mapping[str, int]:
        """Number of queries in each split."""
        return self.meta["splits"]

    def judged(self, split: str) -> tuple[dict[str, Document], Qrels]:
        """Load the queries and judgements of a split into memory, for evaluation."""
        numbers, rows, grades = (self.array(f"{split}.{name}") for name in ("queries", "documents", "grades"))
        queries = {number: self.queries.row(number) for number in dict.fromkeys(numbers.tolist())}
        qrels: dict[str, dict[str, int]] = {}
        missing = {-1 - number: id for number, id in enumerate(self.meta["missing"])}
        known = iter(self.corpus.ids(rows[rows >= 0].tolist()))
        ids = [next(known) if row >= 0 else missing[row] for row in rows.tolist()]
        for number, document, grade in zip(numbers.tolist(), ids, grades.tolist(), strict=True):
            qrels.setdefault(queries[number].id, {})[document] = grade
        return {query.id: query for query in queries.values()}, qrels

    def table(self, queries_are_documents: bool) -> tuple[list[Sequence[Document]], ExampleTable]:
        """Return the documents (corpus, then queries), and the examples of the train split as rows of them."""
        numbers = self.array("examples.queries") if "train" in self.splits else np.zeros(0, dtype=np.int32)
        if len(numbers):
            starts, documents, grades = (self.array(f"examples.{n}") for n in ("starts", "documents", "grades"))
        else:
            starts, documents, grades = np.zeros(1, dtype=np.int64), numbers, numbers
        same_id, same_text = self.array("own"), self.array("same")
        rows, document_of_query = rows_of_queries(numbers, len(self.corpus), same_id, same_text, queries_are_documents)
        table = ExampleTable(rows, document_of_query, starts, documents, grades)
        table = table.without_self_links() if queries_are_documents else table
        return [self.corpus.values(), self.queries.values()], table


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time create a file or folder in the cache, while the others wait.

    Raises UserError if the parent folder cannot be used.
    """
    with explained(f"cache: cannot use the folder {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_file(path.parent / f".{path.name}.lock")
    with lock or nullcontext():
        yield


def make_once(folder: Path, write: Callable[[Path], None]) -> bool:
    """Create a cache folder, filled by `write`, unless an intact one exists. Return whether this process created it.

    Raises UserError if the folder cannot be written.
    """
    if folder.is_dir() and not damage(folder):
        return False
    with locked(folder):
        if folder.is_dir() and not (problem := damage(folder)):  # another process has just created it
            return False
        if folder.is_dir():
            log.warning("cache: %s is damaged (%s); creating it again", folder, problem)
        with explained(f"cache: cannot write to the folder {folder.parent}"):
            if folder.is_dir():
                shutil.rmtree(folder)  # before writing, because `write` might read the damaged files
            with atomic_folder(folder) as new:
                write(new)
                _seal(new)
        return True


def _seal(folder: Path) -> None:
    """Record the size and the checksum of each file of a new folder."""
    files = {path.name: [path.stat().st_size, checksum(path)] for path in sorted(folder.iterdir()) if path.is_file()}
    write_json(folder / SEAL, files)


def damage(folder: Path) -> str | None:
    """Return how a cache folder differs from what was written, or None if it is intact.

    For large files, only the size is compared. Otherwise, every rank would read the whole corpus at every start.
    """
    try:
        for name, (size, expected) in read_json(folder / SEAL).items():
            path = folder / name
            actual = path.stat().st_size if path.is_file() else None
            if actual != size:
                return f"{name}: expected {size} bytes, found {actual or 'none'}"
            if size <= CHECKED and checksum(path) != expected:
                return f"{name} was altered"
    except (UserError, OSError, ValueError, TypeError) as error:
        return str(error)
    return None


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
