"""Train on large batches in little memory: embed texts chunk by chunk, and compare them block by block.

GradCache (Gao et al., arXiv 2101.06983, section 3). An in-batch loss needs the vectors of all texts at once, but not
their graphs. First, all chunks are embedded without a graph, and the loss gives the gradient of each vector. Then each
chunk is embedded again, with a graph, and its gradients are propagated to the parameters. So only the graph of one
chunk is in memory, no matter how large the batch is. All of this is one differentiable function of the encoder's
parameters, so learned temperatures, gradient accumulation, clipping and DDP (which sees each gradient once) work
unchanged.

Blocks of scores. The score matrix is computed a few rows at a time. The gradients of a block are computed while its
scores are in memory, so nothing is computed twice (as in Liger's fused losses, arXiv 2410.10989).

Shapes: U texts of a batch, u of a chunk, D dimensions of a vector, R queries, r of a block, C candidates of each query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from datamodules.packed import Companion, ContrastiveBatch, Tokens
from lightning_modules.distributed.collectives import largest
from lightning_modules.encoders.base import Encoder

# Measured number of matrices of the scores' size in memory at once (scores, softmax, masks, gradients).
MATRICES_PER_BLOCK = 4


Batch = ContrastiveBatch | Companion


class Embedded(NamedTuple):
    """Vectors of texts, (u, D), and their share of the encoder's mean penalty, a scalar."""

    vectors: Tensor
    penalty: Tensor


def embed(encoder: Encoder, batch: Batch) -> Embedded:
    """Embed the texts of a batch, with the graphs of all chunks in memory."""
    return _embed_chunks(encoder, batch, num_forwards(encoder, batch))


def embed_cached(encoder: Encoder, batch: Batch) -> Embedded:
    """Embed the texts of a batch with GradCache: one graph in memory at a time, for a second forward pass."""
    forwards = num_forwards(encoder, batch)
    if not torch.is_grad_enabled() or forwards == 1:
        return _embed_chunks(encoder, batch, forwards)
    if encoder.sharded:
        leaf = torch.zeros((), device=encoder.device, requires_grad=True)  # makes autograd call backward
        return Embedded(*_ShardedGradCache.apply(encoder, batch, forwards, leaf))
    return Embedded(*_GradCache.apply(encoder, batch, forwards, *_trained_parameters(encoder)))


def num_forwards(encoder: Encoder, batch: Batch) -> int:
    """Return the number of forward passes for a batch: one per chunk.

    With a sharded encoder, ranks compute layers together, so all ranks make as many passes as the one with the most
    chunks.
    """
    chunks = len(batch.chunks)
    return largest(chunks) if encoder.sharded else chunks


def embed_chunk(encoder: Encoder, batch: Batch, index: int) -> Embedded:
    """Embed one chunk of a batch.

    Dropout depends only on the batch's seed and the index of the chunk. So it is the same when the chunk is embedded
    again, and in a resumed run.
    """
    _seed(encoder.device, batch.seed + index)
    if index >= len(batch.chunks):
        return _embed_nothing(encoder, batch)
    chunk = batch.chunks[index]
    vectors, penalty = encoder.forward_with_penalty(chunk, batch.task)
    return Embedded(vectors, penalty * (len(chunk) / sum(len(other) for other in batch.chunks)))


def _seed(device: torch.device, seed: int) -> None:
    """Seed the generators of the CPU and of the device.

    torch.manual_seed also seeds generators of absent devices, which takes 0.5 ms.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


def _embed_nothing(encoder: Encoder, batch: Batch) -> Embedded:
    """Take part in the other ranks' forward pass. Return no vectors, (0, D), and a penalty of 0."""
    chunk = batch.chunks[0]
    first_text = Tokens(chunk.input_ids[: chunk.lengths[0]], chunk.offsets[:2], chunk.lengths[:1], chunk.keys[:1])
    vectors, penalty = encoder.forward_with_penalty(first_text, batch.task)
    return Embedded(vectors[:0], 0.0 * penalty)


def _embed_chunks(encoder: Encoder, batch: Batch, forwards: int) -> Embedded:
    with encoder.casting():
        chunks = [embed_chunk(encoder, batch, index) for index in range(forwards)]
    penalty = reduce(torch.add, (chunk.penalty for chunk in chunks))
    return Embedded(torch.cat([chunk.vectors for chunk in chunks]), penalty)


def _trained_parameters(encoder: Encoder) -> list[Tensor]:
    return [parameter for parameter in encoder.parameters() if parameter.requires_grad]


class _GradCache(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, encoder: Encoder, batch: Batch, forwards: int, *_: Tensor) -> Embedded:
        device = encoder.device.type
        ctx.encoder, ctx.batch, ctx.forwards = encoder, batch, forwards
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        return _embed_chunks(encoder, batch, forwards)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, vector_gradients: Tensor, penalty_gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of each parameter, or None for parameters without one, such as experts of other tasks."""
        trained = _trained_parameters(ctx.encoder)
        totals: list[Tensor | None] = [None] * len(trained)
        for outputs, output_gradients in _chunks_with_graph(ctx, vector_gradients, penalty_gradient):
            gradients = torch.autograd.grad(outputs, trained, output_gradients, allow_unused=True)
            for i, gradient in enumerate(gradients):
                if gradient is None:
                    continue
                if (total := totals[i]) is None:
                    total = totals[i] = torch.zeros_like(gradient)
                total += gradient  # in place, because new tensors would fragment the memory that chunks free
        return None, None, None, *totals


class _ShardedGradCache(_GradCache):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, vector_gradients: Tensor, penalty_gradient: Tensor) -> tuple[None, ...]:
        """Accumulate gradients in the parameters. Ranks exchange them in each chunk's backward pass.

        So no rank ever has the full gradients of all layers in memory.
        """
        for outputs, output_gradients in _chunks_with_graph(ctx, vector_gradients, penalty_gradient):
            torch.autograd.backward(outputs, output_gradients)
        return None, None, None, None


def _chunks_with_graph(
    ctx: Any, vector_gradients: Tensor, penalty_gradient: Tensor
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Embed each chunk again, with a graph. Yield its outputs that require a gradient, and these gradients.

    The last chunk comes first, as it would in the backward pass of one graph. So sums of gradients agree bit for bit.
    """
    sizes = [len(chunk) for chunk in ctx.batch.chunks] + [0] * (ctx.forwards - len(ctx.batch.chunks))
    for index, gradients in reversed(list(enumerate(vector_gradients.split(sizes)))):
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            embedded = embed_chunk(ctx.encoder, ctx.batch, index)
        pairs = zip(embedded, (gradients, penalty_gradient), strict=True)
        outputs, gradients = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
        yield outputs, gradients  # the penalty of most encoders has no graph


class LossTerms(NamedTuple):
    """Sums over queries, scalars. Only the loss has a gradient; the other terms are logged."""

    loss: Tensor
    accuracy: Tensor
    contrastive: Tensor
    distillation: Tensor


# queries (r, D), candidates (C, D), temperature, rows of the block -> sums over the block
BlockLoss = Callable[..., LossTerms]


def rows_per_block(memory: float, candidates: Tensor, num_positives: int = 1) -> int:
    """Return the number of rows of the score matrix that fit into `memory` MiB, at least 1."""
    bytes_per_row = len(candidates) * candidates.element_size() * (MATRICES_PER_BLOCK + num_positives - 1)
    return max(1, int(memory * 2**20 / bytes_per_row))


def sum_over_blocks(
    block_loss: BlockLoss, block_size: int, queries: Tensor, candidates: Tensor, temperature: float | Tensor
) -> LossTerms:
    """Compute a loss for block_size queries at a time, and return its sums over all queries.

    The gradients for queries (R, D), candidates (C, D) and temperature are the same as with the whole matrix.
    """
    if len(queries) <= block_size:
        return block_loss(queries, candidates, temperature, slice(0, len(queries)))
    return LossTerms(*_SumOverBlocks.apply(block_loss, block_size, queries, candidates, temperature))


class _SumOverBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        block_loss: BlockLoss,
        block_size: int,
        queries: Tensor,
        candidates: Tensor,
        temperature: float | Tensor,
    ) -> LossTerms:
        needs_gradient = ctx.needs_input_grad[2:]
        inputs: tuple[Any, ...] = (queries, candidates, temperature)
        totals = [torch.zeros_like(x) if needed else None for x, needed in zip(inputs, needs_gradient, strict=True)]
        sums: LossTerms | None = None
        for start in range(0, len(queries), block_size):
            rows = slice(start, min(len(queries), start + block_size))
            block: tuple[Any, ...] = (queries[rows], candidates, temperature)
            leaves = [x.detach() if isinstance(x, Tensor) else x for x in block]
            trained = [leaf.requires_grad_() for leaf, needed in zip(leaves, needs_gradient, strict=True) if needed]
            with torch.set_grad_enabled(bool(trained)):
                terms = block_loss(*leaves, rows)
            if trained:
                query_total, *other_totals = totals
                targets = [query_total if query_total is None else query_total[rows], *other_totals]
                gradients = torch.autograd.grad(terms.loss, trained)
                for target, gradient in zip((t for t in targets if t is not None), gradients, strict=True):
                    target += gradient
            detached = [term.detach() for term in terms]
            sums = LossTerms(*(a + b for a, b in zip(sums, detached, strict=True)) if sums else detached)
        assert sums is not None  # the caller has at least two blocks
        ctx.save_for_backward(*totals)
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if total is None else loss_gradient * total for total in ctx.saved_tensors)
