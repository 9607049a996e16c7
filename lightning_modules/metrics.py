"""Retrieval metrics as pure functions over runs, and the torchmetrics.Metric that averages them over ranks.

torchmetrics' own retrieval metrics are not used: they take a score of 0 or less for "not relevant", and do not see
relevant documents that were not retrieved.

Shapes: Q queries, K retrieved documents. Every function gives one value a query, float64 (Q,); 1 is best.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from datamodules.records import Qrels, UserError


@dataclass(frozen=True, slots=True)
class Run:
    """A ranking of documents for every query, best first.

    queries, documents: ids. indices: (Q, K) positions in documents, -1 where a query has fewer than K. scores: (Q, K).
    Equal scores stand by descending document id, as trec_eval has them.
    """

    queries: Sequence[str]
    documents: Sequence[str]
    indices: np.ndarray
    scores: np.ndarray


def sorted_run(queries: Sequence[str], documents: Sequence[str], indices: np.ndarray, scores: np.ndarray) -> Run:
    """A run from top documents in any order. indices (Q, K), -1 for none; scores (Q, K)."""
    by_id = np.empty(len(documents) + 1, dtype=np.int64)
    by_id[np.argsort(np.array(documents, dtype=object))] = np.arange(len(documents))
    by_id[-1] = -1  # what index -1 reads: none, which comes last
    key = np.where(indices < 0, -np.inf, scores)
    order = np.lexsort((-by_id[indices], -key), axis=1)
    return Run(
        queries, documents, np.take_along_axis(indices, order, axis=1), np.take_along_axis(scores, order, axis=1)
    )


@dataclass(frozen=True, slots=True)
class Judged:
    """A run with its judgements. gains: (Q, K) grade of each retrieved document, 0 if unjudged. ideal: (Q, J) grades of
    all relevant documents, highest first, padded with 0.
    """

    gains: np.ndarray
    ideal: np.ndarray

    @property
    def num_relevant(self) -> np.ndarray:
        return (self.ideal > 0).sum(1)


def judge(run: Run, qrels: Qrels) -> Judged:
    """Grades of a run's documents. Negative grades count as 0."""
    place = {document: i for i, document in enumerate(run.documents)}
    gains = np.zeros(run.indices.shape)
    grades = [{d: max(0, g) for d, g in qrels.get(query, {}).items()} for query in run.queries]
    for row, judged in enumerate(grades):
        lookup = {place[d]: g for d, g in judged.items() if d in place}
        gains[row] = [lookup.get(i, 0) for i in run.indices[row].tolist()]
    longest = max((len(judged) for judged in grades), default=0)
    ideal = np.zeros((len(grades), max(1, longest)))
    for row, judged in enumerate(grades):
        ideal[row, : len(judged)] = sorted(judged.values(), reverse=True)
    return Judged(gains, ideal)


def _share(value: np.ndarray, of: np.ndarray) -> np.ndarray:
    return np.divide(value, of, out=np.zeros(len(value)), where=of > 0)


def recall(judged: Judged, k: int) -> np.ndarray:
    """Share of the relevant documents that are among the first k."""
    return _share((judged.gains[:, :k] > 0).sum(1).astype(float), judged.num_relevant)


def precision(judged: Judged, k: int) -> np.ndarray:
    """Share of the first k that is relevant."""
    return (judged.gains[:, :k] > 0).sum(1) / k


def ndcg(judged: Judged, k: int) -> np.ndarray:
    """Discounted cumulative gain of the first k over that of the best ranking; the gain is the grade."""

    def dcg(gains: np.ndarray) -> np.ndarray:
        gains = gains[:, :k]
        return (gains / np.log2(np.arange(gains.shape[1]) + 2)).sum(1)

    return _share(dcg(judged.gains), dcg(judged.ideal))


def mrr(judged: Judged, k: int) -> np.ndarray:
    """1 / rank of the first relevant document among the first k, else 0."""
    hits = judged.gains[:, :k] > 0
    return np.where(hits.any(1), 1 / (hits.argmax(1) + 1), 0.0)


def average_precision(judged: Judged, k: int) -> np.ndarray:
    """Mean, over all relevant documents, of the precision at their ranks; 0 for those below rank k (MAP)."""
    hits = judged.gains[:, :k] > 0
    at = hits.cumsum(1) / (np.arange(hits.shape[1]) + 1)
    return _share((at * hits).sum(1), judged.num_relevant)


METRICS: dict[str, Callable[[Judged, int], np.ndarray]] = {
    "recall": recall,
    "precision": precision,
    "ndcg": ndcg,
    "mrr": mrr,
    "map": average_precision,
}


def parse_metric(name: str) -> tuple[Callable[[Judged, int], np.ndarray], int]:
    """ "ndcg@10" -> the function and 10. Raises UserError for another form or an unknown metric."""
    match = re.fullmatch(r"([a-z]+)@([1-9]\d*)", name)
    if not match or match[1] not in METRICS:
        allowed = ", ".join(f"{metric}@K" for metric in METRICS)
        raise UserError(f"metric {name!r}: allowed are {allowed}, with K a whole number above 0")
    return METRICS[match[1]], int(match[2])


class MeanOverQueries(Metric):
    """Means of several metrics over all queries of all ranks, each query once however often it was seen.

    names: such as "ndcg@10". Queries without any relevant document are left out of the mean.
    """

    full_state_update = False

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.names = tuple(names)
        self.functions = [parse_metric(name) for name in names]
        self.add_state("queries", default=[], dist_reduce_fx="cat")  # positions among the benchmark's queries
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, positions: Tensor, judged: Judged) -> None:
        """positions: (q,) int64, of the judged queries among all queries of the benchmark."""
        values = np.stack([function(judged, k) for function, k in self.functions], axis=1)
        keep = torch.from_numpy(judged.num_relevant > 0)
        self.queries.append(positions[keep])
        self.values.append(torch.from_numpy(values)[keep])

    def compute(self) -> Mapping[str, float]:
        if not len(self.queries):
            return dict.fromkeys(self.names, 0.0)
        queries = torch.cat(self.queries) if isinstance(self.queries, list) else self.queries
        values = torch.cat(self.values) if isinstance(self.values, list) else self.values
        _, first = np.unique(queries.cpu().numpy(), return_index=True)
        means = values.cpu().numpy()[first].mean(0) if len(first) else np.zeros(len(self.names))
        return {name: float(mean) for name, mean in zip(self.names, means, strict=True)}
