"""Mine hard negatives: rank a pool's documents for its training queries, filter the candidates, and sample from them.

`mine` handles one pool, and `Mining` all tasks of a training run.

Shapes: Q queries, M documents, k candidates per query, j negatives of all queries together.
"""

from __future__ import annotations

import dataclasses
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.progress_lines import ProgressLines
from datamodules.ragged import Ragged
from datamodules.records import MinedNegatives, MiningPool, UserError
from lightning_modules.distributed.collectives import gather_objects, rank, together, world_size
from lightning_modules.encoders.base import Encoder
from lightning_modules.mining import filters
from lightning_modules.mining.filters import Sieve, text_numbers
from lightning_modules.mining.mined import Mined, joined, joined_pools
from lightning_modules.mining.miners import DenseMiner, Miner, MiningContext
from lightning_modules.mining.mining_options import MiningOptions
from lightning_modules.mining.relabel import Judge, JudgeContext, relabel
from lightning_modules.retrieval.compute import describe_device
from lightning_modules.retrieval.search import Shards, pair_scores, row_scores
from lightning_modules.retrieval.vector_cache import VectorCache, fingerprint, vectors_of_pool

log = logging.getLogger(__name__)

BLOCK = 8192  # number of queries to rank at a time
SHARD = 16384  # maximum number of texts per file of cached vectors


def mine(
    encoder: Encoder | None,
    pool: MiningPool,
    miner: Miner | None = None,
    options: MiningOptions | None = None,
    *,
    similarity: str | None = None,
    vectors: VectorCache | None = None,
    document_vectors: VectorCache | None = None,
    guide: VectorCache | None = None,
    pools: Sequence[MiningPool] = (),
    seeds: Sequence[int] = (0,),
    prepared: dict[str, Any] | None = None,
) -> Mined:
    """Return the hard negatives of all queries of a pool. Ranks share the work, and each gets the whole result.

    encoder: encoder that scores the candidates; optional without margins if the miner needs no vectors.
    miner: miner that proposes the candidates, by default DenseMiner.
    similarity: "dot" or "cosine"; by default, the similarity that the encoder was trained with, or dot if unknown.
    vectors: cache of the encoder's vectors, by default in memory.
    document_vectors: cache of another model's document vectors, for an encoder trained to encode only queries; by
        default `vectors`.
    guide: cache of a guide model's vectors, for options.guide_margin.
    pools: pools of all tasks, for miners that use other tasks.
    seeds: sampling seeds.
    prepared: cache of data that is computed once per pool, such as an index. Pass the same dict to each call.
    Raises UserError if the options do not fit the pool, or the encoder is missing.
    """
    miner, options = miner or DenseMiner(), options or MiningOptions()
    prepared = {} if prepared is None else prepared
    _check_pool(pool, options)
    context = MiningContext(pools=pools, memory=options.memory_mb << 20, backend=options.backend, prepared=prepared)
    if miner.needs_vectors or options.has_margin:
        if encoder is None:
            reason = type(miner).__name__ if miner.needs_vectors else "a margin"
            raise UserError(
                f"{reason} needs an encoder; provide one, or choose a miner without an encoder and set relative_margin "
                "and absolute_margin to null"
            )
        similarity = similarity or encoder.similarity or "dot"
        cache = vectors or VectorCache(encoder, similarity=similarity)
        queries, documents = vectors_of_pool(cache, pool, document_vectors)
        context = dataclasses.replace(context, queries=queries, documents=documents, device=encoder.device)
    if "texts" not in prepared:
        prepared["texts"] = text_numbers(pool.corpus, pool.queries)
    block_miner = _BlockMiner(pool, miner, options, context, vectors_of_pool(guide, pool) if guide else None, seeds)
    blocks = [range(first, min(first + BLOCK, len(pool.queries))) for first in range(0, len(pool.queries), BLOCK)]
    progress = ProgressLines(f"mining {pool.name}", "queries", len(pool.queries) // world_size())

    def mine_share() -> Iterator[tuple[int, Mined]]:
        for block in blocks[rank() :: world_size()]:
            yield block.start, block_miner.mine(block)
            progress.advance(len(block))

    by_start = dict(chain.from_iterable(gather_objects(together(lambda: list(mine_share())))))
    return joined([by_start[block.start] for block in blocks])


def _check_pool(pool: MiningPool, options: MiningOptions) -> None:
    """Raise UserError if nothing can be mined from a pool. Log a warning if all documents are candidates."""
    for name, texts in (("documents", pool.corpus), ("queries", pool.queries)):
        if not len(texts):
            raise UserError(f"{pool.name}: nothing to mine, because it has no {name}")
    if options.first_rank >= len(pool.corpus):
        raise UserError(
            f"first_rank: expected a rank below the number of documents of {pool.name}, {len(pool.corpus)}, got "
            f"{options.first_rank}"
        )
    if options.k > len(pool.corpus):
        log.warning("%s has %d documents, fewer than k, so all of them are candidates", pool.name, len(pool.corpus))


class Mining:
    """Mine hard negatives for all tasks of a training run.

    miners: task -> miner. Tasks without a miner are not mined.
    folder: folder of cached vectors.
    similarity: similarity that the encoder is trained with.
    token_budget: maximum number of tokens per forward pass.
    seed: sampling seed.
    guide: guide model.
    device: device of the guide model if mining runs without an encoder.
    judges: task -> judge of its mined negatives.
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
        device: torch.device | str = "cpu",
        judges: Mapping[str, Judge] | None = None,
    ):
        self.judges = dict(judges or {})
        self.options, self.miners, self.folder = options, dict(miners), Path(folder)
        self.similarity, self.token_budget, self.seed, self.guide = similarity, token_budget, seed, guide
        self.device = device
        self._prepared: dict[tuple[str, str], dict[str, Any]] = {}

    @property
    def description(self) -> dict[str, Any]:
        """All settings that affect which negatives are mined, in plain containers."""
        names = (f.name for f in dataclasses.fields(MiningOptions) if f.name not in ("memory_mb", "backend"))
        options = {name: getattr(self.options, name) for name in names}
        miners = {task: miner.description for task, miner in self.miners.items()}
        settings = {"miners": miners, "options": options, "seed": self.seed, "similarity": self.similarity}
        return settings | ({"guide": fingerprint(self.guide)} if self.guide else {})

    @property
    def judging(self) -> dict[str, Any]:
        """Description of the judges, for the meta of a store. Without judges it is None, to match older stores."""
        return {"judges": {task: judge.description for task, judge in self.judges.items()} or None}

    @property
    def needs_encoder(self) -> bool:
        """Whether a miner or a margin needs an encoder."""
        return self.options.has_margin or any(miner.needs_vectors for miner in self.miners.values())

    def cache(self, encoder: Encoder) -> VectorCache:
        """Return a cache for an encoder's vectors."""
        return VectorCache(
            encoder, self.folder, similarity=self.similarity, token_budget=self.token_budget, shard_size=SHARD
        )

    def run(
        self,
        vectors: VectorCache | None,
        pools: Sequence[MiningPool],
        step: int = 0,
        document_vectors: VectorCache | None = None,
    ) -> dict[str, Mined]:
        """Mine for each task that has a miner. All ranks call this together.

        vectors: cache of the encoder's vectors; None if nothing needs an encoder.
        pools: pools of all tasks.
        step: optimizer step, used as an additional sampling seed.
        document_vectors: as in mine().
        """
        self.check_judges(pools)
        guide, device = None, vectors.encoder.device if vectors else self.device
        log.info("mining on %s", describe_device(device))
        if self.guide is not None:
            self.guide.to(device)
            guide = VectorCache(self.guide, self.folder / "guide", similarity="cosine", shard_size=SHARD)
        mined: dict[str, list[Mined]] = {}
        for pool in pools:
            if pool.task in self.miners:
                result = mine(
                    vectors.encoder if vectors else None,
                    pool,
                    self.miners[pool.task],
                    self.options,
                    vectors=vectors,
                    document_vectors=document_vectors,
                    guide=guide,
                    pools=pools,
                    seeds=(self.seed, step),
                    prepared=self._prepared.setdefault((pool.task, pool.name), {}),
                )
                mined.setdefault(pool.task, []).append(result)
        return self.relabelled({task: joined_pools(results) for task, results in mined.items()}, pools)

    def check_judges(self, pools: Sequence[MiningPool]) -> None:
        """Raise UserError if a judge does not fit the pools."""
        for judge in set(self.judges.values()):
            judge.check(pools)

    def relabelled(self, tasks: Mapping[str, Mined], pools: Sequence[MiningPool]) -> dict[str, Mined]:
        """Let the judges decide on mined negatives. All ranks call this together."""
        results, context = dict(tasks), JudgeContext(pools, self.folder, self.device)
        for task, judge in self.judges.items():
            if task in tasks and len(tasks[task].negatives.documents):
                negatives, relabelled = relabel(tasks[task].negatives, judge, task, context)
                results[task] = dataclasses.replace(tasks[task], negatives=negatives, relabelled=relabelled)
        return results


def without_negatives(mined: Mapping[str, Mined]) -> Iterator[str]:
    """Yield a message for each task without remaining hard negatives."""
    for task, result in mined.items():
        if len(result.kept().negatives.documents):
            continue
        if result.relabelled:
            yield f"{task}: the judge leaves no negatives; raise drop_above and positive_above"
            continue
        counts = ", ".join(f"{name} {count}" for name, count in result.negatives.removed.items() if count)
        yield (
            f"{task}: no hard negatives are left. Candidates removed by each filter: "
            f"{counts or 'none, because there were no candidates'}. Raise k for more candidates, or lower "
            "relative_margin or first_rank"
        )


@dataclass
class _BlockMiner:
    """Mines blocks of a pool's queries. guide: the guide model's vectors of queries and documents."""

    pool: MiningPool
    miner: Miner
    options: MiningOptions
    context: MiningContext
    guide: tuple[Shards, Shards] | None
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        self.document_texts, self.query_texts = self.context.prepared["texts"]
        self.first_of_text = filters.first_of_text(self.document_texts)

    def mine(self, block: range) -> Mined:
        pool, options = self.pool, self.options
        queries = slice(block.start, block.stop)
        rows, scores = self.miner.rank(pool, block, options.k, self.context)
        positives = pool.positives.take(np.array(block))
        sieve = Sieve(rows)
        sieve.apply("known positives", filters.not_known_positive(rows, positives, pool.document_of_query[queries]))
        sieve.apply("not trained on", ~np.isin(rows, pool.excluded))
        if options.same_text:
            sieve.apply("copies", self.first_of_text[rows])
            different = filters.different_text(rows, positives, self.document_texts, self.query_texts[queries])
            sieve.apply("same text", different)
        candidates = sieve.kept
        sieve.apply("first ranks", filters.from_rank(rows, options.first_rank))
        margins = self._apply_margins(sieve, block, rows, scores, positives)
        if self.guide is not None:
            positive, guide_scores = self._compare(self.guide, block, rows, positives)
            sieve.apply("guide", filters.absolute_margin(guide_scores, positive, options.guide_margin))
        seeds = [*self.seeds, zlib.crc32(f"{pool.task}/{pool.name}".encode()), block.start]
        chosen = filters.sample(
            scores, sieve.kept, options.num_negatives, options.sampling, seeds, options.sampling_temperature
        )
        negatives = MinedNegatives(
            np.concatenate([[0], np.cumsum(chosen.sum(axis=1))]).astype(np.int64),
            (rows[chosen] + pool.first_row).astype(np.int32),
            np.nonzero(chosen)[1].astype(np.int32),
            scores[chosen].astype(np.float32),
            sieve.removed,
        )
        return Mined(
            negatives,
            margins[chosen].astype(np.float32),
            filters.contained(rows, pool.held_out_positives.take(np.array(block)))[chosen],
            self.document_texts[rows[chosen]],
            num_candidates=int(candidates.sum()),
            num_above=int((candidates & (margins < 0)).sum()),
        )

    def _apply_margins(
        self, sieve: Sieve, block: range, rows: np.ndarray, scores: np.ndarray, positives: Ragged
    ) -> np.ndarray:
        """Apply the margins to the encoder's scores, and return the score differences to the positives (Q, k)."""
        if self.context.queries is None or self.context.documents is None:
            return np.full(rows.shape, np.nan)
        vectors = (self.context.queries, self.context.documents)
        positive, scores = self._compare(vectors, block, rows, positives, scores if self.miner.needs_vectors else None)
        if self.options.relative_margin is not None:
            keeps = filters.relative_margin(scores, positive, self.options.relative_margin)
            sieve.apply("relative margin", keeps)
        if self.options.absolute_margin is not None:
            keeps = filters.absolute_margin(scores, positive, self.options.absolute_margin)
            sieve.apply("absolute margin", keeps)
        return positive[:, None] - scores

    def _compare(
        self,
        vectors: tuple[Shards, Shards],
        block: range,
        rows: np.ndarray,
        positives: Ragged,
        scores: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores of each query's positive (Q,) and candidates (Q, k).

        vectors: vectors of queries and documents. scores: scores of the candidates, if already known.
        """
        queries, documents = vectors
        query_rows = positives.owners + block.start
        positive_scores = row_scores(queries, documents, query_rows, positives.values, self.context.memory)
        positive = filters.positive_score(positive_scores, positives, self.options.positive)
        if scores is None:
            block_queries = queries.gather(np.arange(block.start, block.stop))
            scores = pair_scores(block_queries, documents, rows, self.context.memory)
        return positive, scores
