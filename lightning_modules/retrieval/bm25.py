"""BM25 with bm25s, Lucene's formula and English stop words."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType

import numpy as np

from datamodules.records import Document
from datamodules.text import input_text


class Bm25Index:
    """BM25 index of M documents."""

    def __init__(self, documents: Iterable[Document]):
        bm25s, words = _library(), _tokenize(documents)
        self.index = bm25s.BM25() if words.vocab else None  # None if no document has any words
        if self.index is not None:
            self.index.index(words, show_progress=False)

    def top_k(self, queries: Sequence[Document], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the k best documents of each query, best first: rows (Q, k) int64 and scores (Q, k).

        Documents that share no word with the query are replaced by row -1.

        k: number of documents per query, at most M.
        """
        if self.index is None or not len(queries):
            return np.full((len(queries), k), -1), np.zeros((len(queries), k))
        words = _tokenize(queries)
        rows, scores = self.index.retrieve(words, k=k, show_progress=False, n_threads=1, backend_selection="numpy")
        return np.where(scores > 0, rows.astype(np.int64), -1), scores

    def scores(self, queries: Iterable[Document], rows: np.ndarray) -> np.ndarray:
        """Return the scores (Q, w) of each query with the documents in its rows (Q, w); row -1 scores 0."""
        scores = np.zeros(rows.shape, dtype=np.float32)
        for query, query_rows, query_scores in zip(queries, rows, scores, strict=True):
            words = _tokenize([query], return_ids=False)[0]
            known_words = [word for word in words if self.index is not None and word in self.index.vocab_dict]
            if self.index is not None and known_words:
                query_scores[:] = np.where(query_rows < 0, 0.0, self.index.get_scores(known_words)[query_rows])
        return scores


def _library() -> ModuleType:
    """Import bm25s. It imports JAX if that is installed, and JAX then reserves three quarters of a GPU's memory.

    So JAX cannot be imported while bm25s is, unless the program already uses it.
    """
    hidden = "jax" not in sys.modules
    if hidden:
        sys.modules["jax"] = None  # type: ignore[assignment]
    try:
        import bm25s
    finally:
        if hidden:
            del sys.modules["jax"]
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # the import sets it to DEBUG
    return bm25s


def _tokenize(documents: Iterable[Document], return_ids: bool = True):
    bm25s = _library()
    texts = [input_text(document, " ") for document in documents]
    return bm25s.tokenize(texts, stopwords="en", show_progress=False, return_ids=return_ids)
