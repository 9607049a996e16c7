"""The result of mining: hard negatives with statistics for the report, joined over query blocks and pools.

Shapes: j negatives of all queries together.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.records import KEEP, MinedNegatives, MiningPool
from lightning_modules.mining import filters
from lightning_modules.mining.relabel import Relabelled, pairs_of


@dataclass(frozen=True)
class Mined:
    """Hard negatives of some queries of a pool, or of all pools of a task, with statistics for the report.

    negatives: hard negatives of each query.
    margins: score of the positive minus the score of the negative, (j,); NaN without an encoder.
    held_out: whether a split other than train judges the negative relevant, (j,) bool.
    texts: text number of each negative, (j,); equal numbers mean equal texts.
    num_candidates: number of candidates before first_rank and the margins are applied.
    num_above: number of these candidates that score above the positive.
    relabelled: decisions of the judge, if there is one.
    """

    negatives: MinedNegatives
    margins: np.ndarray
    held_out: np.ndarray
    texts: np.ndarray
    num_candidates: int
    num_above: int
    relabelled: Relabelled | None = None

    def kept(self) -> Mined:
        """Return only the documents that the judge kept as negatives."""
        negatives = self.negatives
        if negatives.labels is None:
            return self
        kept = np.asarray(negatives.labels) == KEEP
        before = np.concatenate([[0], np.cumsum(kept)])
        arrays = {name: getattr(negatives, name)[kept] for name in ("documents", "ranks", "scores")}
        return dataclasses.replace(
            self,
            negatives=MinedNegatives(before[np.asarray(negatives.starts)], **arrays, removed=negatives.removed),
            margins=self.margins[kept],
            held_out=self.held_out[kept],
            texts=self.texts[kept],
        )


def joined_pools(pools: Sequence[Mined]) -> Mined:
    """Join the results of a task's pools."""
    offsets = np.cumsum([0, *(pool.texts.max(initial=-1) + 1 for pool in pools)])
    return joined(
        [dataclasses.replace(pool, texts=pool.texts + offset) for pool, offset in zip(pools, offsets, strict=False)]
    )


def joined(parts: Sequence[Mined]) -> Mined:
    """Join the results of consecutive blocks of queries, without changing text numbers."""
    starts, total, removed = [np.zeros(1, dtype=np.int64)], 0, Counter[str]()
    for part in parts:
        starts.append(part.negatives.starts[1:] + total)
        total += len(part.negatives.documents)
        removed.update(part.negatives.removed)
    arrays = {
        name: np.concatenate([getattr(part.negatives, name) for part in parts])
        for name in ("documents", "ranks", "scores")
    }
    return Mined(
        MinedNegatives(np.concatenate(starts), **arrays, removed=dict(removed)),
        np.concatenate([part.margins for part in parts]),
        np.concatenate([part.held_out for part in parts]),
        np.concatenate([part.texts for part in parts]),
        sum(part.num_candidates for part in parts),
        sum(part.num_above for part in parts),
    )


def unrated(negatives: MinedNegatives, pools: Sequence[MiningPool]) -> Mined:
    """Return a task's stored negatives as a result of mining, without model scores.

    pools: pools of the task.
    """
    held_out, texts = list[np.ndarray](), list[np.ndarray]()
    for pool in pools:
        _, queries, rows = pairs_of(negatives, pool)
        judged = pool.held_out_positives
        judged_keys = filters.pair_keys(judged.owners, judged.values)
        held_out.append(np.isin(filters.pair_keys(queries, rows), judged_keys))
        texts.append(filters.text_numbers(pool.corpus, ())[0][rows] + (texts[-1].max(initial=-1) + 1 if texts else 0))
    margins = np.full(len(negatives.documents), np.nan, dtype=np.float32)
    return Mined(negatives, margins, np.concatenate(held_out), np.concatenate(texts), 0, 0)
