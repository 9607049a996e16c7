"""BM25 as bm25s computes it (Lucene's form, English stop words)."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np

from datamodules.records import Document
from datamodules.text import input_text


class Bm25Index:
    """M documents, to be ranked by words."""

    def __init__(self, documents: Iterable[Document]):
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # its import sets it to debug
        words = _words(documents)
        self.index = bm25s.BM25() if words.vocab else None  # texts in which no word was found
        if self.index is not None:
            self.index.index(words, show_progress=False)

    def top_k(
        self, queries: Iterable[Document], k: int, beside: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents of Q queries, best first: rows (Q, k) int64 and scores (Q, k).

        k: at most M. beside: rows (Q, b) that are given too, in front of the others. Documents that share no word with
        the query are not retrieved: row -1.
        """
        queries = list(queries)
        if self.index is None or not queries:
            rows, scores = np.full((len(queries), k), -1), np.zeros((len(queries), k))
        else:
            rows, scores = self.index.retrieve(_words(queries), k=k, show_progress=False, n_threads=1)
            rows = np.where(scores > 0, rows.astype(np.int64), -1)
        if beside is None:
            return rows, scores
        return np.concatenate([beside, rows], axis=1), np.concatenate([self.scores(queries, beside), scores], axis=1)

    def scores(self, queries: Iterable[Document], rows: np.ndarray) -> np.ndarray:
        """Scores (Q, w) of each query with the documents in rows (Q, w); 0 where a row is -1."""
        found = np.zeros(rows.shape, dtype=np.float32)
        for query, its, values in zip(queries, rows, found, strict=True):
            words = _words([query], as_words=True)[0]
            known = [word for word in words if self.index is not None and word in self.index.vocab_dict]
            if known:
                values[:] = np.where(its < 0, 0.0, self.index.get_scores(known)[its])
        return found


def _words(documents: Iterable[Document], as_words: bool = False):
    import bm25s

    texts = [input_text(d, " ") for d in documents]
    return bm25s.tokenize(texts, stopwords="en", show_progress=False, return_ids=not as_words)
