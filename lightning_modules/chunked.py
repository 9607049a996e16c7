"""Vectors of a batch's texts, chunk by chunk: with all chunks' graphs in memory, or with one at a time.

GradCache (Gao et al., 2021, section 3): an in-batch loss needs all vectors at once, but not all graphs. The chunks are
embedded without graph; the loss on their vectors gives the gradient of each vector; then each chunk is embedded again,
with graph, and its gradient carried to the parameters. Memory is that of one chunk, whatever the size of the batch.

Here it is one differentiable function of the encoder's parameters. So the objective, learned temperatures,
accumulation, clipping and ranks (DDP sees every parameter's gradient once, after the last chunk) need not know of it.

A sharded encoder (sharding.py) is called equally often on all ranks, and exchanges gradients after each chunk: whole
ones of all layers never stand in memory.

Shapes: U texts, D dimensions, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from datamodules.records import ContrastiveBatch
from lightning_modules.distributed.collectives import largest
from lightning_modules.encoders.base import Encoder


def num_forwards(encoder: Encoder, batch: ContrastiveBatch) -> int:
    """Of a batch: one for each chunk; of a sharded encoder as many as the rank has that has most chunks."""
    chunks = len(batch.chunks)
    return largest(chunks, encoder.device) if encoder.sharded else chunks


def embed_chunk(encoder: Encoder, batch: ContrastiveBatch, index: int) -> tuple[Tensor, Tensor]:
    """Vectors (u, D) of a chunk's texts, and their part of the encoder's mean penalty, a scalar.

    Dropout depends on the batch's seed and the chunk alone: a resumed run draws what the uninterrupted one would have
    drawn, and a chunk that is embedded again what it drew before.
    """
    torch.manual_seed(batch.seed + index)
    if index >= len(batch.chunks):
        return _embed_idly(encoder, batch)
    chunk = batch.chunks[index]
    vectors, penalty = encoder.forward_with_penalty(chunk.input_ids, chunk.attention_mask, batch.task)
    return vectors, penalty * (len(chunk) / sum(len(other) for other in batch.chunks))


def _embed_idly(encoder: Encoder, batch: ContrastiveBatch) -> tuple[Tensor, Tensor]:
    """No vectors (0, D), and no penalty, from a text whose layers are computed because other ranks compute them."""
    text = batch.chunks[0]
    vectors, penalty = encoder.forward_with_penalty(text.input_ids[:1], text.attention_mask[:1], batch.task)
    return vectors[:0], 0.0 * penalty


def embed(encoder: Encoder, batch: ContrastiveBatch) -> tuple[Tensor, Tensor]:
    """Vectors (U, D) of a batch's texts, in the order of its chunks, and the encoder's mean penalty."""
    return _embed(encoder, batch, num_forwards(encoder, batch))


def _embed(encoder: Encoder, batch: ContrastiveBatch, forwards: int) -> tuple[Tensor, Tensor]:
    found = [embed_chunk(encoder, batch, index) for index in range(forwards)]
    return torch.cat([vectors for vectors, _ in found]), sum(penalty for _, penalty in found)


def embed_cached(encoder: Encoder, batch: ContrastiveBatch) -> tuple[Tensor, Tensor]:
    """As embed, with the graph of one chunk in memory at a time; costs a second forward."""
    forwards = num_forwards(encoder, batch)
    if not torch.is_grad_enabled() or forwards == 1:
        return _embed(encoder, batch, forwards)
    if encoder.sharded:
        leaf = torch.zeros((), device=encoder.device, requires_grad=True)  # so that there is a backward pass
        return _CachedSharded.apply(encoder, batch, forwards, leaf)
    return _Cached.apply(encoder, batch, forwards, *_trained(encoder))


def _trained(encoder: Encoder) -> list[Tensor]:
    return [parameter for parameter in encoder.parameters() if parameter.requires_grad]


class _Cached(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, encoder: Encoder, batch: ContrastiveBatch, forwards: int, *_: Tensor
    ) -> tuple[Tensor, Tensor]:
        kind = encoder.device.type
        ctx.encoder, ctx.batch, ctx.forwards = encoder, batch, forwards
        ctx.autocast = {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
        }
        return _embed(encoder, batch, forwards)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_vectors: Tensor, of_penalty: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all parameters; None for those that no text met, such as the experts of other tasks."""
        trained = _trained(ctx.encoder)
        total: list[Tensor | None] = [None] * len(trained)
        for ours, theirs in _chunks(ctx, of_vectors, of_penalty):
            for place, gradient in enumerate(torch.autograd.grad(ours, trained, theirs, allow_unused=True)):
                if gradient is not None:
                    if total[place] is None:
                        total[place] = torch.zeros_like(gradient)
                    total[place] += gradient  # in place: new memory for each sum leaves gaps among what chunks free
        return None, None, None, *total


class _CachedSharded(_Cached):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_vectors: Tensor, of_penalty: Tensor) -> tuple[None, ...]:
        """Adds to the parameters' gradients itself, because they are exchanged as each chunk's backward pass ends."""
        for ours, theirs in _chunks(ctx, of_vectors, of_penalty):
            torch.autograd.backward(ours, theirs)
        return None, None, None, None


def _chunks(ctx: Any, of_vectors: Tensor, of_penalty: Tensor) -> Iterator[tuple[tuple[Tensor, ...], ...]]:
    """Of each chunk, embedded with graph: its vectors (u, D) and its penalty, and the gradients of both.

    The last chunk first, as autograd goes through the plain graph: then even the last bits of the sums agree.
    """
    sizes = [len(chunk) for chunk in ctx.batch.chunks] + [0] * (ctx.forwards - len(ctx.batch.chunks))
    for index, part in reversed(list(enumerate(of_vectors.split(sizes)))):
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            outputs = zip(embed_chunk(ctx.encoder, ctx.batch, index), (part, of_penalty), strict=True)
        yield tuple(zip(*(pair for pair in outputs if pair[0].requires_grad), strict=True))  # most have no penalty
