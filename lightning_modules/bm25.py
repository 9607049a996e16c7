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

    def top_k(self, queries: Iterable[Document], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents of Q queries, best first: rows (Q, k) int64 and scores (Q, k).

        k: at most M. Documents that share no word with the query are not retrieved: row -1.
        """
        queries = list(queries)
        if self.index is None or not queries:
            return np.full((len(queries), k), -1), np.zeros((len(queries), k))
        rows, scores = self.index.retrieve(_words(queries), k=k, show_progress=False, n_threads=1)
        return np.where(scores > 0, rows.astype(np.int64), -1), scores


def _words(documents: Iterable[Document]):
    import bm25s

    return bm25s.tokenize([input_text(d, " ") for d in documents], stopwords="en", show_progress=False)
