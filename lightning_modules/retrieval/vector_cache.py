"""The vectors of an encoder, kept in memory or on disk, so that no text is encoded twice.

    FOLDER/<fingerprint of the encoder>/<hash of task, similarity, precision and texts of the shard>.npy    (n, D)

On disk a shard is written completely or not at all, so encoding that was killed continues at the first missing shard.
The ranks share the work; they must all see the folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property
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

SHARD = 2048  # maximum number of texts per file: the work that an interruption loses
MIN_SHARD, NUM_SHARDS = 512, 64  # a small corpus has at most NUM_SHARDS shards, of at least MIN_SHARD texts
UNIT = 1024  # number of texts that a rank encodes at a time in memory
NUM_KEPT = 2  # results that are kept in memory: the last corpus and its queries


class VectorCache:
    """Encodes texts, unless their vectors are known already.

    folder: where vectors are kept, also for later commands; by default they are in memory. There the last two results
    are kept, such as those of a corpus and its queries.
    similarity: "cosine" keeps normalised vectors.
    shard_size: maximum number of texts per file.
    token_budget: maximum number of padded tokens per forward pass.
    """

    def __init__(
        self,
        encoder: Encoder,
        folder: Path | None = None,
        *,
        similarity: str = "dot",
        shard_size: int = SHARD,
        token_budget: int | None = None,
    ):
        self.encoder, self.similarity = encoder, similarity
        self.shard_size, self.token_budget = shard_size, token_budget
        self.folder = Path(folder) / self.fingerprint if folder else None
        self._kept: OrderedDict[str, Shards] = OrderedDict()

    @cached_property
    def fingerprint(self) -> str:
        """The encoder's fingerprint, at the time of the first use."""
        return fingerprint(self.encoder)

    def vectors(self, texts: Sequence[Document], task: str, name: str, advance: Advance | None = None) -> Shards:
        """Return the vectors (n, D) of all texts. All ranks call this together.

        task: task that the texts are encoded for. name: what the texts are, for error messages. advance: called with
        the number of texts of each batch that was encoded. Raises UserError for vectors that are not finite.
        """
        if self.folder:
            return self._from_disk(self.folder, texts, task, name, advance)
        key = text_hash(texts, task)
        if key not in self._kept:
            while len(self._kept) >= NUM_KEPT:  # before encoding, so that there is room for the new vectors
                self._kept.popitem(last=False)
            self._kept[key] = Shards([self._in_memory(texts, task, name, advance)])
        self._kept.move_to_end(key)
        return self._kept[key]

    def vectors_of_rank(
        self, texts: Sequence[Document], task: str, name: str, advance: Advance | None = None
    ) -> np.ndarray:
        """Return the vectors (q, D) of this rank's texts: numbers rank, rank + world size, ... of the texts."""
        return self.vectors(texts, task, name, advance).gather(np.arange(rank(), len(texts), world_size()))

    def remove(self) -> None:
        """Delete this encoder's vectors."""
        self._kept.clear()
        if self.folder and rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _from_disk(
        self, folder: Path, texts: Sequence[Document], task: str, name: str, advance: Advance | None
    ) -> Shards:
        folder.mkdir(parents=True, exist_ok=True)
        # Small shards for few texts give every rank a share. Sizes, and so bits, do not depend on the number of ranks.
        size = min(self.shard_size, max(MIN_SHARD, -(-len(texts) // NUM_SHARDS)))
        paths = []

        def encode_missing() -> None:
            for number, first in enumerate(range(0, len(texts), size)):
                shard = texts[first : first + size]
                path = folder / f"{text_hash(shard, task, self.similarity, current(self.encoder.device))}.npy"
                paths.append(path)
                if number % world_size() == rank() and not path.is_file():
                    vectors = self._encode(shard, task, name, first, advance)
                    with atomic_file(path) as file:
                        np.save(file, vectors)

        together(encode_missing)
        # Copy-on-write, because torch warns of arrays that are not writable.
        return Shards([np.load(path, mmap_mode="c") for path in paths])

    def _in_memory(self, texts: Sequence[Document], task: str, name: str, advance: Advance | None) -> np.ndarray:
        """Encode in units of texts, in which ranks take turns, so that bits do not depend on the number of ranks."""
        size = world_size()
        units = range(0, len(texts), UNIT)

        def encode_share() -> torch.Tensor:
            encoded = [
                torch.from_numpy(self._encode(texts[first : first + UNIT], task, name, first, advance))
                for first in units[rank() :: size]
            ]
            return torch.cat(encoded or [self.encoder.encode([], task)])

        share = together(encode_share)
        if size == 1:
            return share.numpy()
        gathered = gather_rows(share.to(self.encoder.device)).cpu().numpy()
        order = [first for r in range(size) for first in units[r::size]]
        vectors = np.empty_like(gathered)
        vectors[np.concatenate([np.arange(first, min(first + UNIT, len(texts))) for first in order])] = gathered
        return vectors

    def _encode(
        self, texts: Sequence[Document], task: str, name: str, first: int, advance: Advance | None
    ) -> np.ndarray:
        def encoded(count: int) -> None:
            if advance:
                advance(count)
            if self.folder and world_size() == 1:  # on disk nothing is lost by leaving here
                leave_if_asked()

        vectors = self.encoder.encode(list(texts), task, token_budget=self.token_budget, advance=encoded)
        if self.similarity == "cosine":
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        check_finite(vectors.numpy(), name, first)
        return vectors.numpy()


def fingerprint(encoder: Encoder) -> str:
    """Return a hash of an encoder's weights, arguments and vocabulary: on any machine, equal hashes mean equal vectors.

    Of the backbone's configuration it includes what the weights do not determine.
    """
    digest = hashlib.blake2b(digest_size=8)
    arguments = {name: str(value) for name, value in encoder.config.items()}
    backbone = encoder.backbone.config
    arguments |= {
        name: str(getattr(backbone, name, None)) for name in ("model_type", "num_attention_heads", "hidden_act")
    }
    digest.update(json.dumps([type(encoder).__name__, arguments], sort_keys=True).encode())
    digest.update(json.dumps(sorted(encoder.tokenizer.get_vocab().items())).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def text_hash(documents: Iterable[Document], *keys: str) -> str:
    """Return a hash of texts and of anything else that decides their vectors."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=12)
    for document in documents:
        digest.update(repr((document.title, document.text)).encode())
    return digest.hexdigest()
