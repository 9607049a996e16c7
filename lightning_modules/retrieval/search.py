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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from datamodules.records import UserError

Array = np.ndarray | Tensor
Advance = Callable[[int], None]


class Shards(Sequence[np.ndarray]):
    """Vectors (M, D) in several arrays, which may be memory-mapped. As a sequence: the arrays.

    prepare: what becomes of float32 vectors (n, D) when they are read.
    """

    def __init__(self, parts: Sequence[Array], prepare: Callable[[np.ndarray], np.ndarray] | None = None):
        self.parts = [part.numpy() if isinstance(part, Tensor) else part for part in parts]
        self.prepare = prepare or (lambda vectors: vectors)
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index):
        return self.parts[index]

    @property
    def count(self) -> int:
        return int(self.starts[-1])

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Vectors (n, D) float32 of rows (n,)."""
        if len(self.parts) == 1:
            return self.prepare(np.asarray(self.parts[0][rows], dtype=np.float32))
        found = np.empty((len(rows), self.parts[0].shape[1]), dtype=np.float32)
        place = np.searchsorted(self.starts, rows, side="right") - 1
        for i in np.unique(place):
            found[place == i] = self.parts[i][rows[place == i] - self.starts[i]]
        return self.prepare(found)

    def blocks(self, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """Blocks of at most count vectors, contiguous float32, and the row at which each begins."""
        for start, part in zip(self.starts, self.parts, strict=False):
            for first in range(0, len(part), count):
                block = np.ascontiguousarray(part[first : first + count], dtype=np.float32)
                yield int(start) + first, self.prepare(block)


def shards_of(vectors: Array | Shards) -> Shards:
    return vectors if isinstance(vectors, Shards) else Shards([vectors])


def check_finite(vectors: np.ndarray, what: str, first: int = 0) -> None:
    """Raise UserError if a vector (n, D) has a value that is no finite number. first: the number of the first one."""
    wrong = ~np.isfinite(vectors).all(axis=1)
    if wrong.any():
        number = first + int(wrong.argmax())
        raise UserError(
            f"{what}: {int(wrong.sum())} of {len(vectors)} vectors are not finite, the first is number {number} "
            "(training diverged?)"
        )


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
