"""Build FAISS indexes of a corpus, search them, and measure their recall.

    flat     the vectors themselves: exact
    ivf      the vectors in nlist lists around centroids; a search visits nprobe of them
    pq       m bytes per vector (product quantization)
    ivfpq    both

Shapes: Q queries, M documents, D dimensions, k documents per query.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from datamodules.files import atomic_file
from datamodules.options import option
from datamodules.records import UserError, explained
from lightning_modules.retrieval.search import Advance, Shards, pair_scores, top_k

BLOCK = 65536  # number of vectors that are added at a time
MAX_SAMPLE_BYTES = 1 << 30  # maximum size of the vectors that an index is trained on
SAMPLE_PER_CENTROID = 64  # FAISS warns below 39
NUM_CODES = 256  # number of centroids that one byte of a product-quantization code can index
PROBES = (1, 4, 16, 64, 256)  # values of nprobe for which recall is measured
RERANKED = 4  # number of candidates per result that are scored exactly


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """Kind and size of an index."""

    kind: Literal["flat", "ivf", "pq", "ivfpq"] = option(
        "flat", "flat: exact; ivf: searches only the nearest lists; pq: few bytes per vector; ivfpq: both"
    )
    nlist: int = option(0, "number of lists of ivf; 0 for about 4 sqrt(M)", minimum=0)
    m: int = option(0, "bytes per vector of pq, a divisor of D; 0 for about D / 8", minimum=0)

    @property
    def has_lists(self) -> bool:
        return self.kind.startswith("ivf")

    @property
    def quantizes(self) -> bool:
        return self.kind.endswith("pq")

    def resolved(self, count: int, dimension: int) -> IndexOptions:
        """Fill in nlist and m for M vectors of D dimensions. Raises UserError if the given values do not fit."""
        nlist = self.nlist or max(1, min(int(4 * count**0.5), count // SAMPLE_PER_CENTROID))
        m = self.m or max(d for d in range(1, max(1, dimension // 8) + 1) if dimension % d == 0)
        if self.has_lists and nlist > count:
            raise UserError(f"nlist: expected at most the number of vectors, {count}, got {nlist}")
        if self.quantizes and dimension % m:
            raise UserError(f"m: expected a divisor of the vectors' {dimension} dimensions, got {m}")
        if self.quantizes and count < NUM_CODES:
            raise UserError(
                f"kind: {self.kind} needs at least {NUM_CODES} vectors to learn its codes, got {count}; use flat"
            )
        return IndexOptions(kind=self.kind, nlist=nlist if self.has_lists else 0, m=m if self.quantizes else 0)


def build_index(vectors: Shards, options: IndexOptions, advance: Advance | None = None) -> Any:
    """Build an inner-product index of all vectors.

    options: resolved options.
    advance: callback for the number of vectors in each added block.
    """
    faiss = _faiss()
    dimension = vectors[0].shape[1]
    lists = f"IVF{options.nlist}," if options.has_lists else ""
    # "np" skips polysemous training, which takes minutes and only helps with Hamming distances.
    codes = f"PQ{options.m}np" if options.m else "Flat"
    index = faiss.index_factory(dimension, lists + codes, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        if options.has_lists and faiss.get_num_gpus() > 0:  # k-means takes nearly all the time
            on_gpus = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(dimension))
            faiss.extract_index_ivf(index).clustering_index = on_gpus
        index.train(vectors.gather(_sample(vectors, max(NUM_CODES, options.nlist) * SAMPLE_PER_CENTROID)))
    for _, block in vectors.blocks(BLOCK):
        index.add(block)
        if advance is not None:
            advance(len(block))
    return index


def search_index(
    index: Any, queries: np.ndarray, k: int, nprobe: int = 0, vectors: Shards | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best documents of each query: rows (Q, k) and float32 scores (Q, k).

    If the index finds fewer, rows are padded with -1.

    queries: vectors, (Q, D).
    nprobe: number of lists to visit; 0 for the index's default.
    vectors: document vectors. If given, RERANKED times k candidates are reranked by their exact scores.
    """
    faiss = _faiss()
    if nprobe:
        faiss.extract_index_ivf(index).nprobe = nprobe
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    scores, rows = index.search(queries, min(index.ntotal, k * (RERANKED if vectors else 1)))
    if vectors is not None:
        exact = pair_scores(queries, vectors, rows)
        best = np.lexsort((rows, -exact), axis=1)[:, :k]
        rows, scores = np.take_along_axis(rows, best, axis=1), np.take_along_axis(exact, best, axis=1)
    return rows, scores.astype(np.float32)


def measure_recall(
    index: Any, vectors: Shards, options: IndexOptions, num_queries: int = 200
) -> list[dict[str, float]]:
    """Measure the recall of the ten nearest documents for several values of nprobe, with sampled documents as queries.

    Returns a dict for each value, with "nprobe", "recall" and, with quantization, "reranked": the recall after RERANKED
    times ten candidates are scored exactly. Any document as near as the tenth nearest counts as a hit.
    """
    sample = _sample(vectors, num_queries)
    k = min(10, vectors.count - 1)
    steps = [n for n in PROBES if n < options.nlist] + [options.nlist]
    names = ("recall", "reranked") if options.quantizes else ("recall",)
    if k == 0:  # with a single document, there is nothing to miss
        return [{"nprobe": nprobe} | dict.fromkeys(names, 1.0) for nprobe in steps]
    queries = vectors.gather(sample)
    rows, scores = top_k(queries, vectors, k + 1)
    kth_score = np.sort(np.where(rows == sample[:, None], -np.inf, scores), axis=1)[:, -k]  # without the query itself
    threshold = (kth_score - 1e-6 * np.abs(kth_score))[:, None]
    results = []
    for nprobe in steps:
        result = {"nprobe": nprobe, "recall": 0.0}
        for name in names:
            rows, _ = search_index(index, queries, k + 1, nprobe, vectors if name == "reranked" else None)
            rows = np.where(rows == sample[:, None], -1, rows)
            near = pair_scores(queries, vectors, rows) >= threshold
            result[name] = float(np.minimum(near.sum(axis=1), k).mean() / k)
        results.append(result)
    return results


def write_index(index: Any, path: Path) -> None:
    """Write an index atomically. Raises UserError if the file cannot be written."""
    faiss = _faiss()
    with explained(f"{path}: cannot be written", OSError, RuntimeError), atomic_file(path) as file:
        faiss.write_index(index, str(file.name))


def read_index(path: Path) -> Any:
    """Read an index. Raises UserError if the file is missing or damaged."""
    faiss = _faiss()
    if not path.is_file():
        raise UserError(f"index: {path} does not exist")
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise UserError(f"{path}: not an index, or damaged ({str(error).splitlines()[-1]})") from error


def _sample(vectors: Shards, count: int) -> np.ndarray:
    """Return at most `count` random rows, in ascending order. Every call returns the same rows."""
    count = min(vectors.count, count, MAX_SAMPLE_BYTES // (4 * vectors[0].shape[1]))
    return np.sort(np.random.default_rng(0).choice(vectors.count, count, replace=False))


def _faiss() -> Any:
    """Import FAISS, and let it use as many threads as torch. Raises UserError if it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise UserError("faiss is not installed; install faiss-cpu or faiss-gpu, or search without an index") from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss
