"""Texts as token ids: tokenised once, before the first batch, and kept beside the stored texts that they are of.

    FOLDER/tokens-KEY/{corpus,queries}.ids       all texts' ids, one after the other: uint16, or uint32 where the
                                                 vocabulary needs it
    FOLDER/tokens-KEY/{corpus,queries}.npy       (n + 1,) int64, where each text's begin

KEY is of tokenizer, prompt and max_length; FOLDER of a StoredCollection is of the texts.
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

from datamodules.cache import only_one, unfinished
from datamodules.records import Collection, Document, UserError
from datamodules.store import StoredCollection
from datamodules.text import input_text, token_ids

log = logging.getLogger(__name__)

BLOCK = 4096  # texts that are tokenised together
TELL = 10.0  # seconds between two lines of the log


@dataclass(frozen=True)
class Encoding:
    """How a text becomes ids. prompt: precedes it. max_length: of its ids, special tokens included."""

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
        """Equal for encodings that give equal ids; None if the tokenizer cannot be told from others."""
        if not getattr(self.tokenizer, "is_fast", False):
            return None
        described = json.loads(self.tokenizer.backend_tokenizer.to_str())
        described |= {"truncation": None, "padding": None}  # of its last call
        settings = (self.tokenizer.sep_token, self.prompt, self.max_length, self.tokenizer.truncation_side)
        return hashlib.blake2b(repr((json.dumps(described), settings)).encode(), digest_size=8).hexdigest()


class TokenTable(Sequence[np.ndarray]):
    """The ids of texts, in memory. starts: (n + 1,) where each text's begin among the ids."""

    def __init__(self, ids: np.ndarray, starts: np.ndarray):
        self.ids, self.starts = ids, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row):
        row = range(len(self))[row]
        return self._between(int(self.starts[row]), int(self.starts[row + 1]))

    def lengths(self) -> np.ndarray:
        """(n,) tokens of each text."""
        return np.diff(self.starts)

    def _between(self, start: int, end: int) -> np.ndarray:
        return self.ids[start:end]


class TokenFile(TokenTable):
    """The ids of texts in a file. They are read and not mapped: memory stays that of a batch, however long it runs."""

    def __init__(self, path: Path, dtype: type[np.unsignedinteger]):
        self.path, self.dtype = path, np.dtype(dtype)
        self.starts = np.load(path.with_suffix(".npy"), mmap_mode="r")
        if path.stat().st_size != self.starts[-1] * self.dtype.itemsize:
            raise UserError(f"{path}: is not as it was written; delete {path.parent}, and it is made anew")
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (open as long as the table)

    def __getstate__(self) -> tuple[Path, type[np.unsignedinteger]]:  # workers open the file themselves
        return self.path, self.dtype.type

    def __setstate__(self, state: tuple[Path, type[np.unsignedinteger]]) -> None:
        self.__init__(*state)

    def _between(self, start: int, end: int) -> np.ndarray:
        size = self.dtype.itemsize
        return np.frombuffer(os.pread(self._file.fileno(), (end - start) * size, start * size), dtype=self.dtype)


def token_tables(collection: Collection | StoredCollection, encoding: Encoding) -> list[TokenTable]:
    """The ids of a collection's corpus, and of its queries."""
    parts = {"corpus": collection.corpus.values(), "queries": collection.queries.values()}
    key = encoding.fingerprint()
    if not isinstance(collection, StoredCollection) or key is None:
        return [_in_memory(list(documents), encoding) for documents in parts.values()]
    folder = collection.folder / f"tokens-{key}"
    if not folder.is_dir():
        with only_one(folder):
            if not folder.is_dir():
                _write(parts, encoding, folder)
    return [TokenFile(folder / f"{name}.ids", encoding.dtype) for name in parts]


def _in_memory(documents: Sequence[Document], encoding: Encoding) -> TokenTable:
    blocks = list(_blocks(documents, encoding, "texts"))
    ids = np.concatenate([ids for ids, _ in blocks]) if blocks else np.zeros(0, encoding.dtype)
    return TokenTable(ids, _starts([lengths for _, lengths in blocks]))


def _write(parts: Mapping[str, Sequence[Document]], encoding: Encoding, folder: Path) -> None:
    log.info("tokenising %s (once)", folder.parent)
    with unfinished(folder) as new:
        for name, documents in parts.items():
            lengths = []
            with open(new / f"{name}.ids", "wb") as file:
                for ids, some in _blocks(documents, encoding, name):
                    file.write(ids.tobytes())
                    lengths.append(some)
            np.save(new / f"{name}.npy", _starts(lengths))


def _starts(lengths: list[list[int]]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([length for some in lengths for length in some])]).astype(np.int64)


def _blocks(documents: Sequence[Document], encoding: Encoding, what: str) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Ids and lengths of block after block; how far it is, in the log."""
    started = told = time.monotonic()
    for first in range(0, len(documents), BLOCK):
        found = encoding.ids(documents[first : first + BLOCK])
        yield np.array([id for ids in found for id in ids], dtype=encoding.dtype), [len(ids) for ids in found]
        done, now = min(first + BLOCK, len(documents)), time.monotonic()
        if now - told > TELL:
            told, rate = now, done / (now - started)
            shown = f"{done:,} of {len(documents):,} {what} tokenised, {rate:,.0f} a second"
            log.info("  %s, %.0f min left", shown, (len(documents) - done) / rate / 60)
