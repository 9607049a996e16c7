"""Mining one pool: candidates of a miner, filtered and sampled, block by block of its queries.

Shapes: Q queries of a block, k candidates of each, j negatives of all queries.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch.distributed as dist

from datamodules.records import MinedNegatives, MiningPool
from lightning_modules.distributed.collectives import rank, together, world_size
from lightning_modules.mining.filters import (
    Lists,
    Sieve,
    absolute_margin,
    originals,
    other_text,
    owners,
    positive_score,
    rank_window,
    relative_margin,
    sample,
    unknown,
)
from lightning_modules.mining.miners import Miner, MiningContext
from lightning_modules.mining.mine import MiningOptions
from lightning_modules.retrieval.shards import Shards
from lightning_modules.retrieval.top_k import pair_scores

BLOCK = 8192  # queries at once


@dataclass(frozen=True)
class Mined:
    """What was mined from a pool, or of a task from its pools one after the other.

    margins: (j,) score of the positive minus the negative's, NaN where no model scored them. revealed: (j,) bool, other
    splits judge it relevant. texts: (j,) numbers of its text. candidates: how many had no known positive's id or text;
    above: those of them that score above the positive.
    """

    negatives: MinedNegatives
    margins: np.ndarray
    revealed: np.ndarray
    texts: np.ndarray
    candidates: int
    above: int


@dataclass
class Block:
    """What one block of queries gives. counts: (Q,); the other arrays: (j,)."""

    first: int
    counts: np.ndarray
    rows: np.ndarray
    ranks: np.ndarray
    scores: np.ndarray
    margins: np.ndarray
    candidates: int
    above: int
    taken: dict[str, int] = field(default_factory=dict)


def mine_pool(
    pool: MiningPool,
    miner: Miner,
    options: MiningOptions,
    context: MiningContext,
    texts: tuple[np.ndarray, np.ndarray],
    guide: tuple[Shards, Shards] | None = None,
    seeds: Sequence[int] = (0,),
) -> Mined:
    """Hard negatives of all queries of a pool; ranks share the queries, and all have the result.

    texts: numbers of the texts of documents and queries (vectors.text_numbers). guide: the guide model's vectors of
    queries and documents. seeds: of the sampling.
    """
    parts = [range(first, min(first + BLOCK, len(pool.queries))) for first in range(0, len(pool.queries), BLOCK)]
    original = originals(texts[0])
    blocks = together(
        lambda: [
            _mine_block(pool, part, miner, options, context, texts, original, guide, seeds)
            for part in parts[rank() :: world_size()]
        ]
    )
    if world_size() > 1:
        shares: list[list[Block]] = [blocks] * world_size()
        dist.all_gather_object(shares, blocks)
        blocks = sorted((block for share in shares for block in share), key=lambda block: block.first)
    return _joined(pool, blocks, texts[0])


def part_of(lists: Lists, part: range) -> Lists:
    """The lists of the queries in part."""
    starts = lists[0][part.start : part.stop + 1]
    return starts - starts[0], lists[1][starts[0] : starts[-1]]


def scores_with_positives(vectors: tuple[Shards, Shards], part: range, positives: Lists) -> np.ndarray:
    """Scores (P,) of the queries in part with each of their positives."""
    queries = vectors[0].gather(owners(positives) + part.start).astype(np.float64)
    return np.einsum("pd,pd->p", queries, vectors[1].gather(positives[1]).astype(np.float64))


def _mine_block(
    pool: MiningPool,
    part: range,
    miner: Miner,
    options: MiningOptions,
    context: MiningContext,
    texts: tuple[np.ndarray, np.ndarray],
    original: np.ndarray,
    guide: tuple[Shards, Shards] | None,
    seeds: Sequence[int],
) -> Block:
    rows, scores = miner.rank(pool, part, options.k, context)
    inside = slice(part.start, part.stop)
    positives = part_of(pool.positives, part)
    sieve = Sieve(rows)
    sieve.apply("known positives", unknown(rows, positives, pool.own[inside]))
    sieve.apply("not trained on", ~np.isin(rows, pool.excluded))
    if options.same_text:
        sieve.apply("copies", original[rows])
        sieve.apply("same text", other_text(rows, positives, texts[0], texts[1][inside]))
    eligible, above, margins = sieve.kept, 0, np.full(rows.shape, np.nan)
    sieve.apply("first ranks", rank_window(rows, options.first_rank))
    if context.queries is not None:
        vectors = (context.queries, context.documents)
        found = scores if miner.needs_vectors else _pairs(vectors, part, rows, context.memory)
        positive = positive_score(scores_with_positives(vectors, part, positives), positives, options.positive)
        margins = positive[:, None] - found
        above = int((eligible & (margins < 0)).sum())
        if options.relative_margin is not None:
            sieve.apply("relative margin", relative_margin(found, positive, options.relative_margin))
        if options.absolute_margin is not None:
            sieve.apply("absolute margin", absolute_margin(found, positive, options.absolute_margin))
    if guide is not None:
        positive = positive_score(scores_with_positives(guide, part, positives), positives, options.positive)
        found = _pairs(guide, part, rows, context.memory)
        sieve.apply("guide", absolute_margin(found, positive, options.guide_margin))
    seeds = [*seeds, zlib.crc32(f"{pool.task}/{pool.name}".encode()), part.start]
    chosen = sample(scores, sieve.kept, options.num_negatives, options.sampling, seeds, options.sampling_temperature)
    return Block(
        part.start,
        chosen.sum(axis=1),
        rows[chosen],
        np.nonzero(chosen)[1],
        scores[chosen],
        margins[chosen],
        int(eligible.sum()),
        above,
        sieve.taken,
    )


def _pairs(vectors: tuple[Shards, Shards], part: range, rows: np.ndarray, memory: int) -> np.ndarray:
    queries = vectors[0].gather(np.arange(part.start, part.stop))
    return pair_scores(queries, vectors[1], rows, memory)


def _joined(pool: MiningPool, blocks: Sequence[Block], text_of_document: np.ndarray) -> Mined:
    starts = np.zeros(len(pool.queries) + 1, dtype=np.int64)
    np.cumsum(np.concatenate([block.counts for block in blocks]), out=starts[1:])
    rows = np.concatenate([block.rows for block in blocks])
    query = owners((starts, rows))
    taken: Counter[str] = Counter()
    for block in blocks:
        taken.update(block.taken)
    negatives = MinedNegatives(
        starts,
        (rows + pool.first_row).astype(np.int32),
        np.concatenate([block.ranks for block in blocks]).astype(np.int32),
        np.concatenate([block.scores for block in blocks]).astype(np.float32),
        dict(taken),
    )
    span = len(pool.corpus) + 1
    keys = owners(pool.revealed) * span + pool.revealed[1]
    return Mined(
        negatives,
        np.concatenate([block.margins for block in blocks]).astype(np.float32),
        np.isin(query * span + rows, keys),
        text_of_document[rows],
        sum(block.candidates for block in blocks),
        sum(block.above for block in blocks),
    )


def joined_pools(parts: Sequence[Mined]) -> Mined:
    """What was mined from a task's pools, in the order of their examples."""
    starts, total, taken = [np.zeros(1, dtype=np.int64)], 0, Counter()
    for part in parts:
        starts.append(part.negatives.starts[1:] + total)
        total += len(part.negatives.documents)
        taken.update(part.negatives.taken)

    def all_of(name: str) -> np.ndarray:
        return np.concatenate([getattr(part.negatives, name) for part in parts])

    offsets = np.cumsum([0, *(part.texts.max(initial=-1) + 1 for part in parts)])
    return Mined(
        MinedNegatives(np.concatenate(starts), all_of("documents"), all_of("ranks"), all_of("scores"), dict(taken)),
        np.concatenate([part.margins for part in parts]),
        np.concatenate([part.revealed for part in parts]),
        np.concatenate([part.texts + offset for part, offset in zip(parts, offsets, strict=False)]),
        sum(part.candidates for part in parts),
        sum(part.above for part in parts),
    )
