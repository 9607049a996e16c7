"""Token ids of texts: tokenise in the background, cache in memory, and store next to the texts.

    FOLDER/tokens-KEY/{corpus,queries}.ids       concatenated ids of all texts: uint16, or uint32 for large vocabularies
    FOLDER/tokens-KEY/{corpus,queries}.npy       (n + 1,) int64, start of each text

FOLDER is the folder of a StoredCollection. KEY is a hash of tokenizer, prompt and max_length.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
import pickle
import threading
from collections import OrderedDict, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from datamodules.cores import available_cores
from datamodules.files import load_array
from datamodules.progress_lines import ProgressLines
from datamodules.records import Collection, Document, UserError
from datamodules.store import Rows, StoredCollection, damage, make_once
from datamodules.text import input_text, token_ids

log = logging.getLogger(__name__)

BLOCK = 4096  # number of texts of a collection to write at a time
PIECE = 128  # texts that a thread tokenises at a time; abstracts take 45 ms, of which 2 ms hold Python's lock
AHEAD = 16384  # number of texts to tokenise in advance
MAX_THREADS = 16
CACHE_BYTES = 256 << 20  # enough for 600,000 abstracts
MIN_CACHED = 512  # smaller jobs are not cached, because batches of a frozen model never repeat


class _Snapshot(NamedTuple):
    """A copy of a fast tokenizer with truncation, and a hash of everything that determines its ids."""

    backend: Any
    key: str


_snapshots: WeakKeyDictionary[Any, dict[tuple, _Snapshot]] = WeakKeyDictionary()
_lock = threading.Lock()


@dataclass(frozen=True)
class Encoding:
    """A tokenizer and its settings, which turn texts into token ids.

    prompt: text to put before every text.
    max_length: maximum number of tokens per text, including special tokens.
    """

    tokenizer: Any
    prompt: str = ""
    max_length: int = 256

    def table(self, documents: Sequence[Document]) -> TokenTable:
        """Tokenise texts. Thread-safe, even while other code uses the tokenizer.

        The ids equal those of `tokenizer(texts, truncation=True, max_length=max_length)`.
        """
        return self._tokenise(self._texts(documents), self._snapshot())

    def fingerprint(self) -> str | None:
        """Return a hash of everything that determines the ids, or None if the tokenizer cannot be identified."""
        return self._fingerprint(self._snapshot())

    def _fingerprint(self, snapshot: _Snapshot | None) -> str | None:
        if snapshot is None:
            return None
        settings = (snapshot.key, self.tokenizer.sep_token, self.prompt)
        return hashlib.blake2b(repr(settings).encode(), digest_size=8).hexdigest()

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        return np.uint16 if len(self.tokenizer) <= 2**16 else np.uint32

    def _texts(self, documents: Iterable[Document]) -> list[str]:
        return [self.prompt + input_text(document, self.tokenizer.sep_token) for document in documents]

    def _snapshot(self) -> _Snapshot | None:
        """Return a copy of the tokenizer in its current state, or None for tokenizers that are slow or have parts in
        Python.

        A copy is used, because each call of the tokenizer itself would set truncation and padding for all threads.
        """
        tokenizer = self.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            return None
        backend = tokenizer.backend_tokenizer
        try:
            parts = [pickle.dumps(part) for part in (backend.normalizer, backend.pre_tokenizer, backend.post_processor)]
        except Exception:  # the tokenizers package raises a plain Exception for parts written in Python
            return None
        state = (self.max_length, len(tokenizer), tokenizer.truncation_side, tokenizer.split_special_tokens, *parts)
        with _lock:
            snapshots = _snapshots.setdefault(tokenizer, {})
            if state not in snapshots:
                copy = deepcopy(backend)
                copy.no_padding()
                copy.enable_truncation(self.max_length, direction=tokenizer.truncation_side)
                copy.encode_special_tokens = tokenizer.split_special_tokens  # deepcopy forgets it
                description = f"{copy.to_str()} {copy.encode_special_tokens}"
                snapshots[state] = _Snapshot(copy, hashlib.blake2b(description.encode(), digest_size=16).hexdigest())
            return snapshots[state]

    def _tokenise(self, texts: list[str], snapshot: _Snapshot | None) -> TokenTable:
        if snapshot is None:
            with _lock:
                lists = token_ids(texts, self.tokenizer, self.max_length)
        else:
            # Twice as fast as calling the tokenizer, which also computes offsets, masks and types. It releases Python's
            # lock.
            lists = [encoding.ids for encoding in snapshot.backend.encode_batch_fast(texts)]
        starts = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        return TokenTable(np.fromiter(itertools.chain.from_iterable(lists), self.dtype, int(starts[-1])), starts)


class TokenTable(Sequence[np.ndarray]):
    """Token ids of n texts in memory. starts: (n + 1,) position of each text among the ids."""

    def __init__(self, ids: np.ndarray, starts: np.ndarray):
        self.ids, self.starts = ids, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row):
        row = range(len(self))[row]
        return self._between(int(self.starts[row]), int(self.starts[row + 1]))

    @classmethod
    def joined(cls, tables: Sequence[TokenTable], dtype: type[np.unsignedinteger]) -> TokenTable:
        """Concatenate tables. dtype: type of the ids if there are no tables."""
        if len(tables) == 1:
            return tables[0]
        starts = np.cumsum(np.concatenate([[0], *(table.lengths() for table in tables)]), dtype=np.int64)
        return TokenTable(np.concatenate([np.zeros(0, dtype), *(table.ids for table in tables)]), starts)

    def take(self, rows: Sequence[int] | np.ndarray) -> TokenTable:
        """Return the texts of some rows, in memory."""
        rows = np.asarray(rows, dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(self.starts[rows + 1] - self.starts[rows])])
        if len(rows) and (np.diff(rows) == 1).all():
            return TokenTable(self._between(int(self.starts[rows[0]]), int(self.starts[rows[-1] + 1])), starts)
        return TokenTable(self._gathered(rows, starts), starts)

    def _gathered(self, rows: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Return the concatenated ids of some rows. starts: positions of the rows in the result, (n + 1,)."""
        return self.ids[np.arange(starts[-1]) + np.repeat(self.starts[rows] - starts[:-1], np.diff(starts))]

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each text, (n,)."""
        return np.diff(self.starts)

    def _between(self, start: int, end: int) -> np.ndarray:
        return self.ids[start:end]


class TokenFile(TokenTable):
    """Token ids of texts in a file. The file is read, not mapped, so that memory stays small during a long training."""

    def __init__(self, path: Path, dtype: type[np.unsignedinteger]):
        self.path, self.dtype = path, np.dtype(dtype)
        self.starts = load_array(path.with_suffix(".npy"))
        expected, actual = int(self.starts[-1]) * self.dtype.itemsize, path.stat().st_size
        if actual != expected:
            raise UserError(
                f"{path}: expected {expected} bytes, found {actual}; delete {path.parent} to tokenise the texts again"
            )
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (open as long as the table)

    def __getstate__(self) -> tuple[Path, type[np.unsignedinteger]]:  # workers open the file by themselves
        return self.path, self.dtype.type

    def __setstate__(self, state: tuple[Path, type[np.unsignedinteger]]) -> None:
        TokenFile.__init__(self, *state)

    def _between(self, start: int, end: int) -> np.ndarray:
        size = self.dtype.itemsize
        return np.frombuffer(os.pread(self._file.fileno(), (end - start) * size, start * size), dtype=self.dtype)

    def _gathered(self, rows: np.ndarray, starts: np.ndarray) -> np.ndarray:
        return np.concatenate([np.zeros(0, self.dtype), *(self[int(row)] for row in rows)])


class TokenCache:
    """In-memory cache for token ids of recent texts. When it is full, the least recently used texts are dropped.

    limit: maximum number of bytes.
    """

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self._tables: OrderedDict[bytes, TokenTable] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> TokenTable | None:
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
            return self._tables.get(key)

    def put(self, key: bytes, table: TokenTable) -> None:
        with self._lock:
            if key not in self._tables:
                self._tables[key] = table
                self.size += _num_bytes(table)
            while self.size > self.limit:
                self.size -= _num_bytes(self._tables.popitem(last=False)[1])

    def clear(self) -> None:
        with self._lock:
            self._tables.clear()
            self.size = 0


def _num_bytes(table: TokenTable) -> int:
    return table.ids.nbytes + table.starts.nbytes + 500  # the Python objects take about 500 bytes


CACHE = TokenCache(CACHE_BYTES)


def token_tables(collection: Collection | StoredCollection, encoding: Encoding) -> list[TokenTable]:
    """Return the token ids of a collection's corpus and of its queries."""
    texts: dict[str, Any] = {"corpus": collection.corpus.values(), "queries": collection.queries.values()}
    key = encoding.fingerprint()
    if not isinstance(collection, StoredCollection) or key is None:
        tables = (_blocks(list(documents), encoding, "texts") for documents in texts.values())
        return [TokenTable.joined(list(blocks), encoding.dtype) for blocks in tables]
    folder = collection.folder / f"tokens-{key}"
    make_once(folder, lambda new: _write(texts, encoding, new))
    return [TokenFile(folder / f"{name}.ids", encoding.dtype) for name in texts]


def stored_tokens(documents: Sequence[Document], encoding: Encoding) -> TokenFile | None:
    """Return the token file of the documents' stored collection, or None if it is missing or damaged."""
    if not isinstance(documents, Rows):
        return None
    path = documents.documents.path
    path = path.parent / f"tokens-{encoding.fingerprint()}" / f"{path.stem}.ids"
    return TokenFile(path, encoding.dtype) if path.is_file() and _is_intact(path.parent) else None


@functools.cache  # verified once per process
def _is_intact(folder: Path) -> bool:
    if problem := damage(folder):
        log.warning("cache: %s is damaged (%s); tokenising the texts again", folder, problem)
    return not problem


def tokenise_ahead(jobs: Iterable[tuple[Encoding, Sequence[Document]]]) -> Generator[TokenTable]:
    """Yield the token ids of each job's texts, while threads tokenise the next AHEAD texts.

    If you do not exhaust the generator, close it (contextlib.closing) to end the threads. Ids in CACHE or in a token
    file are not computed again, and the ids of large jobs are added to CACHE. A single job of up to PIECE texts runs in
    the calling thread. If `jobs` or a job fails, the error is raised after the tables of all earlier jobs.
    """
    failures: list[Exception] = []
    started = _started(jobs, failures)
    first = list(itertools.islice(started, 2))
    if len(first) == 1 and len(first[0].documents) <= PIECE and not failures:
        yield first[0].run()
        return
    pending: deque[tuple[_Job, list[Future[TokenTable]]]] = deque()
    pool = ThreadPoolExecutor(_num_threads(), "tokenise")
    try:
        for job in itertools.chain(first, started):
            pending.append((job, [pool.submit(job.piece, start) for start in job.starts]))
            while sum(len(job.documents) for job, _ in pending) >= AHEAD:
                yield _result(*pending.popleft())
        while pending:
            yield _result(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)
    for failure in failures:
        raise failure


def _started(jobs: Iterable[tuple[Encoding, Sequence[Document]]], failures: list[Exception]) -> Iterator[_Job]:
    try:
        for encoding, documents in jobs:
            yield _Job(encoding, documents)
    except Exception as failure:  # raised later, because the preceding texts can still be used
        failures.append(failure)


class _Job:
    """Texts to tokenise, in pieces."""

    def __init__(self, encoding: Encoding, documents: Sequence[Document]):
        self.encoding, self.documents = encoding, documents
        self.starts = range(0, len(documents), PIECE)
        self.file = stored_tokens(documents, encoding)
        self.snapshot = encoding._snapshot()
        self.fingerprint = encoding._fingerprint(self.snapshot) if len(documents) >= MIN_CACHED else None

    def piece(self, start: int) -> TokenTable:
        documents = self.documents[start : start + PIECE]
        if self.file is not None and isinstance(documents, Rows):
            return self.file.take(documents.numbers)
        key = self.fingerprint and _hash_of(documents, self.fingerprint)
        table = CACHE.get(key) if key else None
        if table is None:
            table = self.encoding._tokenise(self.encoding._texts(documents), self.snapshot)
            if key:
                CACHE.put(key, table)
        return table

    def run(self) -> TokenTable:
        return TokenTable.joined([self.piece(start) for start in self.starts], self.encoding.dtype)


def _hash_of(documents: Sequence[Document], key: str) -> bytes:
    """Return a hash of texts and a key. Joining the texts first is three times as fast as hashing them one by one."""
    texts = [text for document in documents for text in (document.title, document.text)]
    digest = hashlib.blake2b(repr((key, *map(len, texts))).encode(), digest_size=16)
    digest.update("".join(texts).encode("utf-8", "surrogatepass"))
    return digest.digest()


def _result(job: _Job, pieces: Sequence[Future[TokenTable]]) -> TokenTable:
    return TokenTable.joined([piece.result() for piece in pieces], job.encoding.dtype)


def _num_threads() -> int:
    """Return the number of threads that tokenise, which leaves one core for the thread that uses the ids."""
    return max(1, min(MAX_THREADS, available_cores() - 1))


def _write(texts: Mapping[str, Sequence[Document]], encoding: Encoding, folder: Path) -> None:
    log.info("tokenising %d texts (once) into %s", sum(map(len, texts.values())), folder.parent)
    for name, documents in texts.items():
        lengths = [np.zeros(1, np.int64)]
        with open(folder / f"{name}.ids", "wb") as file:
            for table in _blocks(documents, encoding, name):
                file.write(table.ids.tobytes())
                lengths.append(table.lengths())
        np.save(folder / f"{name}.npy", np.cumsum(np.concatenate(lengths), dtype=np.int64))


def _blocks(documents: Sequence[Document], encoding: Encoding, kind: str) -> Iterator[TokenTable]:
    """Yield the ids of blocks of texts, and log progress."""
    progress = ProgressLines(f"tokenising {kind}", "texts", len(documents))
    jobs = ((encoding, documents[first : first + BLOCK]) for first in range(0, len(documents), BLOCK))
    with closing(tokenise_ahead(jobs)) as tables:
        for table in tables:
            yield table
            progress.advance(len(table))
