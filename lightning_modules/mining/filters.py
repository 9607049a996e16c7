"""Filter candidates for hard negatives, with pure functions.

Shapes: Q queries with k candidates each, best first; M documents. rows: document rows of the candidates, (Q, k), or -1
for no candidate. A filter returns a mask of the candidates to keep, (Q, k) bool.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from datamodules.ragged import Ragged
from datamodules.records import Document
from datamodules.text import input_text


def text_hashes(documents: Iterable[Document]) -> np.ndarray:
    """Return hashes of texts, int64. Texts that differ only in case or spaces have the same hash."""
    texts = (" ".join(input_text(document, " ").lower().split()) for document in documents)
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.fromiter((int.from_bytes(digest, "big", signed=True) for digest in digests), dtype=np.int64)


def text_numbers(corpus: Iterable[Document], queries: Iterable[Document]) -> tuple[np.ndarray, np.ndarray]:
    """Number the texts of documents, (M,), and queries, (Q,). Texts with the same hash have the same number."""
    document_hashes, query_hashes = text_hashes(corpus), text_hashes(queries)
    numbers = np.unique(np.concatenate([document_hashes, query_hashes]), return_inverse=True)[1]
    return numbers[: len(document_hashes)], numbers[len(document_hashes) :]


def pair_keys(queries: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Encode pairs of a query number and a value, (n,) each, as one integer per pair."""
    return queries << 32 | np.asarray(values, dtype=np.int64)


def contained(rows: np.ndarray, lists: Ragged) -> np.ndarray:
    """Return which candidates are in their query's list, (Q, k) bool."""
    values = lists.values.astype(np.int64)
    span = int(max(rows.max(initial=0), values.max(initial=0))) + 1
    keys = lists.owners * span + values
    return np.isin(np.arange(len(rows))[:, None] * span + rows, keys) & (rows >= 0)


def not_known_positive(rows: np.ndarray, positives: Ragged, query_rows: np.ndarray) -> np.ndarray:
    """Keep candidates that are neither a known positive nor the query itself.

    query_rows: row of each query in the corpus, -1 if it is not a document, (Q,).
    """
    return ~contained(rows, positives) & ((rows != query_rows[:, None]) | (query_rows[:, None] < 0))


def different_text(
    rows: np.ndarray, positives: Ragged, document_texts: np.ndarray, query_texts: np.ndarray
) -> np.ndarray:
    """Keep candidates whose text differs from the texts of the query and its positives.

    document_texts, query_texts: text numbers, (M,) and (Q,); equal numbers mean equal texts.
    """
    texts = np.where(rows < 0, -1, document_texts[rows])
    same = contained(texts, Ragged(positives.starts, document_texts[positives.values]))
    return ~same & (texts != query_texts[:, None])


def first_of_text(document_texts: np.ndarray) -> np.ndarray:
    """Return which documents are the first with their text, (M,) bool."""
    first = np.zeros(len(document_texts), dtype=bool)
    first[np.unique(document_texts, return_index=True)[1]] = True
    return first


def from_rank(rows: np.ndarray, first: int) -> np.ndarray:
    """Keep candidates from rank `first` on. The nearest documents are the most likely to be unjudged positives."""
    return np.broadcast_to(np.arange(rows.shape[1]) >= first, rows.shape)


def relative_margin(scores: np.ndarray, positive: np.ndarray, margin: float) -> np.ndarray:
    """Keep candidates that score below s - margin * |s|, where s is the score of the query's positive, (Q,).

    This is TopK-PercPos of NV-Retriever (Moreira et al., 2024), where the margin is 0.05.
    """
    return scores < (positive - margin * np.abs(positive))[:, None]


def absolute_margin(scores: np.ndarray, positive: np.ndarray, margin: float) -> np.ndarray:
    """Keep candidates that score below the positive by more than the margin: TopK-MarginPos of NV-Retriever."""
    return scores < (positive - margin)[:, None]


def positive_score(scores: np.ndarray, positives: Ragged, which: str) -> np.ndarray:
    """Return the "mean", "lowest" or "highest" score of each query's positives, (Q,).

    scores: scores of all positives, (P,). Every query needs a positive.
    """
    starts = positives.starts[:-1]
    if which == "mean":
        return np.add.reduceat(scores, starts) / np.diff(positives.starts)
    return (np.minimum if which == "lowest" else np.maximum).reduceat(scores, starts)


class Sieve:
    """Apply filters one after the other, and count how many of the remaining candidates each removes."""

    def __init__(self, rows: np.ndarray):
        self.kept = rows >= 0
        self.removed: dict[str, int] = {}

    def apply(self, name: str, keeps: np.ndarray) -> None:
        self.removed[name] = int((self.kept & ~keeps).sum())
        self.kept = self.kept & keeps


def sample(
    scores: np.ndarray, kept: np.ndarray, count: int, method: str, seeds: Iterable[int] = (0,), temperature: float = 1.0
) -> np.ndarray:
    """Sample at most `count` of each query's kept candidates without replacement, (Q, k) bool.

    method: "top" takes the first candidates, "random" uses equal probabilities, and "softmax" uses softmax(scores /
        temperature).
    seeds: seeds of the random generator.
    """
    if count >= scores.shape[1]:
        return kept
    if method == "top":
        keys = np.broadcast_to(-np.arange(scores.shape[1], dtype=np.float64), scores.shape)
    else:  # the largest scores after adding Gumbel noise are a softmax sample without replacement
        noise = np.random.default_rng(list(seeds)).gumbel(size=scores.shape)
        keys = noise + (scores / temperature if method == "softmax" else 0.0)
    keys = np.where(kept, keys, -np.inf)
    chosen = np.zeros_like(kept)
    np.put_along_axis(chosen, np.argpartition(-keys, count - 1, axis=1)[:, :count], True, axis=1)
    return chosen & kept
