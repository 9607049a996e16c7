"""Mining of all tasks by one model: embed, rank, filter, sample."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.records import MiningPool, UserError
from lightning_modules.encoders.base import Encoder
from lightning_modules.mining.miners import Miner, MiningContext
from lightning_modules.mining.mine import MiningOptions
from lightning_modules.mining.mine import Mined, joined_pools, mine_pool
from lightning_modules.retrieval.shards import Shards
from lightning_modules.retrieval.vector_cache import VectorCache
from lightning_modules.mining.mine import text_numbers

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
