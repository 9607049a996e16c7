"""Time and memory of mining from cached vectors: python -m experiments.bench.mining [documents=N] [queries=N] ...

Vectors are generated, in clusters; each query is near the documents of one of them, of which some are its positives.
Memory is the peak beyond what the process held when vectors and pool were in memory.
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Sequence

import numpy as np
import torch

from datamodules.records import Document, MiningPool
from experiments.shared.console import choice, entry_point, key_values, whole_number
from lightning_modules.mining.mine import MiningOptions, mine_pool, text_numbers
from lightning_modules.mining.miners import DenseMiner, MiningContext
from lightning_modules.mining.report import report, table
from lightning_modules.retrieval.search import BACKENDS, Shards

log = logging.getLogger(__name__)

KEYS = {
    "documents": "200000",
    "queries": "20000",
    "dimension": "384",
    "k": "100",
    "clusters": "2000",
    "memory_mb": "512",
    "threads": "2",
    "backend": "auto",
}
SHARD = 16384


def generated(count: int, centres: np.ndarray, cluster: np.ndarray, seed: int) -> Shards:
    """Unit vectors around their clusters' centres."""
    rng, parts = np.random.default_rng(seed), []
    for first in range(0, count, SHARD):
        around = centres[cluster[first : first + SHARD]]
        part = around + rng.standard_normal(around.shape, dtype=np.float32)
        parts.append((part / np.linalg.norm(part, axis=1, keepdims=True)).astype(np.float32))
    return Shards(parts)


def generated_pool(num_queries: int, num_documents: int, cluster: np.ndarray, of_query: np.ndarray) -> MiningPool:
    """Each query has three positives of its cluster."""
    by_cluster = np.argsort(cluster, kind="stable")
    starts = np.searchsorted(cluster[by_cluster], np.arange(cluster.max() + 2))
    size = np.diff(starts)[of_query]
    positives = by_cluster[starts[of_query][:, None] + (np.arange(3) * 7) % np.maximum(size, 1)[:, None]]
    nothing = (np.zeros(num_queries + 1, dtype=np.int64), np.zeros(0, dtype=np.int32))
    return MiningPool(
        "search",
        "generated",
        [Document(f"d{i}", f"title {i}", f"text of {i}") for i in range(num_documents)],
        [Document(f"q{i}", "", f"query {i}") for i in range(num_queries)],
        0,
        0,
        np.full(num_queries, -1),
        (np.arange(num_queries + 1) * 3, positives.ravel().astype(np.int32)),
        nothing,
        nothing,
    )


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: Sequence[str]) -> None:
    values = key_values(arguments, KEYS)
    backend = choice("backend", values.pop("backend"), BACKENDS)
    given = {key: whole_number(key, value) for key, value in values.items()}
    torch.set_num_threads(given["threads"])
    rng = np.random.default_rng(0)
    centres = 2 * rng.standard_normal((given["clusters"], given["dimension"]), dtype=np.float32)
    cluster = rng.integers(0, given["clusters"], given["documents"])
    of_query = cluster[rng.integers(0, given["documents"], given["queries"])]
    documents = generated(given["documents"], centres, cluster, seed=1)
    queries = generated(given["queries"], centres, of_query, seed=2)
    pool = generated_pool(given["queries"], given["documents"], cluster, of_query)
    before, started, cpu = megabytes(), time.perf_counter(), time.process_time()
    options = MiningOptions(k=given["k"], memory_mb=given["memory_mb"])
    context = MiningContext(queries, documents, memory=options.memory_mb << 20, backend=backend)
    texts = text_numbers(pool.corpus, pool.queries)
    mined = mine_pool(pool, DenseMiner(), options, context, texts)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    for line in table({"generated": report(mined, step=0)}):
        log.info("%s", line)
    above, told = megabytes() - before, "%s, %d threads: %.1f s (%.1f s of CPU), %.0f MB above the vectors"
    log.info(told, backend, given["threads"], seconds, cpu, above)


if __name__ == "__main__":
    entry_point(main)
