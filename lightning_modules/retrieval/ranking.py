"""Rank a benchmark's documents for its queries, by vectors or by BM25.

Dot product, cosine and L2 distance are all dot products of prepared vectors:

    cosine   q / |q|  .  d / |d|
    l2       q . d - |d|^2 / 2, which ranks documents like -|q - d|

Shapes: Q queries of this rank, M documents, D dimensions, k documents per query.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from datamodules.records import SIMILARITIES, Benchmark, check_choice
from lightning_modules.distributed.collectives import rank, world_size
from lightning_modules.retrieval.bm25 import Bm25Index
from lightning_modules.retrieval.metrics import Run, id_order, positions_of, sorted_run
from lightning_modules.retrieval.search import Shards, pair_scores, top_k


def rank_vectors(
    benchmark: Benchmark,
    query_ids: Sequence[str],
    queries: np.ndarray,
    documents: Shards,
    k: int,
    similarity: str = "dot",
    *,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> Run:
    """Rank a benchmark's documents by their vectors, exactly.

    queries: vectors of query_ids, (Q, D). documents: vectors of the corpus, in its order, (M, D).
    similarity: "dot", "cosine" or "l2", unless the benchmark has its own.
    advance: called with the number of query-document pairs compared since the last call.
    """
    similarity = check_choice("similarity", benchmark.similarity or similarity, SIMILARITIES)
    prepared, documents = _prepare_queries(queries, similarity), _prepare_documents(documents, similarity)
    positions = positions_of(list(benchmark.corpus))
    order = id_order(list(positions))
    if benchmark.candidates is None:
        depth = k + benchmark.exclude_query
        indices, scores = top_k(prepared, documents, depth, order=order, device=device, advance=advance)
    else:
        indices = _padded_positions([benchmark.candidates[query] for query in query_ids], positions)
        scores = pair_scores(prepared, documents, indices)
    first = _first_positions(benchmark, query_ids, positions)
    if first is not None:
        first_scores = pair_scores(prepared, documents, first)
        indices, scores = np.concatenate([first, indices], axis=1), np.concatenate([first_scores, scores], axis=1)
    return _to_run(benchmark, query_ids, positions, indices, _scores(scores, queries, similarity), k, first, order)


def rank_bm25(benchmark: Benchmark, k: int) -> Run:
    """Rank this rank's share of the queries by BM25. Documents that share no word with the query are not retrieved.

    Word statistics are those of the whole corpus, even if queries have their own candidates.
    """
    positions = positions_of(list(benchmark.corpus))
    query_ids = list(benchmark.queries)[rank() :: world_size()]
    index, first = Bm25Index(benchmark.corpus.values()), None
    queries = (benchmark.queries[query] for query in query_ids)
    if benchmark.candidates is not None:
        indices = _padded_positions([benchmark.candidates[query] for query in query_ids], positions)
        scores = index.scores(queries, indices)
    else:
        first = _first_positions(benchmark, query_ids, positions)
        indices, scores = index.top_k(queries, min(k + benchmark.exclude_query, len(positions)), first=first)
    return _to_run(benchmark, query_ids, positions, indices, scores, k, first)


def _prepare_queries(vectors: np.ndarray, similarity: str) -> np.ndarray:
    if similarity == "cosine":
        return _unit_length(vectors)
    if similarity == "l2":
        return np.concatenate([vectors, np.ones((len(vectors), 2), dtype=np.float32)], axis=1)  # (Q, D + 2)
    return vectors


def _prepare_documents(documents: Shards, similarity: str) -> Shards:
    """Prepare documents block by block as they are read."""
    prepare = {"dot": None, "cosine": _unit_length, "l2": _with_half_square}[similarity]
    return Shards(documents.parts, prepare)


def _scores(products: np.ndarray, queries: np.ndarray, similarity: str) -> np.ndarray:
    """Turn products of prepared vectors into scores, (Q, k): negative distances for l2, else the products."""
    if similarity != "l2":
        return products
    squares = np.einsum("qd,qd->q", queries.astype(np.float64), queries.astype(np.float64))
    return -np.sqrt(np.maximum(squares[:, None] - 2 * products.astype(np.float64), 0.0))


def _unit_length(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _with_half_square(vectors: np.ndarray) -> np.ndarray:
    """Append -|d|^2 / 2 in two float32 columns, coarse and rest, so that no digit is lost: (n, D) -> (n, D + 2)."""
    wide = vectors.astype(np.float64)
    half = -np.einsum("md,md->m", wide, wide) / 2
    coarse = half.astype(np.float32)
    rest = (half - coarse).astype(np.float32)
    return np.concatenate([vectors, coarse[:, None], rest[:, None]], axis=1)


def _first_positions(benchmark: Benchmark, query_ids: Sequence[str], positions: Mapping[str, int]) -> np.ndarray | None:
    """Return the documents that come first in each ranking, (Q, f), padded with -1; None if there are none."""
    if benchmark.first is None:
        return None
    return _padded_positions([benchmark.first.get(query, ()) for query in query_ids], positions)


def _padded_positions(id_lists: Sequence[Sequence[str]], positions: Mapping[str, int]) -> np.ndarray:
    """Return lists of ids as rows of positions, (Q, longest), padded with -1."""
    rows = np.full((len(id_lists), max(map(len, id_lists), default=0)), -1, dtype=np.int64)
    for row, ids in zip(rows, id_lists, strict=True):
        row[: len(ids)] = [positions[id] for id in ids]
    return rows


def _to_run(
    benchmark: Benchmark,
    query_ids: Sequence[str],
    positions: Mapping[str, int],
    indices: np.ndarray,
    scores: np.ndarray,
    k: int,
    first: np.ndarray | None,
    order: np.ndarray | None = None,
) -> Run:
    """Turn retrieved documents into a run of k documents per query, without the query's own document if it is excluded.

    first: documents to move to the front, (Q, f). Such a ranking does not follow a similarity, so its scores count down
    to 1 at the last rank.
    """
    if benchmark.exclude_query:
        own = np.array([positions.get(query, -2) for query in query_ids])[:, None]
        indices = np.where(indices == own, -1, indices)
    run = sorted_run(query_ids, list(positions), indices, scores.astype(np.float32), order)
    if first is not None:
        run = _move_to_front(run, first)
    return Run(run.queries, run.documents, run.indices[:, :k], run.scores[:, :k])


def _move_to_front(run: Run, first: np.ndarray) -> Run:
    """Keep each document of a row once, and move those in first (Q, f) to the front; both parts keep their order."""
    indices = np.full_like(run.indices, -1)
    for row, (ranked, front) in enumerate(zip(run.indices, first, strict=True)):
        _, once = np.unique(ranked, return_index=True)
        ranked = ranked[np.sort(once)]
        ranked = ranked[ranked >= 0]
        in_front = np.isin(ranked, front)
        indices[row, : len(ranked)] = np.concatenate([ranked[in_front], ranked[~in_front]])
    countdown = np.arange(indices.shape[1], 0, -1, dtype=np.float32)
    return Run(run.queries, run.documents, indices, np.where(indices < 0, -np.inf, countdown).astype(np.float32))
