"""FAISS indexes of a corpus's vectors: trained on a sample, filled block by block, and how much they find.

    flat     all vectors as they are: exact
    ivf      in nlist lists around centroids, of which nprobe are searched
    pq       in m bytes each (product quantization)
    ivfpq    both

Shapes: Q queries, M documents, D dimensions, k documents a query.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.records import UserError
from lightning_modules.retrieval.search import Shards, pair_scores, top_k

KINDS = ("flat", "ivf", "pq", "ivfpq")
BLOCK = 65536  # vectors that are added at once
SAMPLE_BYTES = 1 << 30  # of vectors that are trained on, at most
PER_CENTROID = 64  # of them for each centroid; FAISS warns below 39
PROBES = (1, 4, 16, 64, 256)
RERANKED = 4  # candidates of a quantized index for each document that is wanted


@dataclass(frozen=True)
class IndexOptions:
    """nlist: lists, 0 for about 4 sqrt(M). m: bytes of a vector, a divisor of D, 0 for about D / 8."""

    kind: str = "flat"
    nlist: int = 0
    m: int = 0

    @property
    def has_lists(self) -> bool:
        return self.kind.startswith("ivf")

    @property
    def quantizes(self) -> bool:
        return self.kind.endswith("pq")

    def resolved(self, count: int, dimension: int) -> IndexOptions:
        """With nlist and m for M vectors of D dimensions. Raises UserError for those that do not fit them."""
        nlist = self.nlist or max(1, min(int(4 * count**0.5), count // PER_CENTROID))
        m = self.m or max(d for d in range(1, max(1, dimension // 8) + 1) if dimension % d == 0)
        if self.has_lists and nlist > count:
            raise UserError(f"nlist: got {nlist} lists for {count} vectors")
        if self.quantizes and dimension % m:
            raise UserError(f"m: got {m}, allowed are divisors of the vectors' {dimension} dimensions")
        if self.quantizes and count < 256:
            raise UserError(f"kind: {self.kind} learns 256 centroids, and there are {count} vectors; flat is for few")
        return IndexOptions(self.kind, nlist if self.has_lists else 0, m if self.quantizes else 0)


def faiss_module() -> Any:
    """FAISS, with torch's number of threads. Raises UserError if it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise UserError("faiss is not installed (make install EXTRAS=cpu, or gpu); make find does without") from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def build_index(vectors: Shards, options: IndexOptions, advance: Callable[[int], None] | None = None) -> Any:
    """An index of all vectors, by inner product. options: resolved. advance: called with the number added."""
    faiss = faiss_module()
    dimension = vectors[0].shape[1]
    lists = f"IVF{options.nlist}," if options.has_lists else ""
    codes = f"PQ{options.m}np" if options.m else "Flat"  # np: without an annealing for Hamming distances, minutes long
    index = faiss.index_factory(dimension, lists + codes, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        if options.has_lists and faiss.get_num_gpus() > 0:  # k-means takes nearly all the time
            on_gpus = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(dimension))
            faiss.extract_index_ivf(index).clustering_index = on_gpus
        index.train(vectors.gather(_sample(vectors, max(256, options.nlist) * PER_CENTROID)))
    for _, block in vectors.blocks(BLOCK):
        index.add(block)
        if advance is not None:
            advance(len(block))
    return index


def _sample(vectors: Shards, count: int) -> np.ndarray:
    """Rows, ascending; the same for the same corpus."""
    count = min(vectors.count, count, SAMPLE_BYTES // (4 * vectors[0].shape[1]))
    return np.sort(np.random.default_rng(0).choice(vectors.count, count, replace=False))


def search_index(
    index: Any, queries: np.ndarray, k: int, nprobe: int = 0, vectors: Shards | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (Q, k) of what the index finds best, -1 where it finds fewer, and scores (Q, k) float32.

    queries: (Q, D). nprobe: lists that are searched. vectors: to score RERANKED times k candidates exactly.
    """
    faiss = faiss_module()
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
    index: Any, vectors: Shards, options: IndexOptions, k: int = 10, queries: int = 200
) -> list[dict[str, float]]:
    """Of the k nearest of some of the documents themselves, the share that the index finds: at each nprobe.

    A document that is as near as the k-th counts as found. reranked: with exact scores of RERANKED times k candidates.
    """
    rows = _sample(vectors, queries)
    k = min(k, vectors.count - 1)
    asked = vectors.gather(rows)
    own, scores = top_k(asked, vectors, k + 1)
    least = np.sort(np.where(own == rows[:, None], -np.inf, scores), axis=1)[:, -k]
    found = []
    for nprobe in [n for n in PROBES if n < options.nlist] + [options.nlist]:
        line = {"nprobe": nprobe, "recall": 0.0}
        for name, exact in (("recall", None), ("reranked", vectors))[: 2 if options.quantizes else 1]:
            got, _ = search_index(index, asked, k + 1, nprobe, exact)
            got = np.where(got == rows[:, None], -1, got)
            near = pair_scores(asked, vectors, got) >= least[:, None] - 1e-6 * np.abs(least[:, None])
            line[name] = float(np.minimum(near.sum(axis=1), k).mean() / k)
        found.append(line)
    return found


def write_index(index: Any, path: Path) -> None:
    """Whole or not at all. Raises UserError."""
    faiss, partial = faiss_module(), path.with_name(f".{path.name}.{os.getpid()}")
    try:
        faiss.write_index(index, str(partial))
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be written ({str(error).splitlines()[-1]})") from error
    finally:
        partial.unlink(missing_ok=True)


def read_index(path: Path) -> Any:
    """Raises UserError if it is missing or damaged."""
    faiss = faiss_module()
    if not path.is_file():
        raise UserError(f"index: {path} is no file")
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise UserError(f"{path}: is no index, or damaged ({str(error).splitlines()[-1]})") from error
