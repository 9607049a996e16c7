"""Vectors of texts, kept in shards on disk: what was embedded before is not embedded again.

    FOLDER/<fingerprint of the model>/<hash of task, similarity, precision and the shard's texts>.npy    (n, D) float32

A shard is written whole or not at all, so embedding that was killed goes on at the first shard that is missing. Ranks
share the shards; the folder must be one that all of them see.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from datamodules.files import atomic_file
from datamodules.records import Document
from lightning_modules.distributed.collectives import gather_rows, rank, together, world_size
from lightning_modules.distributed.signals import leave_if_asked
from lightning_modules.encoders.base import Encoder
from lightning_modules.retrieval.compute import current
from lightning_modules.retrieval.search import Advance, Shards, check_finite


def fingerprint(encoder: Encoder) -> str:
    """Of an encoder's weights, arguments and vocabulary: equal for equal vectors, on any machine."""
    digest = hashlib.blake2b(digest_size=8)
    about = {name: str(value) for name, value in encoder.config.items()}
    shape = encoder.backbone.config  # what weights alone do not tell
    about |= {name: str(getattr(shape, name, None)) for name in ("model_type", "num_attention_heads", "hidden_act")}
    digest.update(json.dumps([type(encoder).__name__, about], sort_keys=True).encode())
    digest.update(json.dumps(sorted(encoder.tokenizer.get_vocab().items())).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def text_hash(documents: Iterable[Document], *keys: str) -> str:
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=12)
    for document in documents:
        digest.update(repr((document.title, document.text)).encode())
    return digest.hexdigest()


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
                    with atomic_file(path) as file:
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
