"""Measure time and memory of mining from vectors."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch

from datamodules.options import option
from datamodules.ragged import Ragged
from datamodules.records import Document, MiningPool
from experiments.bench.timing import DEVICES
from experiments.config.arguments import parse
from experiments.shared.console import entry_point
from lightning_modules.memory import Memory
from lightning_modules.mining.mine import mine
from lightning_modules.mining.mining_options import MiningOptions
from lightning_modules.mining.report import report, table
from lightning_modules.retrieval.compute import describe_device, resolve_device
from lightning_modules.retrieval.search import Shards

log = logging.getLogger(__name__)

SHARD = 16384


@dataclass(kw_only=True)
class BenchOptions:
    """Measure time and memory of mining from vectors, without encoding.

    The vectors are random, in clusters. Each query is in a cluster of documents, three of which are its positives.
    Memory is the rise of the peak, without vectors and texts.
    """

    documents: int = option(200_000, "number of documents", minimum=1)
    queries: int = option(20_000, "number of queries", minimum=1)
    dimension: int = option(384, "dimensions of the vectors", minimum=1)
    k: int = option(100, "candidates per query", minimum=1)
    clusters: int = option(2000, "number of clusters", minimum=1)
    memory_mb: int = option(512, "memory for scores, in MB", minimum=1)
    device: str = option("auto", DEVICES)
    threads: int = option(2, "number of threads", minimum=1)
    backend: Literal["auto", "faiss", "torch"] = option("auto", "library of the exact search")


class RandomVectors:
    """A stand-in for VectorCache that returns given vectors of the pool's documents and queries."""

    def __init__(self, pool: MiningPool, documents: Shards, queries: Shards, device: torch.device):
        self.encoder = SimpleNamespace(device=device, similarity="cosine", document_task=lambda task: task)
        self.pool, self.documents, self.queries = pool, documents, queries

    def vectors(self, texts: Sequence[Document], task: str, name: str) -> Shards:
        return self.documents if texts is self.pool.corpus else self.queries


def main(arguments: Sequence[str]) -> None:
    options = parse(BenchOptions, arguments)
    device = resolve_device(options.device)
    torch.set_num_threads(options.threads)
    vectors = random_vectors(options.documents, options.queries, options.dimension, options.clusters, device)
    mining = MiningOptions(k=options.k, memory_mb=options.memory_mb, backend=options.backend)
    memory = Memory(torch.device("cpu"))
    before, start, cpu_start = memory.peak(), time.perf_counter(), time.process_time()
    mined = mine(vectors.encoder, vectors.pool, options=mining, vectors=vectors)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    for line in table({"random": report(mined, step=0)}):
        log.info("%s", line)
    log.info(
        "%s on %s, %d threads: %.1f s (%.1f s of CPU time), %.2f GB in addition to the vectors",
        options.backend,
        describe_device(device),
        options.threads,
        seconds,
        cpu_seconds,
        (memory.peak() - before) / 1e9,
    )


def random_vectors(
    num_documents: int, num_queries: int, dimension: int, clusters: int, device: torch.device
) -> RandomVectors:
    """Return clustered vectors, and a pool to mine."""
    rng = np.random.default_rng(0)
    centres = 2 * rng.standard_normal((clusters, dimension), dtype=np.float32)
    document_clusters = rng.integers(0, clusters, num_documents)
    query_clusters = document_clusters[rng.integers(0, num_documents, num_queries)]
    documents = _vectors(centres, document_clusters, seed=1)
    queries = _vectors(centres, query_clusters, seed=2)
    return RandomVectors(_pool(document_clusters, query_clusters), documents, queries, device)


def _vectors(centres: np.ndarray, clusters: np.ndarray, seed: int) -> Shards:
    """Return random unit vectors around the centres of their clusters."""
    rng, parts = np.random.default_rng(seed), []
    for first in range(0, len(clusters), SHARD):
        centre = centres[clusters[first : first + SHARD]]
        part = centre + rng.standard_normal(centre.shape, dtype=np.float32)
        parts.append((part / np.linalg.norm(part, axis=1, keepdims=True)).astype(np.float32))
    return Shards(parts)


def _pool(document_clusters: np.ndarray, query_clusters: np.ndarray) -> MiningPool:
    """Return a pool in which each query has three positives from its cluster."""
    num_queries, num_documents = len(query_clusters), len(document_clusters)
    by_cluster = np.argsort(document_clusters, kind="stable")
    starts = np.searchsorted(document_clusters[by_cluster], np.arange(document_clusters.max() + 2))
    size = np.diff(starts)[query_clusters]
    positives = by_cluster[starts[query_clusters][:, None] + (np.arange(3) * 7) % np.maximum(size, 1)[:, None]]
    empty = Ragged.empty(num_queries)
    return MiningPool(
        "search",
        "random",
        [Document(f"d{i}", f"title {i}", f"text of {i}") for i in range(num_documents)],
        [Document(f"q{i}", "", f"query {i}") for i in range(num_queries)],
        0,
        0,
        np.full(num_queries, -1),
        Ragged(np.arange(num_queries + 1) * 3, positives.ravel().astype(np.int32)),
        empty,
        empty,
    )


if __name__ == "__main__":
    entry_point(main)
