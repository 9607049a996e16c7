"""Dot product, cosine and L2 distance as one: each is a dot product of vectors that were prepared for it.

    cosine   q / |q|  .  d / |d|
    l2       q . d - |d|^2 / 2, which orders as -|q - d| does

The latter's last term is a column of its own, in two parts, so that float32 vectors lose nothing of it.

Shapes: Q queries, M documents, D dimensions, k documents a query.
"""

from __future__ import annotations

import numpy as np

from lightning_modules.retrieval.search import Shards

SIMILARITIES = ("dot", "cosine", "l2")


def of_queries(vectors: np.ndarray, similarity: str) -> np.ndarray:
    """Queries (Q, D) as they are compared with prepared documents."""
    if similarity == "cosine":
        return _unit(vectors)
    if similarity == "l2":
        return np.concatenate([vectors, np.ones((len(vectors), 2), dtype=np.float32)], axis=1)
    return vectors


def of_documents(documents: Shards, similarity: str) -> Shards:
    """Documents (M, D), prepared block by block when they are read."""
    prepare = {"dot": None, "cosine": _unit, "l2": _with_length}[similarity]
    return Shards(documents.parts, prepare)


def scores_of(products: np.ndarray, queries: np.ndarray, similarity: str) -> np.ndarray:
    """Scores (Q, k) from products of prepared vectors: for l2 minus the distance. queries: (Q, D), unprepared."""
    if similarity != "l2":
        return products
    squares = np.einsum("qd,qd->q", queries.astype(np.float64), queries.astype(np.float64))
    return -np.sqrt(np.maximum(squares[:, None] - 2 * products.astype(np.float64), 0.0))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _with_length(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    half = -np.einsum("md,md->m", wide, wide) / 2
    coarse = half.astype(np.float32)
    rest = (half - coarse).astype(np.float32)
    return np.concatenate([vectors, coarse[:, None], rest[:, None]], axis=1)
