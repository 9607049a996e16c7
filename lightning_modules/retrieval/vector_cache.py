"""Vectors of texts, kept in shards on disk: what was embedded before is not embedded again.

    FOLDER/<fingerprint of the model>/<hash of task, similarity, precision and the shard's texts>.npy    (n, D) float32

A shard is written whole or not at all, so embedding that was killed goes on at the first shard that is missing. Ranks
share the shards; the folder must be one that all of them see.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from datamodules.records import Document
from datamodules.text import input_text
from lightning_modules.distributed.collectives import rank, together, world_size
from lightning_modules.distributed.signals import leave_if_asked
from lightning_modules.encoders.base import Encoder
from lightning_modules.retrieval.vector_cache import fingerprint, text_hash, whole_file
from lightning_modules.retrieval.precision import current
from lightning_modules.retrieval.shards import Advance, Shards, check_finite

LEAST, SHARES = 512, 64  # texts of a shard, and shards of few texts


class VectorCache:
    """An encoder's vectors of texts, through a folder.

    similarity: "cosine" keeps them normalised. shard_size: texts of a shard. token_budget: as Encoder.encode has it.
    """

    def __init__(
        self,
        encoder: Encoder,
        folder: Path,
        *,
        similarity: str = "dot",
        shard_size: int = 16384,
        token_budget: int | None = None,
    ):
        self.encoder, self.similarity = encoder, similarity
        self.shard_size, self.token_budget = shard_size, token_budget
        self.fingerprint = fingerprint(encoder)
        self.folder = Path(folder) / self.fingerprint

    def vectors(self, documents: Sequence[Document], task: str, what: str, advance: Advance | None = None) -> Shards:
        """Vectors of documents, encoded for a task. All ranks call it together.

        what: their name in errors. advance: called with the number of texts that were encoded.

        Raises UserError for vectors that are not finite.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # Smaller where there are few, so that every rank has a share; the same, to the bit, for any number of ranks.
        size = min(self.shard_size, max(LEAST, -(-len(documents) // SHARES)))
        paths = []

        def embed() -> None:
            for number, first in enumerate(range(0, len(documents), size)):
                part = documents[first : first + size]
                path = self.folder / f"{text_hash(part, task, self.similarity, current(self.encoder.device))}.npy"
                paths.append(path)
                if number % world_size() == rank() and not path.is_file():
                    vectors = self._encode(part, task, advance)
                    check_finite(vectors, what, first)
                    with whole_file(path) as file:
                        np.save(file, vectors)

        together(embed)
        # Copy on write, since torch warns of arrays that cannot be written to.
        return Shards([np.load(path, mmap_mode="c") for path in paths])

    def _encode(self, documents: Sequence[Document], task: str, advance: Advance | None) -> np.ndarray:
        def encoded(count: int) -> None:
            if advance:
                advance(count)
            if world_size() == 1:
                leave_if_asked()

        vectors = self.encoder.encode(list(documents), task, token_budget=self.token_budget, advance=encoded)
        if self.similarity == "cosine":
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        return vectors.numpy()

    def remove(self) -> None:
        """Forget the vectors of this model."""
        if rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


def text_numbers(corpus: Iterable[Document], queries: Iterable[Document]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the texts of M documents and Q queries: equal where the texts are, but for case and spaces."""

    def hashed(documents: Iterable[Document]) -> np.ndarray:
        texts = (" ".join(input_text(document, " ").lower().split()) for document in documents)
        return np.fromiter((int.from_bytes(_digest(text), "big", signed=True) for text in texts), dtype=np.int64)

    of_documents, of_queries = hashed(corpus), hashed(queries)
    numbers = np.unique(np.concatenate([of_documents, of_queries]), return_inverse=True)[1]
    return numbers[: len(of_documents)], numbers[len(of_documents) :]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
