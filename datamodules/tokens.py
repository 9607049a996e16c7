"""Texts as token ids: tokenised once, before the first batch, and stored next to the texts.

    FOLDER/tokens-KEY/{corpus,queries}.ids       ids of all texts, end to end: uint16, or uint32 for large vocabularies
    FOLDER/tokens-KEY/{corpus,queries}.npy       (n + 1,) int64, position at which each text starts

FOLDER is the folder of a StoredCollection. KEY is a hash of tokenizer, prompt and max_length.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.records import Collection, Document, UserError
from datamodules.store import StoredCollection, make_once
from datamodules.text import input_text, token_ids

log = logging.getLogger(__name__)

BLOCK = 4096  # texts that are tokenised together
LOG_INTERVAL = 10.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Encoding:
    """How texts are turned into token ids.

    prompt: text that precedes every text.
    max_length: maximum number of tokens of a text, special tokens included.
    """

    tokenizer: Any
    prompt: str = ""
    max_length: int = 256

    def ids(self, documents: Sequence[Document]) -> list[list[int]]:
        texts = [self.prompt + input_text(document, self.tokenizer.sep_token) for document in documents]
        return token_ids(texts, self.tokenizer, self.max_length)

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        return np.uint16 if len(self.tokenizer) <= 2**16 else np.uint32

    def fingerprint(self) -> str | None:
        """Return a hash that is equal for encodings with equal ids; None if the tokenizer cannot be identified."""
        if not getattr(self.tokenizer, "is_fast", False):
            return None
        description = json.loads(self.tokenizer.backend_tokenizer.to_str())
        description |= {"truncation": None, "padding": None}  # set by the last call
        settings = (self.tokenizer.sep_token, self.prompt, self.max_length, self.tokenizer.truncation_side)
        return hashlib.blake2b(repr((json.dumps(description), settings)).encode(), digest_size=8).hexdigest()


class TokenTable(Sequence[np.ndarray]):
    """Token ids of n texts in memory. starts: (n + 1,) position of each text among the ids."""

    def __init__(self, ids: np.ndarray, starts: np.ndarray):
        self.ids, self.starts = ids, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row):
        row = range(len(self))[row]
        return self._between(int(self.starts[row]), int(self.starts[row + 1]))

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each text, (n,)."""
        return np.diff(self.starts)

    def _between(self, start: int, end: int) -> np.ndarray:
        return self.ids[start:end]


class TokenFile(TokenTable):
    """Token ids of texts in a file. They are read, not mapped, so memory stays small during a long training."""

    def __init__(self, path: Path, dtype: type[np.unsignedinteger]):
        self.path, self.dtype = path, np.dtype(dtype)
        self.starts = np.load(path.with_suffix(".npy"), mmap_mode="r")
        expected, actual = int(self.starts[-1]) * self.dtype.itemsize, path.stat().st_size
        if actual != expected:
            raise UserError(
                f"{path}: expected {expected} bytes, found {actual}; delete {path.parent} to tokenise the texts again"
            )
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (open as long as the table)

    def __getstate__(self) -> tuple[Path, type[np.unsignedinteger]]:  # workers open the file themselves
        return self.path, self.dtype.type

    def __setstate__(self, state: tuple[Path, type[np.unsignedinteger]]) -> None:
        self.__init__(*state)

    def _between(self, start: int, end: int) -> np.ndarray:
        size = self.dtype.itemsize
        return np.frombuffer(os.pread(self._file.fileno(), (end - start) * size, start * size), dtype=self.dtype)


def token_tables(collection: Collection | StoredCollection, encoding: Encoding) -> list[TokenTable]:
    """Return the token ids of a collection's corpus and of its queries."""
    texts = {"corpus": collection.corpus.values(), "queries": collection.queries.values()}
    key = encoding.fingerprint()
    if not isinstance(collection, StoredCollection) or key is None:
        return [_in_memory(list(documents), encoding) for documents in texts.values()]
    folder = collection.folder / f"tokens-{key}"
    make_once(folder, lambda new: _write(texts, encoding, new))
    return [TokenFile(folder / f"{name}.ids", encoding.dtype) for name in texts]


def _in_memory(documents: Sequence[Document], encoding: Encoding) -> TokenTable:
    blocks = list(_blocks(documents, encoding, "texts"))
    ids = np.concatenate([ids for ids, _ in blocks]) if blocks else np.zeros(0, encoding.dtype)
    return TokenTable(ids, _starts([lengths for _, lengths in blocks]))


def _write(texts: Mapping[str, Sequence[Document]], encoding: Encoding, folder: Path) -> None:
    log.info("tokenising %s (once)", folder.parent)
    for name, documents in texts.items():
        lengths = []
        with open(folder / f"{name}.ids", "wb") as file:
            for ids, block_lengths in _blocks(documents, encoding, name):
                file.write(ids.tobytes())
                lengths.append(block_lengths)
        np.save(folder / f"{name}.npy", _starts(lengths))


def _starts(lengths: list[list[int]]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([length for block in lengths for length in block])]).astype(np.int64)


def _blocks(documents: Sequence[Document], encoding: Encoding, kind: str) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Tokenise block by block: yield the ids and the lengths of each block, and log progress."""
    started = logged = time.monotonic()
    for first in range(0, len(documents), BLOCK):
        texts = encoding.ids(documents[first : first + BLOCK])
        yield np.array([id for ids in texts for id in ids], dtype=encoding.dtype), [len(ids) for ids in texts]
        done, now = min(first + BLOCK, len(documents)), time.monotonic()
        if now - logged > LOG_INTERVAL:
            logged, rate = now, done / (now - started)
            progress = f"{done:,} of {len(documents):,} {kind} tokenised, {rate:,.0f} per second"
            log.info("  %s, %.0f min left", progress, (len(documents) - done) / rate / 60)
