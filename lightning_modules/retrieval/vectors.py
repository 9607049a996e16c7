"""Vectors for benchmarks: in memory, or in shards on disk; texts that several benchmarks share are encoded once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from datamodules.records import Document
from lightning_modules.distributed.collectives import gather_rows, rank, together, world_size
from lightning_modules.encoders.base import Encoder
from lightning_modules.retrieval.vector_cache import fingerprint, text_hash
from lightning_modules.retrieval.shards import Advance, Shards, check_finite
from lightning_modules.retrieval.vector_cache import VectorCache

SHARD = 2048  # texts of a file: what an interruption costs
UNIT = 1024  # texts that one rank encodes together


class Vectors:
    """An encoder's vectors of texts, as they are (see similarity.py for what they are compared by).

    folder: where they are kept on disk, also for the next time; by default they stand in memory. The last corpus and
    the last queries of this rank are remembered.
    """

    def __init__(self, encoder: Encoder, *, token_budget: int | None = None, folder: Path | None = None):
        self.encoder, self.token_budget = encoder, token_budget
        self.cache = VectorCache(encoder, folder, shard_size=SHARD, token_budget=token_budget) if folder else None
        self.kept: dict[str, tuple[str, Shards]] = {}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the encoder."""
        return self.cache.fingerprint if self.cache else fingerprint(self.encoder)

    def of_all_ranks(self, documents: Sequence[Document], task: str, what: str, advance: Advance | None = None):
        """Vectors (M, D) of documents, of which each rank encodes its share."""

        def made() -> Shards:
            if self.cache:
                return self.cache.vectors(documents, task, what, advance)
            return Shards([self._encode(documents, task, what, advance)])

        return self._once("documents", documents, task, made)

    def of_this_rank(self, queries: Sequence[Document], task: str, what: str, advance: Advance | None = None):
        """Vectors (q, D) float32 of this rank's queries: number rank, rank + world size, ... of those given."""

        def made() -> Shards:
            if self.cache:
                return Shards([np.concatenate(self.cache.vectors(queries, task, what, advance).parts)])
            return Shards([self._encode(queries, task, what, advance)])

        return self._once("queries", queries, task, made)[0][rank() :: world_size()]

    def _encode(self, documents: Sequence[Document], task: str, what: str, advance: Advance | None) -> np.ndarray:
        """Ranks take turns at units of texts. Each is encoded by itself, so its bits do not depend on who does it."""
        units, size = range(0, len(documents), UNIT), world_size()

        def own() -> torch.Tensor:
            parts = []
            for first in units[rank() :: size]:
                texts = list(documents[first : first + UNIT])
                parts.append(self.encoder.encode(texts, task, token_budget=self.token_budget, advance=advance))
                check_finite(parts[-1].numpy(), what, first)
            return torch.cat(parts or [self.encoder.encode([], task)])

        encoded = together(own)
        if size == 1:
            return encoded.numpy()
        gathered = gather_rows(encoded.to(self.encoder.device)).cpu().numpy()
        turns = [first for r in range(size) for first in units[r::size]]
        vectors = np.empty_like(gathered)
        vectors[np.concatenate([np.arange(first, min(first + UNIT, len(documents))) for first in turns])] = gathered
        return vectors

    def _once(self, kind: str, documents: Sequence[Document], task: str, made) -> Shards:
        key = text_hash(documents, task)
        if self.kept.get(kind, ("",))[0] != key:
            self.kept.pop(kind, None)
            self.kept[kind] = (key, made())
        return self.kept[kind][1]
