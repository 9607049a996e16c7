"""Mining of all tasks by one model: embed, rank, filter, sample."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.distributed as dist

from datamodules.records import Document, MinedNegatives, MiningPool, UserError
from datamodules.text import input_text
from lightning_modules.distributed.collectives import rank, together, world_size
from lightning_modules.encoders.base import Encoder
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
from lightning_modules.retrieval.search import Shards, pair_scores
from lightning_modules.retrieval.vector_cache import VectorCache


@dataclass
class MiningOptions:
    """k: candidates of each query. num_negatives: that are kept of them, from which a step draws its own.

    Filters, in this order. Known positives and the query itself are no candidates, and with same_text nor is what reads
    as one of them. first_rank: the miner's nearest that are left out. relative_margin: only candidates that score below
    (1 - margin) of the query's positive; absolute_margin: below it by the margin; null for neither. positive: "mean",
    "lowest" or "highest" of the scores of the query's positives. guide: a model (folder, checkpoint, hub name) that
    must find a candidate worse than the positive by guide_margin, in cosine.

    sampling: of those that are left, the "top", "random" ones, or by "softmax" of their scores / sampling_temperature.
    memory_mb: for scores, beside the vectors. backend: of the exact search (top_k.py), which all find the same.
    """

    k: int = 100
    num_negatives: int = 8
    same_text: bool = True
    first_rank: int = 0
    relative_margin: float | None = 0.05
    absolute_margin: float | None = None
    positive: Literal["mean", "lowest", "highest"] = "mean"
    guide: str | None = None
    guide_margin: float = 0.0
    sampling: Literal["top", "random", "softmax"] = "top"
    sampling_temperature: float = 0.05
    memory_mb: int = 512
    backend: Literal["auto", "faiss", "torch"] = "auto"

    @property
    def compares(self) -> bool:
        """Whether candidates are compared with positives by the model."""
        return self.relative_margin is not None or self.absolute_margin is not None


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


log = logging.getLogger(__name__)


class Mining:
    """Mines the hard negatives of a training's tasks.

    miners: task -> its miner; others are not mined. folder: of cached vectors. guide: the model of options.guide.
    similarity, token_budget: as in training. seed: of what is sampled.
    """

    def __init__(
        self,
        options: MiningOptions,
        miners: Mapping[str, Miner],
        folder: Path,
        *,
        similarity: str = "dot",
        token_budget: int | None = None,
        seed: int = 0,
        guide: Encoder | None = None,
    ):
        self.options, self.miners, self.folder = options, dict(miners), Path(folder)
        self.similarity, self.token_budget, self.seed, self.guide = similarity, token_budget, seed, guide
        self._texts: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        self._kept: dict[tuple[str, str], dict[str, Any]] = {}

    @property
    def about(self) -> dict[str, Any]:
        """What decides, beside model and data, which negatives are mined; plain containers."""
        names = (f.name for f in dataclasses.fields(MiningOptions) if f.name not in ("memory_mb", "backend"))
        options = {name: getattr(self.options, name) for name in names}
        miners = {task: miner.about for task, miner in self.miners.items()}
        return {"miners": miners, "options": options, "seed": self.seed, "similarity": self.similarity}

    def cache(self, encoder: Encoder) -> VectorCache:
        return VectorCache(encoder, self.folder, similarity=self.similarity, token_budget=self.token_budget)

    def run(self, cache: VectorCache | None, pools: Sequence[MiningPool], step: int = 0) -> dict[str, Mined]:
        """Task -> what was mined, for all tasks with a miner. All ranks call it together.

        cache: of the model's vectors; none where nothing needs a model. Raises UserError for a task without negatives.
        """
        found: dict[str, list[Mined]] = {}
        for pool in pools:
            if pool.task in self.miners:
                found.setdefault(pool.task, []).append(self._mine(cache, pool, pools, step))
        mined = {task: joined_pools(parts) for task, parts in found.items()}
        for task, part in mined.items():
            if not len(part.negatives.documents):
                raise UserError(_nothing_left(task, part.negatives.taken))
        return mined

    def _mine(self, cache: VectorCache | None, pool: MiningPool, pools: Sequence[MiningPool], step: int) -> Mined:
        name, count = (pool.task, pool.name), len(pool.corpus)
        miner, options = self.miners[pool.task], self.options
        if options.first_rank >= count:
            raise UserError(
                f"mining.first_rank: ranks from {options.first_rank} on are asked for, and {pool.name} has {count} "
                "documents"
            )
        if options.k > count:
            log.warning("mining.k: %s has %d documents, so all of them are candidates", pool.name, count)
        if name not in self._texts:
            self._texts[name] = text_numbers(pool.corpus, pool.queries)
        context = MiningContext(
            pools=pools,
            memory=options.memory_mb << 20,
            backend=options.backend,
            kept=self._kept.setdefault(name, {}),
        )
        if miner.needs_vectors or options.compares:
            if cache is None:
                needs = type(miner).__name__ if miner.needs_vectors else "a margin"
                raise UserError(
                    f"{needs} needs a model: give model=, or take a miner that does without, and set "
                    "mining.relative_margin and mining.absolute_margin to null"
                )
            queries, documents = _vectors(cache, pool)
            context = dataclasses.replace(context, queries=queries, documents=documents, device=cache.encoder.device)
        guide = None
        if self.guide is not None:
            self.guide.to(cache.encoder.device if cache else "cpu")
            guide = _vectors(VectorCache(self.guide, self.folder / "guide", similarity="cosine"), pool)
        return mine_pool(pool, miner, options, context, self._texts[name], guide, (self.seed, step))


def _vectors(cache: VectorCache, pool: MiningPool) -> tuple[Shards, Shards]:
    """Of a pool's queries and documents."""
    documents = cache.vectors(pool.corpus, cache.encoder.document_task(pool.task), f"documents of {pool.name}")
    return cache.vectors(pool.queries, pool.task, f"queries of {pool.name}"), documents


def _nothing_left(task: str, taken: Mapping[str, int]) -> str:
    each = ", ".join(f"{name} {count}" for name, count in taken.items() if count) or "none, there were no candidates"
    return (
        f"{task}: no hard negative is left. The filters took: {each}. A larger mining.k gives more candidates; "
        "mining.relative_margin and mining.first_rank can be lowered"
    )


def text_numbers(corpus: Iterable[Document], queries: Iterable[Document]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the texts of M documents and Q queries: equal where the texts are, but for case and spaces."""

    def hashed(documents: Iterable[Document]) -> np.ndarray:
        texts = (" ".join(input_text(document, " ").lower().split()) for document in documents)
        return np.fromiter((int.from_bytes(_digest(text), "big", signed=True) for text in texts), dtype=np.int64)

    of_documents, of_queries = hashed(corpus), hashed(queries)
    numbers = np.unique(np.concatenate([of_documents, of_queries]), return_inverse=True)[1]
    return numbers[: len(of_documents)], numbers[len(of_documents) :]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
