"""Exact top-k for thousands of documents a query, by products in float64.

Shapes: Q queries, M documents, D dimensions, k documents a query.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_modules.retrieval.search import Advance, Shards, check_finite


def ordered(
    rows: np.ndarray, scores: np.ndarray, k: int, order: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k best by score, and among equals by row, or by the place of the row in order (M,)."""
    among_equals = rows if order is None else np.where(rows < 0, -1, order[rows])
    best = np.lexsort((among_equals, -scores), axis=1)[:, :k]
    return np.take_along_axis(rows, best, axis=1), np.take_along_axis(scores, best, axis=1)


def deep_top_k(
    queries: np.ndarray,
    shards: Shards,
    k: int,
    order: np.ndarray | None,
    memory: int,
    device: torch.device,
    advance: Advance | None,
) -> tuple[np.ndarray, np.ndarray]:
    """top_k for large k: the products themselves are in float64, and a document counts as soon as it is better than the
    k-th best so far. Of equal documents at the last place any may stand. queries: (Q, D)."""
    rows = np.empty((len(queries), k), dtype=np.int64)
    scores = np.empty((len(queries), k), dtype=np.float32)
    group = max(1, memory // (64 * k))
    size = max(1, min(shards.count, memory // (32 * max(group, queries.shape[1]))))
    for first in range(0, len(queries), group):
        part = torch.from_numpy(queries[first : first + group]).to(device, torch.float64)
        best = _Best(len(part), k, device)
        with torch.autocast(device.type, enabled=False):
            for start, block in shards.blocks(size):
                check_finite(block, "documents", start)
                best.add(part @ torch.from_numpy(block).to(device, torch.float64).T, start)
                if advance is not None:
                    advance(len(part) * len(block))
        best.merge()
        found, values = ordered(best.rows.cpu().numpy(), best.scores.cpu().numpy(), k, order)
        rows[first : first + group], scores[first : first + group] = found, values
    return rows, scores


class _Best:
    """The k best of n queries so far, and documents that are better than the k-th and wait to be merged."""

    def __init__(self, n: int, k: int, device: torch.device):
        self.k = k
        self.rows = torch.zeros(n, 0, dtype=torch.int64, device=device)
        self.scores = torch.zeros(n, 0, dtype=torch.float64, device=device)
        self.waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # query, row and score of each

    def add(self, scores: Tensor, start: int) -> None:
        """scores: (n, b) of the documents from row start on."""
        if self.rows.shape[1] < self.k:
            rows = torch.arange(start, start + scores.shape[1], device=scores.device).expand(len(scores), -1)
            self._keep(torch.cat([self.rows, rows], dim=1), torch.cat([self.scores, scores], dim=1))
            return
        queries, columns = (scores > self.scores.amin(1, keepdim=True)).nonzero(as_tuple=True)
        self.waiting.append((queries, columns + start, scores[queries, columns]))
        if sum(len(queries) for queries, _, _ in self.waiting) > self.rows.numel() // 2:
            self.merge()

    def merge(self) -> None:
        if not self.waiting:
            return
        queries, rows, scores = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        self.waiting = []
        queries, order = queries.sort(stable=True)
        counts = torch.bincount(queries, minlength=len(self.rows))
        place = torch.arange(len(queries), device=queries.device) - (counts.cumsum(0) - counts)[queries]
        wide = int(counts.max())
        more_rows = self.rows.new_zeros(len(self.rows), wide)
        more_scores = self.scores.new_full((len(self.rows), wide), -torch.inf)
        more_rows[queries, place], more_scores[queries, place] = rows[order], scores[order]
        self._keep(torch.cat([self.rows, more_rows], dim=1), torch.cat([self.scores, more_scores], dim=1))

    def _keep(self, rows: Tensor, scores: Tensor) -> None:
        if rows.shape[1] > self.k:
            scores, columns = scores.topk(self.k, dim=1, sorted=False)
            rows = rows.gather(1, columns)
        self.rows, self.scores = rows, scores
