"""Frozen models: the guide, which finds false negatives, and teachers, whose scores or vectors are distilled.

Shapes
    B   queries on this rank
    m   documents on this rank
    G   dimensions of a frozen model's vector
    R   queries of a direction, C its candidates (objective.py)
    r   rows of a block of the score matrix (R, C)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from datamodules.packed import ContrastiveBatch
from datamodules.records import UserError
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.pipeline import encode_on_device
from lightning_modules.losses import comparable
from lightning_modules.retrieval.vector_cache import fingerprint


@dataclass(frozen=True)
class FrozenVectors:
    """A frozen model's vectors for the texts of a batch. Their dot products are the model's scores."""

    queries: Tensor  # (B, G)
    documents: Tensor  # (m, G)


class FrozenEncoder:
    """An encoder that is not trained. It embeds the texts of each batch with its own tokenizer.

    It is not an nn.Module, so that its weights stay out of the trained module's parameters and checkpoints.
    """

    def __init__(self, encoder: Encoder, similarity: str = "cosine"):
        self.encoder, self.similarity = encoder.eval().requires_grad_(False), similarity

    def __deepcopy__(self, memo: dict) -> FrozenEncoder:
        return self  # so that averaging the module's weights does not copy the model

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the model, by which a resumed run notices that it was replaced."""
        return fingerprint(self.encoder)

    @property
    def dimension(self) -> int:
        """Size of the vectors, G."""
        return self.encoder.dimension

    def embed(self, batch: ContrastiveBatch) -> FrozenVectors:
        if not batch.texts:
            raise UserError("the batch has no texts, which a guide or teacher needs: set BatchOptions.carry_texts")
        device = batch.queries.device
        if self.encoder.device != device:
            self.encoder.to(device)
        query_task, document_task = batch.task, self.encoder.document_task(batch.task)
        vectors = encode_on_device(self.encoder, batch.texts, (query_task, document_task))
        queries, documents = vectors[query_task][batch.queries], vectors[document_task][batch.documents]
        return FrozenVectors(comparable(queries, self.similarity), comparable(documents, self.similarity))


@dataclass(frozen=True)
class FrozenScores:
    """Scores of a frozen model in one direction, computed block by block."""

    queries: Tensor  # (R, G)
    candidates: Tensor  # (C, G)

    def block(self, rows: slice) -> Tensor:
        return self.queries[rows] @ self.candidates.T  # (r, C)

    def of_columns(self, rows: slice, columns: Tensor) -> Tensor:
        """Return the scores of a few candidates per query. columns: (r, k)."""
        return torch.einsum("rg,rcg->rc", self.queries[rows], self.candidates[columns])  # (r, k)
