"""Exact top-k by dot product, in bounded memory.

FAISS or torch finds slightly more than k candidates in float32, block by block, and their scores are recomputed in
float64. If rounding may have dropped one of a query's k best documents, the query is searched again in float64. So the
result equals that of a loop in float64, for any backend, number of threads, sharding and memory limit. Ties go to the
first document, in the corpus or in a given order. For k above DEEP, recomputing would cost more than it saves, so the
whole search is in float64.

Shapes: Q queries, M documents, D dimensions, k documents per query.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from datamodules.records import UserError, check_choice
from lightning_modules.retrieval.compute import matrix_products_in

Array = np.ndarray | Tensor
Advance = Callable[[int], None]

BACKENDS = ("auto", "faiss", "torch")
PADDING = 16  # number of candidates beyond k
GPU_K = 2048  # largest k that FAISS supports on a GPU
DEEP = 2048  # largest k for a search in float32
MEMORY = 1 << 29  # default limit in bytes for blocks of scores and vectors


class Shards(Sequence[np.ndarray]):
    """Vectors (M, D) as a sequence of arrays, which may be memory-mapped.

    prepare: function to apply to float32 vectors (n, D) when they are read.
    """

    def __init__(self, parts: Sequence[Array], prepare: Callable[[np.ndarray], np.ndarray] | None = None):
        self.parts = [part.numpy() if isinstance(part, Tensor) else part for part in parts]
        self.prepare = prepare or np.asarray  # not a lambda: teacher vectors are pickled for worker processes
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index):
        return self.parts[index]

    @property
    def count(self) -> int:
        """The number of vectors, M."""
        return int(self.starts[-1])

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors (n, D) of rows (n,), in float32."""
        if len(self.parts) == 1:
            return self.prepare(np.asarray(self.parts[0][rows], dtype=np.float32))
        vectors = np.empty((len(rows), self.parts[0].shape[1]), dtype=np.float32)
        part_of_row = np.searchsorted(self.starts, rows, side="right") - 1
        for part in np.unique(part_of_row):
            mask = part_of_row == part
            vectors[mask] = self.parts[part][rows[mask] - self.starts[part]]
        return self.prepare(vectors)

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield blocks of at most `size` vectors, as pairs: row of the first vector, and contiguous float32 vectors."""
        for start, part in zip(self.starts, self.parts, strict=False):
            for first in range(0, len(part), size):
                block = np.ascontiguousarray(part[first : first + size], dtype=np.float32)
                yield int(start) + first, self.prepare(block)


def check_finite(vectors: np.ndarray, name: str, first: int = 0) -> None:
    """Raise UserError if any of the vectors (n, D) is not finite. first: row of the first vector."""
    invalid = ~np.isfinite(vectors).all(axis=1)
    if invalid.any():
        raise UserError(
            f"{name}: {int(invalid.sum())} of {len(vectors)} vectors are not finite, the first is number "
            f"{first + int(invalid.argmax())}; the training of this model may have diverged"
        )


def top_k(
    queries: Array,
    documents: Array | Shards,
    k: int,
    *,
    order: np.ndarray | None = None,
    backend: str = "auto",
    memory: int = MEMORY,
    device: torch.device | str = "cpu",
    advance: Advance | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best documents of each query, best first: rows (Q, k) int64 and scores (Q, k) float32.

    queries, documents: vectors, (Q, D) and (M, D).
    k: number of documents per query; values above M mean M.
    order: tie-breaking rank of each document, (M,); by default its row.
    backend: one of BACKENDS; "auto" is torch.
    memory: limit in bytes, not counting the vectors and the result.
    advance: callback for the number of (query, document) pairs that each block adds.
    Raises UserError for vectors that are not finite.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    shards = documents if isinstance(documents, Shards) else Shards([documents])
    device = torch.device(device)
    k = min(k, shards.count)
    num_candidates = min(k + PADDING, shards.count)
    check_finite(queries, "queries")
    _check_backend(backend)
    if k > DEEP:
        return _deep_top_k(queries, shards, k, order, memory, device, advance)
    rows, scores, max_norm = _candidates(queries, shards, num_candidates, backend, memory, device, advance)
    exact = pair_scores(queries, shards, rows, memory)
    worst = scores.min(axis=1, initial=np.inf)  # upper bound for all other documents, in float32
    rows, exact = _best(rows, exact, k, order)
    if num_candidates < shards.count:
        rounding = queries.shape[1] * 2.0**-23 * np.linalg.norm(queries, axis=1) * max_norm
        unsure = np.flatnonzero(exact[:, -1] <= worst + rounding)
        rows[unsure], exact[unsure] = _search_in_float64(queries[unsure], shards, k, order, memory)
    return rows, exact.astype(np.float32)


def pair_scores(queries: np.ndarray, documents: Shards, rows: np.ndarray, memory: int = MEMORY) -> np.ndarray:
    """Return float64 scores (Q, w) of queries (Q, D) with the documents in their rows (Q, w); row -1 scores -inf."""
    scores = np.empty(rows.shape)
    step = max(1, memory // max(1, 24 * rows.shape[1] * queries.shape[1]))
    for first in range(0, len(queries), step):
        chunk = rows[first : first + step]
        vectors = documents.gather(np.maximum(chunk, 0).ravel()).astype(np.float64)
        vectors = vectors.reshape(*chunk.shape, queries.shape[1])  # not -1, because w may be 0
        # einsum sums each pair separately, so equal vectors get equal scores in any position.
        scores[first : first + step] = np.einsum(
            "qd,qwd->qw", queries[first : first + step].astype(np.float64), vectors
        )
    return np.where(rows < 0, -np.inf, scores)


def row_scores(
    queries: Shards, documents: Shards, query_rows: np.ndarray, document_rows: np.ndarray, memory: int = MEMORY
) -> np.ndarray:
    """Return the float64 scores (n,) of pairs of a query's row (n,) and a document's row (n,)."""
    scores = np.empty(len(query_rows))
    step = max(1, memory // (24 * queries[0].shape[1]))
    for first in range(0, len(query_rows), step):
        part = slice(first, first + step)
        vectors = queries.gather(query_rows[part]), documents.gather(document_rows[part])
        scores[part] = np.einsum("nd,nd->n", *(each.astype(np.float64) for each in vectors))
    return scores


def _best(
    rows: np.ndarray, scores: np.ndarray, k: int, order: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best of the candidates (Q, w). Ties are broken by row, or by order[row]."""
    tie_break = rows if order is None else np.where(rows < 0, -1, order[rows])
    best = np.lexsort((tie_break, -scores), axis=1)[:, :k]
    return np.take_along_axis(rows, best, axis=1), np.take_along_axis(scores, best, axis=1)


def _check_backend(backend: str) -> None:
    check_choice("backend", backend, BACKENDS)
    if backend == "faiss" and importlib.util.find_spec("faiss") is None:
        raise UserError("backend: faiss is not installed (pip install faiss-cpu or faiss-gpu); use torch instead")


def _candidates(
    queries: np.ndarray,
    shards: Shards,
    count: int,
    backend: str,
    memory: int,
    device: torch.device,
    advance: Advance | None,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the `count` best by float32 score, unordered: rows and scores (Q, count). Also return the maximum norm."""
    rows = np.zeros((len(queries), 0), dtype=np.int64)
    scores = np.zeros((len(queries), 0), dtype=np.float32)
    # torch is the default, because it is two to five times as fast as FAISS on two cores.
    search = _search_with_faiss if backend == "faiss" else _search_with_torch
    max_norm, size = 0.0, max(count, memory // (16 * queries.shape[1]), 1)
    for first, block in shards.blocks(size):
        check_finite(block, "documents", first)
        max_norm = max(max_norm, float(np.sqrt(np.einsum("md,md->m", block, block).max(initial=0.0))))
        new_rows, new_scores = search(queries, block, min(count, len(block)), memory // 2, device)
        rows = np.concatenate([rows, new_rows + first], axis=1)
        scores = np.concatenate([scores, new_scores], axis=1)
        if rows.shape[1] > count:
            best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
            rows, scores = np.take_along_axis(rows, best, axis=1), np.take_along_axis(scores, best, axis=1)
        if advance is not None:
            advance(len(queries) * len(block))
    return rows, scores, max_norm


def _search_with_faiss(
    queries: np.ndarray, block: np.ndarray, k: int, memory: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    import faiss

    if device.type == "cuda" and k <= GPU_K and hasattr(faiss, "StandardGpuResources"):  # only faiss-gpu has it
        resources = faiss.StandardGpuResources()
        resources.setTempMemory(memory)
        metric, index = faiss.METRIC_INNER_PRODUCT, device.index or 0
        scores, rows = faiss.knn_gpu(resources, queries, block, k, metric=metric, device=index)
        return rows, scores
    faiss.omp_set_num_threads(torch.get_num_threads())
    scores, rows = faiss.knn(queries, block, k, metric=faiss.METRIC_INNER_PRODUCT)
    return rows, scores


def _search_with_torch(
    queries: np.ndarray, block: np.ndarray, k: int, memory: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    documents = torch.from_numpy(block).to(device)
    step = max(1, min(1024, memory // (8 * len(block))))
    with matrix_products_in("fp32"), torch.autocast(device.type, enabled=False):
        results = [
            (chunk.to(device) @ documents.T).topk(k, sorted=False) for chunk in torch.from_numpy(queries).split(step)
        ]
    return (
        torch.cat([result.indices.cpu() for result in results]).numpy(),
        torch.cat([result.values.cpu() for result in results]).numpy(),
    )


def _search_in_float64(
    queries: np.ndarray, shards: Shards, k: int, order: np.ndarray | None, memory: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the exact top-k, rows and scores (Q, k), computing all dot products in float64."""
    rows = np.zeros((len(queries), k), dtype=np.int64)
    scores = np.zeros((len(queries), k))
    step = max(1, memory // (32 * shards.count))
    size = max(1, memory // (32 * shards[0].shape[1]))
    for first in range(0, len(queries), step):
        chunk = queries[first : first + step].astype(np.float64)
        products = np.concatenate([chunk @ block.astype(np.float64).T for _, block in shards.blocks(size)], axis=1)
        kth = np.partition(products, -k, axis=1)[:, -k]
        slack = 1e-9 * np.maximum(np.abs(products).max(axis=1), 1e-300)  # because float64 rounds, too
        for i, query in enumerate(chunk):
            near = np.flatnonzero(products[i] >= kth[i] - slack[i])
            exact = pair_scores(query[None], shards, near[None], memory)
            best, values = _best(near[None], exact, k, order)
            rows[first + i], scores[first + i] = best[0], values[0]
    return rows, scores


def _deep_top_k(
    queries: np.ndarray,
    shards: Shards,
    k: int,
    order: np.ndarray | None,
    memory: int,
    device: torch.device,
    advance: Advance | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the top k for large k, computing all dot products in float64.

    If documents tie for the last rank, any of them may be returned.
    """
    rows = np.empty((len(queries), k), dtype=np.int64)
    scores = np.empty((len(queries), k), dtype=np.float32)
    group = max(1, memory // (64 * k))
    size = max(1, min(shards.count, memory // (32 * max(group, queries.shape[1]))))
    for first in range(0, len(queries), group):
        chunk = torch.from_numpy(queries[first : first + group]).to(device, torch.float64)
        best = _RunningBest(len(chunk), k, device)
        with torch.autocast(device.type, enabled=False):
            for start, block in shards.blocks(size):
                check_finite(block, "documents", start)
                best.add(chunk @ torch.from_numpy(block).to(device, torch.float64).T, start)
                if advance is not None:
                    advance(len(chunk) * len(block))
        best.merge()
        best_rows, best_scores = _best(best.rows.cpu().numpy(), best.scores.cpu().numpy(), k, order)
        rows[first : first + group], scores[first : first + group] = best_rows, best_scores
    return rows, scores


class _RunningBest:
    """The k best documents of n queries so far.

    Documents that beat the k-th best are first collected in `pending`, because merging many at once is faster.
    """

    def __init__(self, num_queries: int, k: int, device: torch.device):
        self.k = k
        self.rows = torch.zeros(num_queries, 0, dtype=torch.int64, device=device)
        self.scores = torch.zeros(num_queries, 0, dtype=torch.float64, device=device)
        self.pending: list[tuple[Tensor, Tensor, Tensor]] = []  # query, row and score of each document

    def add(self, scores: Tensor, start: int) -> None:
        """Add a block's scores (n, b). start: row of the block's first document."""
        if self.rows.shape[1] < self.k:
            rows = torch.arange(start, start + scores.shape[1], device=scores.device).expand(len(scores), -1)
            self._keep(torch.cat([self.rows, rows], dim=1), torch.cat([self.scores, scores], dim=1))
            return
        queries, columns = (scores > self.scores.amin(1, keepdim=True)).nonzero(as_tuple=True)
        self.pending.append((queries, columns + start, scores[queries, columns]))
        if sum(len(queries) for queries, _, _ in self.pending) > self.rows.numel() // 2:
            self.merge()

    def merge(self) -> None:
        """Merge the pending documents into the k best."""
        if not self.pending:
            return
        queries, rows, scores = (torch.cat(parts) for parts in zip(*self.pending, strict=True))
        self.pending = []
        queries, order = queries.sort(stable=True)
        counts = torch.bincount(queries, minlength=len(self.rows))
        column = torch.arange(len(queries), device=queries.device) - (counts.cumsum(0) - counts)[queries]
        width = int(counts.max())
        new_rows = self.rows.new_zeros(len(self.rows), width)
        new_scores = self.scores.new_full((len(self.rows), width), -torch.inf)
        new_rows[queries, column], new_scores[queries, column] = rows[order], scores[order]
        self._keep(torch.cat([self.rows, new_rows], dim=1), torch.cat([self.scores, new_scores], dim=1))

    def _keep(self, rows: Tensor, scores: Tensor) -> None:
        if rows.shape[1] > self.k:
            scores, columns = scores.topk(self.k, dim=1, sorted=False)
            rows = rows.gather(1, columns)
        self.rows, self.scores = rows, scores
