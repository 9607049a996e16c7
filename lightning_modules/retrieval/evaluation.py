"""From a benchmark to a run: corpus and queries to vectors, their exact top-k, and BM25, the baseline without vectors.

With several ranks each embeds its share of the corpus and ranks its share of the queries.

Shapes: Q queries, M documents, D dimensions, k documents a query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from datamodules.records import Benchmark, UserError
from lightning_modules.distributed.collectives import rank, world_size
from lightning_modules.encoders.base import Encoder
from lightning_modules.retrieval.bm25 import Bm25Index
from lightning_modules.retrieval.metrics import Run, id_order, sorted_run
from lightning_modules.retrieval.search import Advance, Shards, pair_scores, top_k
from lightning_modules.retrieval.similarity import SIMILARITIES, of_documents, of_queries, scores_of
from lightning_modules.retrieval.vector_cache import VectorCache


def hide_own(indices: np.ndarray, own: Sequence[int]) -> np.ndarray:
    """Rankings (Q, k) with -1 where document own[q] stands in row q."""
    return np.where(indices == np.asarray(own)[:, None], -1, indices)


def rank_benchmark(
    encoder: Encoder,
    benchmark: Benchmark,
    k: int,
    *,
    similarity: str = "dot",
    token_budget: int | None = None,
    advance: Advance | None = None,
    vectors: VectorCache | None = None,
) -> Run:
    """This rank's share of a benchmark's run: queries rank, rank + world size, ...

    k: documents kept for each query. similarity: "dot", "cosine" or "l2", where the benchmark has none of its own.
    advance: called with the number of texts that were encoded. vectors: where they come from, by default the encoder.
    Raises UserError for vectors that are not finite.
    """
    vectors = vectors or VectorCache(encoder, token_budget=token_budget)
    ids, queries, documents = encoded(encoder, benchmark, vectors, advance)
    return rank_vectors(benchmark, ids, queries, documents, k, similarity, device=encoder.device)


def encoded(
    encoder: Encoder, benchmark: Benchmark, vectors: VectorCache, advance: Advance | None = None
) -> tuple[list[str], np.ndarray, Shards]:
    """This rank's queries by id, their vectors (q, D), and those of all documents (M, D), or all training papers."""
    task = encoder.document_task(benchmark.task) if benchmark.training is None else benchmark.task
    documents = vectors.of_all_ranks(list(benchmark.encoded_documents.values()), task, benchmark.name, advance)
    ids = list(benchmark.queries)[rank() :: world_size()]
    queries = vectors.of_this_rank(list(benchmark.queries.values()), benchmark.task, benchmark.name, advance)
    return ids, queries, documents


def rank_vectors(
    benchmark: Benchmark,
    ids: Sequence[str],
    queries: np.ndarray,
    documents: Shards,
    k: int,
    similarity: str = "dot",
    *,
    device: torch.device | str = "cpu",
    advance: Advance | None = None,
) -> Run:
    """The run of some queries, by vectors. ids: of the queries (q, D). documents: (M, D) in the corpus's order.

    advance: called with the number of documents that were searched.
    """
    similarity = benchmark.similarity or similarity
    if similarity not in SIMILARITIES:
        raise UserError(f"similarity: got {similarity!r}, allowed are {', '.join(SIMILARITIES)}")
    prepared, documents = of_queries(queries, similarity), of_documents(documents, similarity)
    place = {name: i for i, name in enumerate(benchmark.corpus)}
    order = id_order(list(place))
    if benchmark.candidates is None:
        wanted = k + benchmark.exclude_query
        indices, scores = top_k(prepared, documents, wanted, order=order, device=device, advance=advance)
    else:
        indices = _rows([benchmark.candidates[query] for query in ids], place)
        scores = pair_scores(prepared, documents, indices)
    first = None
    if benchmark.first is not None:
        first = _rows([benchmark.first.get(query, ()) for query in ids], place)
        of_first = pair_scores(prepared, documents, first)
        indices, scores = np.concatenate([first, indices], axis=1), np.concatenate([of_first, scores], axis=1)
    return _finished(benchmark, ids, place, indices, scores_of(scores, queries, similarity), k, first, order)


def _rows(lists: Sequence[Sequence[str]], place: Mapping[str, int]) -> np.ndarray:
    """Lists of ids as rows (Q, longest), padded with -1."""
    rows = np.full((len(lists), max(map(len, lists), default=0)), -1, dtype=np.int64)
    for row, ids in zip(rows, lists, strict=True):
        row[: len(ids)] = [place[id] for id in ids]
    return rows


def bm25_run(benchmark: Benchmark, k: int) -> Run:
    """This rank's share of the BM25 ranking. Documents that share no word with the query are not retrieved.

    Own candidates and what stands first are ranked by the scores of the whole corpus.
    """
    place = {name: i for i, name in enumerate(benchmark.corpus)}
    ids = list(benchmark.queries)[rank() :: world_size()]
    index, first = Bm25Index(benchmark.corpus.values()), None
    queries = (benchmark.queries[query] for query in ids)
    if benchmark.candidates is not None:
        indices = _rows([benchmark.candidates[query] for query in ids], place)
        scores = index.scores(queries, indices)
    elif benchmark.first is not None:
        first = _rows([benchmark.first.get(query, ()) for query in ids], place)
        indices, scores = index.top_k(queries, min(k + benchmark.exclude_query, len(place)), first=first)
    else:
        indices, scores = index.top_k(queries, min(k + benchmark.exclude_query, len(place)))
    return _finished(benchmark, ids, place, indices, scores, k, first)


def _finished(
    benchmark: Benchmark,
    ids: Sequence[str],
    place: Mapping[str, int],
    indices: np.ndarray,
    scores: np.ndarray,
    k: int,
    first: np.ndarray | None,
    order: np.ndarray | None = None,
) -> Run:
    """The run of retrieved documents, k for each query.

    A query's own document is left out where the benchmark says so. What is first stands before all others; as no
    similarity orders such a ranking, its scores count the places from its end.
    """
    if benchmark.exclude_query:
        indices = hide_own(indices, [place.get(query, -2) for query in ids])
    run = sorted_run(ids, list(place), indices, scores.astype(np.float32), order)
    if first is not None:
        run = _first_in_front(run, first)
    return Run(run.queries, run.documents, run.indices[:, :k], run.scores[:, :k])


def _first_in_front(run: Run, first: np.ndarray) -> Run:
    """Each row's documents once, those in first (Q, f) in front, each part in the order that it has."""
    indices = np.full_like(run.indices, -1)
    for row, (ranked, front) in enumerate(zip(run.indices, first, strict=True)):
        _, once = np.unique(ranked, return_index=True)
        ranked = ranked[np.sort(once)]
        ranked = ranked[ranked >= 0]
        in_front = np.isin(ranked, front)
        indices[row, : len(ranked)] = np.concatenate([ranked[in_front], ranked[~in_front]])
    counted = np.arange(indices.shape[1], 0, -1, dtype=np.float32)
    return Run(run.queries, run.documents, indices, np.where(indices < 0, -np.inf, counted).astype(np.float32))
