"""Vectors of a batch's texts, chunk by chunk: with all chunks' graphs in memory, or with one at a time.

GradCache (Gao et al., 2021, section 3): an in-batch loss needs all vectors at once, but not all graphs. The chunks are
embedded without graph; the loss on their vectors gives the gradient of each vector; then each chunk is embedded again,
with graph, and its gradient carried to the parameters. Memory is that of one chunk, whatever the size of the batch.

Here it is one differentiable function of the encoder's parameters. So the objective, learned temperatures,
accumulation, clipping and ranks (DDP sees every parameter's gradient once, after the last chunk) need not know of it.

Shapes: U texts, D dimensions, P parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from datamodules.records import ContrastiveBatch
from lightning_modules.encoders.base import Encoder


def embed_chunk(encoder: Encoder, batch: ContrastiveBatch, index: int) -> tuple[Tensor, Tensor]:
    """Vectors (u, D) of a chunk's texts, and their part of the encoder's mean penalty, a scalar.

    Dropout depends on the batch's seed and the chunk alone: a resumed run draws what the uninterrupted one would have
    drawn, and a chunk that is embedded again what it drew before.
    """
    torch.manual_seed(batch.seed + index)
    chunk = batch.chunks[index]
    vectors, penalty = encoder.forward_with_penalty(chunk.input_ids, chunk.attention_mask, batch.task)
    return vectors, penalty * (len(chunk) / sum(len(other) for other in batch.chunks))


def embed(encoder: Encoder, batch: ContrastiveBatch) -> tuple[Tensor, Tensor]:
    """Vectors (U, D) of a batch's texts, in the order of its chunks, and the encoder's mean penalty."""
    found = [embed_chunk(encoder, batch, index) for index in range(len(batch.chunks))]
    return torch.cat([vectors for vectors, _ in found]), sum(penalty for _, penalty in found)


def embed_cached(encoder: Encoder, batch: ContrastiveBatch) -> tuple[Tensor, Tensor]:
    """As embed, with the graph of one chunk in memory at a time; costs a second forward."""
    if not torch.is_grad_enabled() or len(batch.chunks) == 1:
        return embed(encoder, batch)
    return _Cached.apply(encoder, batch, *_trained(encoder))


def _trained(encoder: Encoder) -> list[Tensor]:
    return [parameter for parameter in encoder.parameters() if parameter.requires_grad]


class _Cached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, encoder: Encoder, batch: ContrastiveBatch, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        kind = encoder.device.type
        ctx.encoder, ctx.batch = encoder, batch
        ctx.autocast = {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
        }
        return embed(encoder, batch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_vectors: Tensor, of_penalty: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all parameters; None for those that no text met, such as the experts of other tasks."""
        sizes = [len(chunk) for chunk in ctx.batch.chunks]
        total: list[Tensor | None] = [None] * len(_trained(ctx.encoder))
        # The last chunk first, as autograd goes through the plain graph: then even the last bits of the sums agree.
        for index, part in reversed(list(enumerate(of_vectors.split(sizes)))):
            _add_chunk(total, ctx, index, part, of_penalty)
        return None, None, *total


def _add_chunk(total: list[Tensor | None], ctx: Any, index: int, of_vectors: Tensor, of_penalty: Tensor) -> None:
    """Add the parameters' gradients through one chunk, from those of its vectors (u, D) and of the penalty."""
    with torch.enable_grad(), torch.autocast(**ctx.autocast):
        outputs = zip(embed_chunk(ctx.encoder, ctx.batch, index), (of_vectors, of_penalty), strict=True)
    ours, theirs = zip(*(pair for pair in outputs if pair[0].requires_grad), strict=True)  # most have no penalty
    gradients = torch.autograd.grad(ours, _trained(ctx.encoder), theirs, allow_unused=True)
    for place, gradient in enumerate(gradients):
        if gradient is not None:
            if total[place] is None:
                total[place] = torch.zeros_like(gradient)
            total[place] += gradient  # in place: new memory for each sum leaves gaps among what chunks free
