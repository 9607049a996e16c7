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

from datamodules.records import SIMILARITIES, Benchmark, UserError, check_choice
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

    queries: vectors of query_ids, (Q, D).
    documents: vectors of the corpus, in its order, (M, D).
    similarity: "dot", "cosine" or "l2", unless the benchmark has its own.
    advance: called with the number of query-document pairs compared since the last call.
    """
    similarity = check_choice("similarity", benchmark.similarity or similarity, SIMILARITIES)
    prepared, documents = _prepare_queries(queries, similarity), _prepare_documents(documents, similarity)

    def search(depth: int, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, products = top_k(prepared, documents, depth, order=order, device=device, advance=advance)
        return rows, _scores(products, queries, similarity)

    def score(rows: np.ndarray) -> np.ndarray:
        return _scores(pair_scores(prepared, documents, rows), queries, similarity)

    return _rank(benchmark, query_ids, k, search, score)


def rank_bm25(benchmark: Benchmark, k: int) -> Run:
    """Rank this rank's share of the queries by BM25. Documents that share no word with the query are not retrieved.

    Word statistics come from the whole corpus, even if queries have their own candidates.
    """
    query_ids = list(benchmark.queries)[rank() :: world_size()]
    queries = [benchmark.queries[query] for query in query_ids]
    index = Bm25Index(benchmark.corpus.values())
    return _rank(
        benchmark,
        query_ids,
        k,
        lambda depth, _: index.top_k(queries, min(depth, len(benchmark.corpus))),
        lambda rows: index.scores(queries, rows),
    )


def _rank(
    benchmark: Benchmark,
    query_ids: Sequence[str],
    k: int,
    search: Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]],
    score: Callable[[np.ndarray], np.ndarray],
) -> Run:
    """Return a run of k documents per query, according to the benchmark's settings.

    search: function (k, id_order) -> rows and scores of the best documents of the corpus, (Q, k) each.
    score: function of rows (Q, w), padded with -1, that returns the scores of these documents, (Q, w).
    """
    if benchmark.training is not None:
        raise UserError(
            f"{benchmark.name}: has training papers, so a probe predicts its documents; they are not ranked"
        )
    positions = positions_of(list(benchmark.corpus))
    order = id_order(list(positions))
    if benchmark.candidates is None:
        indices, scores = search(k + benchmark.exclude_query, order)
    else:
        indices = _padded_positions([benchmark.candidates[query] for query in query_ids], positions)
        scores = score(indices)
    if benchmark.first is not None:
        first = _padded_positions([benchmark.first.get(query, ()) for query in query_ids], positions)
        indices, scores = np.concatenate([first, indices], axis=1), np.concatenate([score(first), scores], axis=1)
    if benchmark.exclude_query:
        query_positions = np.array([positions.get(query, -2) for query in query_ids])[:, None]
        indices = np.where(indices == query_positions, -1, indices)
    run = sorted_run(query_ids, list(positions), indices, scores.astype(np.float32), order)
    if benchmark.first is not None:
        run = _move_to_front(run, first)
    return Run(run.queries, run.documents, run.indices[:, :k], run.scores[:, :k])


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
    """Turn products of prepared vectors into scores, (Q, k): negative distances for l2, otherwise the products."""
    if similarity != "l2":
        return products
    squares = np.einsum("qd,qd->q", queries.astype(np.float64), queries.astype(np.float64))
    return -np.sqrt(np.maximum(squares[:, None] - 2 * products.astype(np.float64), 0.0))


def _unit_length(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _with_half_square(vectors: np.ndarray) -> np.ndarray:
    """Append -|d|^2 / 2 as two float32 columns, coarse and rest, to keep its precision: (n, D) -> (n, D + 2)."""
    wide = vectors.astype(np.float64)
    half = -np.einsum("md,md->m", wide, wide) / 2
    coarse = half.astype(np.float32)
    rest = (half - coarse).astype(np.float32)
    return np.concatenate([vectors, coarse[:, None], rest[:, None]], axis=1)


def _padded_positions(id_lists: Sequence[Sequence[str]], positions: Mapping[str, int]) -> np.ndarray:
    """Return lists of ids as rows of positions without repetitions, (Q, longest), padded with -1."""
    lists = [list(dict.fromkeys(ids)) for ids in id_lists]
    rows = np.full((len(lists), max(map(len, lists), default=0)), -1, dtype=np.int64)
    for row, ids in zip(rows, lists, strict=True):
        row[: len(ids)] = [positions[id] for id in ids]
    return rows


def _move_to_front(run: Run, first: np.ndarray) -> Run:
    """Remove repeated documents from each ranking, and move the documents in `first`, (Q, f), to the front.

    Otherwise, documents keep their order. The new order does not follow a similarity, so the scores just count down to
    1.
    """
    indices = np.full_like(run.indices, -1)
    for row, (ranked, front) in enumerate(zip(run.indices, first, strict=True)):
        _, once = np.unique(ranked, return_index=True)
        ranked = ranked[np.sort(once)]
        ranked = ranked[ranked >= 0]
        in_front = np.isin(ranked, front)
        indices[row, : len(ranked)] = np.concatenate([ranked[in_front], ranked[~in_front]])
    countdown = np.arange(indices.shape[1], 0, -1, dtype=np.float32)
    return Run(run.queries, run.documents, indices, np.where(indices < 0, -np.inf, countdown).astype(np.float32))
