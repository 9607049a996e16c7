"""What a candidate must pass to become a hard negative: pure functions that say which candidates they keep.

Shapes: Q queries, k candidates of each, best first. rows: (Q, k) documents, -1 for none. A filter gives (Q, k) bool.
Lists (starts, numbers): those of query q are numbers[starts[q] : starts[q + 1]].
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Lists = tuple[np.ndarray, np.ndarray]
POSITIVES = ("mean", "lowest", "highest")
SAMPLINGS = ("top", "random", "softmax")


def owners(lists: Lists) -> np.ndarray:
    """The query of each number in the lists."""
    starts, _ = lists
    return np.repeat(np.arange(len(starts) - 1), np.diff(starts))


def contained(rows: np.ndarray, lists: Lists) -> np.ndarray:
    """Whether a query's candidate is in its list."""
    numbers = lists[1].astype(np.int64)
    span = int(max(rows.max(initial=0), numbers.max(initial=0))) + 1
    keys = owners(lists) * span + numbers
    return np.isin(np.arange(len(rows))[:, None] * span + rows, keys) & (rows >= 0)


def unknown(rows: np.ndarray, positives: Lists, own: np.ndarray) -> np.ndarray:
    """No known positive, and not the query itself. own: (Q,) its document, or -1."""
    return ~contained(rows, positives) & ((rows != own[:, None]) | (own[:, None] < 0))


def other_text(
    rows: np.ndarray, positives: Lists, text_of_document: np.ndarray, text_of_query: np.ndarray
) -> np.ndarray:
    """Not the text of a positive or of the query. text_of_...: numbers that are equal where texts are."""
    texts = np.where(rows < 0, -1, text_of_document[rows])
    same = contained(texts, (positives[0], text_of_document[positives[1]]))
    return ~same & (texts != text_of_query[:, None])


def originals(text_of_document: np.ndarray) -> np.ndarray:
    """(M,) bool, whether a document is the first of those that have its text."""
    found = np.zeros(len(text_of_document), dtype=bool)
    found[np.unique(text_of_document, return_index=True)[1]] = True
    return found


def rank_window(rows: np.ndarray, first: int) -> np.ndarray:
    """From a rank of the miner's on: the nearest are the likeliest to be positives that nobody judged."""
    return np.broadcast_to(np.arange(rows.shape[1]) >= first, rows.shape)


def relative_margin(scores: np.ndarray, positive: np.ndarray, margin: float) -> np.ndarray:
    """Below (1 - margin) of the positive's score: TopK-PercPos of NV-Retriever (Moreira et al., 2024), there 0.05.

    positive: (Q,). Of a negative score, the margin is taken off all the same.
    """
    return scores < (positive - margin * np.abs(positive))[:, None]


def absolute_margin(scores: np.ndarray, positive: np.ndarray, margin: float) -> np.ndarray:
    """Below the positive's score by a margin: TopK-MarginPos of NV-Retriever."""
    return scores < (positive - margin)[:, None]


def positive_score(scores: np.ndarray, positives: Lists, which: str) -> np.ndarray:
    """(Q,) the mean, lowest or highest of the scores (P,) of a query's positives, of which it has at least one."""
    starts = positives[0][:-1]
    if which == "mean":
        return np.add.reduceat(scores, starts) / np.diff(positives[0])
    return (np.minimum if which == "lowest" else np.maximum).reduceat(scores, starts)


class Sieve:
    """Applies filters one after the other, and counts what each takes of what the ones before left."""

    def __init__(self, rows: np.ndarray):
        self.kept = rows >= 0
        self.taken: dict[str, int] = {}

    def apply(self, name: str, keeps: np.ndarray) -> None:
        self.taken[name] = int((self.kept & ~keeps).sum())
        self.kept = self.kept & keeps


def sample(
    scores: np.ndarray, kept: np.ndarray, count: int, how: str, seeds: Iterable[int] = (0,), temperature: float = 1.0
) -> np.ndarray:
    """Of the kept candidates at most count: "top", "random" (all alike), or "softmax" of scores / temperature.

    Drawn without replacement, by Gumbel's trick. seeds: the draw depends on them alone.
    """
    order = -np.arange(scores.shape[1], dtype=np.float64) * np.ones((len(scores), 1))  # top
    if how != "top":
        noise = np.random.default_rng(list(seeds)).gumbel(size=scores.shape)
        order = noise + (scores / temperature if how == "softmax" else 0.0)
    order = np.where(kept, order, -np.inf)
    if count >= scores.shape[1]:
        return kept
    chosen = np.zeros_like(kept)
    np.put_along_axis(chosen, np.argpartition(-order, count - 1, axis=1)[:, :count], True, axis=1)
    return chosen & kept
