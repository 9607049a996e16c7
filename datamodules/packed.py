"""Packed token ids of texts, and the batch of a training step."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.buffers import moved, pack, unpack
from datamodules.records import Document


@dataclass(frozen=True)
class Tokens:
    """Token ids of b texts, concatenated without padding.

    input_ids    (T,) int64
    offsets      (b + 1,) int32, start of each text, and T
    lengths      number of tokens of each text
    keys         hash of each text (see token_hash)

    Lengths and keys are on the host, so that no computation waits for the device.
    """

    input_ids: Tensor
    offsets: Tensor
    lengths: tuple[int, ...]
    keys: tuple[int, ...]

    @classmethod
    def pack(cls, texts: Iterable[Sequence[int] | np.ndarray]) -> Tokens:
        """Pack the token ids of some texts."""
        arrays = [np.asarray(ids, dtype=np.int64) for ids in texts]
        lengths = tuple(len(ids) for ids in arrays)
        ids = np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
        return cls(torch.from_numpy(ids), offsets_of(lengths), lengths, tuple(map(token_hash, arrays)))

    @classmethod
    def from_padded(cls, input_ids: Tensor, attention_mask: Tensor) -> Tokens:
        """Pack padded texts. input_ids, attention_mask: (b, S), as tokenizers return them."""
        lengths = tuple(attention_mask.sum(1).tolist())
        ids = input_ids[attention_mask.bool()]
        keys = tuple(map(token_hash, np.split(ids.cpu().numpy(), np.cumsum(lengths)[:-1])))
        return cls(ids, offsets_of(lengths).to(ids.device), lengths, keys)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """Runs of neighbouring texts of equal length, as pairs (number of texts, length)."""
        return [(len(list(run)), length) for length, run in itertools.groupby(self.lengths)]

    def positions(self) -> Tensor:
        """Return the position of each token in its text, (T,) int64."""
        return torch.arange(self.num_tokens, device=self.offsets.device) - self.spread(self.offsets[:-1])

    def spread(self, values: Tensor) -> Tensor:
        """Repeat each text's value for all its tokens. values: (b, ...); shape of the result: (T, ...)."""
        return values.repeat_interleave(self.offsets.diff(), dim=0, output_size=self.num_tokens)

    def select(self, texts: Sequence[int]) -> Tokens:
        """Return the texts at some indices, in the order of the indices."""
        starts = np.cumsum((0, *self.lengths))
        ranges = [np.arange(starts[text], starts[text + 1]) for text in texts]
        rows = torch.from_numpy(np.concatenate(ranges)).to(self.input_ids.device)
        lengths, keys = (tuple(values[text] for text in texts) for values in (self.lengths, self.keys))
        return Tokens(self.input_ids[rows], offsets_of(lengths).to(self.input_ids.device), lengths, keys)

    def fill(self, num_texts: int, num_tokens: int, longest: int) -> Tokens:
        """Append filler texts, one of them with `longest` tokens, so that all batches have the same shape.

        num_texts, num_tokens: number of texts and tokens of the result. They must leave room for fillers.
        """
        count, rest = num_texts - len(self), num_tokens - self.num_tokens
        assert longest + count - 1 <= rest <= count * longest, "no fillers fit"
        fillers = [longest] + [1] * (count - 1)
        missing = rest - sum(fillers)
        for i in range(1, count):
            fillers[i] += (extra := min(missing, longest - 1))
            missing -= extra
        device, lengths = self.input_ids.device, (*self.lengths, *fillers)
        ids = torch.cat([self.input_ids, self.input_ids.new_zeros(rest)])
        return Tokens(ids, offsets_of(lengths).to(device), lengths, (*self.keys, *[0] * count))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Tokens:
        ids, offsets = (x.to(device, non_blocking=non_blocking) for x in (self.input_ids, self.offsets))
        return Tokens(ids, offsets, self.lengths, self.keys)


def offsets_of(lengths: Sequence[int]) -> Tensor:
    """Return the start of each text, and the end of the last one, (b + 1,) int32."""
    return torch.from_numpy(np.cumsum((0, *lengths), dtype=np.int32))


def token_hash(ids: np.ndarray) -> int:
    """Return a hash of a text's token ids. Texts with the same tokens have the same hash, on every rank and machine."""
    digest = hashlib.blake2b(np.asarray(ids, dtype="<u4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # 63 bits, because negative numbers are padding


@dataclass(frozen=True)
class Companion:
    """Extra texts to encode along with a batch, for an additional loss.

    task     task whose prompt and expert encode the texts
    seed     seed of the texts' dropout
    chunks   token ids of the distinct texts, as in a batch
    index    (n,) position of each text among the distinct ones
    rows     (n,) row of each text in the document table that it comes from
    detached whether the vectors have no gradient
    """

    task: str
    seed: int
    chunks: tuple[Tokens, ...]
    index: Tensor
    rows: Tensor
    detached: bool = False


@dataclass
class ContrastiveBatch:
    """A batch of B queries of one task and M documents to compare them with. Each distinct text is encoded once.

    The U distinct texts are in chunks, shortest first. The embeddings of all chunks, concatenated, have shape (U, D).

    step             position of the batch in the schedule
    task             task of all queries
    seed             seed of this step's dropout on this rank
    fingerprint      hash of the ids in the batch; equal batches have equal fingerprints on every machine
    num_tokens       number of tokens of all U texts and of the companions, without padding
    chunks           token ids of the U texts
    queries          (B,)   row of each query among the U texts
    documents        (M,)   row of each document among the U texts
    document_ids     (M,)   identity of each document, the same on all ranks
    positives        (B, P) columns of the sampled positives among the M documents, at least one; padded with -1
    hard_negatives   (B, N) columns of the query's own hard negatives among the M documents; padded with -1
    known_positives  (B, K) identities that must not be negatives of the query: all its positives, and the query itself
                            if it is a document; padded with -1
    unlabelled       (B, J) those that are not positives: the query itself, and documents that a judge dropped;
                            padded with -1; by default none
    texts            documents of the U rows if a frozen model scores the batch, else empty
    weight           weight of this rank's mean loss: its number of queries divided by the mean over all ranks
    text_keys        (U,)   hashes of token ids: equal for texts with the same tokens; None if unknown
    pairs            (R, 2) row and column of each of the R sampled positives; computed from positives if None
    teacher_vectors  (U, G) stored vectors of a frozen model to distil, if any
    rows             (U,)   row of each text in the task's document table; None if unknown
    companions       extra texts to encode, for additional losses
    """

    step: int
    task: str
    seed: int
    fingerprint: str
    num_tokens: int
    chunks: tuple[Tokens, ...]
    queries: Tensor
    documents: Tensor
    document_ids: Tensor
    positives: Tensor
    hard_negatives: Tensor
    known_positives: Tensor
    unlabelled: Tensor = None  # type: ignore[assignment]
    texts: tuple[Document, ...] = ()
    weight: float = 1.0
    text_keys: Tensor | None = None
    pairs: Tensor = None  # type: ignore[assignment]
    teacher_vectors: Tensor | None = None
    rows: Tensor | None = None
    companions: tuple[Companion, ...] = ()

    def __post_init__(self) -> None:
        if self.unlabelled is None:
            self.unlabelled = self.known_positives[:, :0]
        if self.pairs is None:  # computed on the host, because the number of pairs determines shapes
            row, position = (self.positives >= 0).nonzero(as_tuple=True)
            self.pairs = torch.stack([row, self.positives[row, position]], dim=1)

    def to(self, device: torch.device | str) -> ContrastiveBatch:
        """Return the batch on a device, in one copy. If the batch is pinned, the host does not wait for a GPU."""
        device = torch.device(device)
        if self.queries.device == device:
            return self
        non_blocking = device.type not in ("cpu", "mps")  # as in Lightning
        return moved(self, lambda buffer: buffer.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ContrastiveBatch:
        """Return the batch in pinned memory, which a GPU reads without the CPU."""
        return moved(self, Tensor.pin_memory)

    def __getstate__(self) -> tuple[Tensor, dict[str, Any]]:
        buffer, views = pack(self)  # so that processes exchange one buffer instead of each tensor
        return buffer, vars(views)

    def __setstate__(self, state: tuple[Tensor, dict[str, Any]]) -> None:
        buffer, views = state
        vars(self).update(views)
        vars(self).update(vars(unpack(buffer, self)))
