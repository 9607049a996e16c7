"""Exact top-k by dot product, in bounded memory: what evaluation and mining rank with.

FAISS or torch find somewhat more than k candidates in float32, shard by shard. Their scores are computed again in
float64, and queries whose k-th place is within float32's rounding of what was left out are searched again in float64.
So the result is that of a loop in float64, whatever the backend, shards, threads and memory; ties go to the document
that comes first, in the corpus or in an order that is given. Above DEEP documents a query this would gather more than
it saves: deep_top_k.py then searches in float64 at once.

Shapes: Q queries, M documents, D dimensions, k documents a query.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from datamodules.records import UserError
from lightning_modules.retrieval.search import deep_top_k, ordered
from lightning_modules.retrieval.search import Advance, Array, Shards, check_finite, shards_of

BACKENDS = ("auto", "faiss", "torch")
PAD = 16  # candidates beyond k
GPU_K = 2048  # the most that FAISS finds on a GPU
DEEP = 2048  # documents a query
MEMORY = 1 << 29  # bytes of scores and vectors at once, by default


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
    """The k best documents of each query, best first: rows (Q, k) int64 and scores (Q, k) float32.

    queries: (Q, D). documents: (M, D). k is cut to M. order: (M,) the place of each document among documents of equal
    score; by default its row. backend: "auto" is torch. memory: bytes beyond the vectors themselves and the
    result. advance: called with the number of pairs that were compared.
    Raises UserError for vectors that are not finite.
    """
    queries = np.ascontiguousarray(shards_of(queries)[0], dtype=np.float32)
    shards, device = shards_of(documents), torch.device(device)
    k = min(k, shards.count)
    wanted = min(k + PAD, shards.count)
    check_finite(queries, "queries")
    backend = _backend(backend)
    if k > DEEP:
        return deep_top_k(queries, shards, k, order, memory, device, advance)
    rows, scores, longest = _candidates(queries, shards, wanted, backend, memory, device, advance)
    exact = pair_scores(queries, shards, rows, memory)
    worst = scores.min(axis=1, initial=np.inf)  # what was left out has no more, in float32
    rows, exact = ordered(rows, exact, k, order)
    if wanted < shards.count:
        rounding = queries.shape[1] * 2.0**-23 * np.linalg.norm(queries, axis=1) * longest
        unsure = np.flatnonzero(exact[:, -1] <= worst + rounding)
        rows[unsure], exact[unsure] = _search_again(queries[unsure], shards, k, order, memory)
    return rows, exact.astype(np.float32)


def pair_scores(queries: np.ndarray, documents: Shards, rows: np.ndarray, memory: int = MEMORY) -> np.ndarray:
    """Scores (Q, w) float64 of each query (Q, D) with the documents in rows (Q, w); -inf where a row is -1."""
    scores = np.empty(rows.shape)
    step = max(1, memory // max(1, 24 * rows.shape[1] * queries.shape[1]))
    for first in range(0, len(queries), step):
        part = rows[first : first + step]
        found = documents.gather(np.maximum(part, 0).ravel()).astype(np.float64).reshape(*part.shape, -1)
        # einsum adds each pair by itself, so that equal vectors have equal scores wherever they stand.
        scores[first : first + step] = np.einsum("qd,qwd->qw", queries[first : first + step].astype(np.float64), found)
    return np.where(rows < 0, -np.inf, scores)


def _backend(name: str) -> str:
    if name not in BACKENDS:
        raise UserError(f"backend: got {name!r}, allowed are {', '.join(BACKENDS)}")
    installed = importlib.util.find_spec("faiss") is not None
    if name == "faiss" and not installed:
        raise UserError("backend: faiss is not installed (make install EXTRAS=cpu, or gpu); torch does without")
    return "torch" if name == "auto" else name  # on two cores, two to five times as fast as faiss


def _candidates(
    queries: np.ndarray,
    shards: Shards,
    wanted: int,
    backend: str,
    memory: int,
    device: torch.device,
    advance: Advance | None,
) -> tuple[np.ndarray, np.ndarray, float]:
    """The wanted best in float32, in any order: rows and scores (Q, wanted); and the longest document's length."""
    rows = np.zeros((len(queries), 0), dtype=np.int64)
    scores = np.zeros((len(queries), 0), dtype=np.float32)
    search = _by_faiss if backend == "faiss" else _by_torch
    longest, size = 0.0, max(wanted, memory // (16 * queries.shape[1]), 1)
    for first, block in shards.blocks(size):
        check_finite(block, "documents", first)
        longest = max(longest, float(np.sqrt(np.einsum("md,md->m", block, block).max(initial=0.0))))
        found, values = search(queries, block, min(wanted, len(block)), memory // 2, device)
        rows, scores = np.concatenate([rows, found + first], axis=1), np.concatenate([scores, values], axis=1)
        if rows.shape[1] > wanted:
            best = np.argpartition(-scores, wanted - 1, axis=1)[:, :wanted]
            rows, scores = np.take_along_axis(rows, best, axis=1), np.take_along_axis(scores, best, axis=1)
        if advance is not None:
            advance(len(queries) * len(block))
    return rows, scores, longest


def _by_faiss(queries: np.ndarray, block: np.ndarray, k: int, memory: int, device: torch.device):
    import faiss

    if device.type == "cuda" and k <= GPU_K and hasattr(faiss, "StandardGpuResources"):  # of faiss-gpu
        resources, where = faiss.StandardGpuResources(), {"device": device.index or 0}
        resources.setTempMemory(memory)
        scores, rows = faiss.knn_gpu(resources, queries, block, k, metric=faiss.METRIC_INNER_PRODUCT, **where)
        return rows, scores
    faiss.omp_set_num_threads(torch.get_num_threads())
    scores, rows = faiss.knn(queries, block, k, metric=faiss.METRIC_INNER_PRODUCT)
    return rows, scores


def _by_torch(queries: np.ndarray, block: np.ndarray, k: int, memory: int, device: torch.device):
    documents = torch.from_numpy(block).to(device)
    step = max(1, min(1024, memory // (8 * len(block))))
    with _full_precision(device):
        parts = [
            (part.to(device) @ documents.T).topk(k, sorted=False) for part in torch.from_numpy(queries).split(step)
        ]
    return (
        torch.cat([p.indices.cpu() for p in parts]).numpy(),
        torch.cat([p.values.cpu() for p in parts]).numpy(),
    )


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """float32 as it is: the lower precisions of training (autocast, TF32) are not for ranking."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _search_again(
    queries: np.ndarray, shards: Shards, k: int, order: np.ndarray | None, memory: int
) -> tuple[np.ndarray, np.ndarray]:
    """Top-k in float64, rows and scores (Q, k)."""
    rows = np.zeros((len(queries), k), dtype=np.int64)
    scores = np.zeros((len(queries), k))
    step = max(1, memory // (32 * shards.count))
    size = max(1, memory // (32 * shards[0].shape[1]))
    for first in range(0, len(queries), step):
        part = queries[first : first + step].astype(np.float64)
        every = np.concatenate([part @ block.astype(np.float64).T for _, block in shards.blocks(size)], axis=1)
        least = np.partition(every, -k, axis=1)[:, -k]
        slack = 1e-9 * np.maximum(np.abs(every).max(axis=1), 1e-300)  # of float64's rounding
        for i, query in enumerate(part):
            near = np.flatnonzero(every[i] >= least[i] - slack[i])
            exact = pair_scores(query[None], shards, near[None], memory)
            best, values = ordered(near[None], exact, k, order)
            rows[first + i], scores[first + i] = best[0], values[0]
    return rows, scores
