"""A trained encoder that judges the batch of another: a guide or a teacher."""

from __future__ import annotations

from torch import Tensor

from datamodules.records import ContrastiveBatch
from lightning_modules.encoders.base import Encoder
from lightning_modules.losses import comparable


class FrozenEncoder:
    """Encodes the texts of batches, in eval mode and without gradient.

    No nn.Module: its weights stay out of the trained one's parameters and checkpoints. similarity: of its vectors.
    """

    def __init__(self, encoder: Encoder, similarity: str = "cosine"):
        self.encoder, self.similarity = encoder.eval().requires_grad_(False), similarity

    def vectors(self, batch: ContrastiveBatch) -> tuple[Tensor, Tensor]:
        """Of a batch's queries (B, D) and documents (m, D); their dot product is the similarity."""
        assert batch.texts, "the batch carries no texts: set BatchOptions.carry_texts"
        device = batch.queries.device
        if self.encoder.device != device:
            self.encoder.to(device)
        other = self.encoder.document_task(batch.task)
        found = self.encoder.encode(batch.texts, tasks=(batch.task, other))
        # Copies: tensors made in inference mode cannot be kept for a backward pass.
        parts = ((found[batch.task], batch.queries), (found[other], batch.documents))
        queries, documents = (comparable(x.clone().to(device)[rows], self.similarity) for x, rows in parts)
        return queries, documents
