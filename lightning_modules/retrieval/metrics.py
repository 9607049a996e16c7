"""Metrics over rankings, as pure functions of arrays.

torchmetrics' own retrieval metrics are not used: they take a score of 0 or less for "not relevant", and do not see
relevant documents that were not retrieved.

Shapes: Q queries, K retrieved documents, M documents. A metric of METRICS gives one value a query, float64 (Q,); one of
AGGREGATES or CORRELATIONS (predictions.py) a single value for all queries together. 1 is best.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.records import Qrels, UserError
from lightning_modules.retrieval.predictions import AGGREGATES, CORRELATIONS

WHOLE = sys.maxsize  # the cut-off of a metric over the whole ranking


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

    def part(self, start: int, stop: int) -> Run:
        """The rankings of some queries."""
        return Run(self.queries[start:stop], self.documents, self.indices[start:stop], self.scores[start:stop])


def id_order(documents: Sequence[str]) -> np.ndarray:
    """(M,) the place of each document where they stand by descending id."""
    order = np.empty(len(documents), dtype=np.int64)
    order[np.argsort(np.array(documents, dtype=object))[::-1]] = np.arange(len(documents))
    return order


def sorted_run(
    queries: Sequence[str],
    documents: Sequence[str],
    indices: np.ndarray,
    scores: np.ndarray,
    order: np.ndarray | None = None,
) -> Run:
    """A run from top documents in any order. indices (Q, K), -1 for none; scores (Q, K). order: id_order, if known."""
    by_id = np.append(id_order(documents) if order is None else order, len(documents))  # the last: what -1 reads
    indices, scores = indices.copy(), scores.copy()
    step = max(1, 2**22 // max(1, indices.shape[1]))
    for start in range(0, len(indices), step):
        rows, values = indices[start : start + step], scores[start : start + step]
        best = np.lexsort((by_id[rows], np.where(rows < 0, np.inf, -values)), axis=1)
        indices[start : start + step] = np.take_along_axis(rows, best, axis=1)
        scores[start : start + step] = np.take_along_axis(values, best, axis=1)
    return Run(queries, documents, indices, scores)


@dataclass(frozen=True, slots=True)
class Judged:
    """What metrics need of Q queries: gains (Q, K) of the ranking, and of the best one (Q, R), at least one column.

    A gain is the grade of a document, 0 if it is not relevant.
    """

    gains: np.ndarray
    ideal: np.ndarray

    @property
    def num_relevant(self) -> np.ndarray:
        """(Q,) relevant documents of each query, retrieved or not."""
        return (self.ideal > 0).sum(1)


def places(run: Run) -> dict[str, int]:
    """Document id -> its position among the run's documents."""
    return {document: i for i, document in enumerate(run.documents)}


def judge(run: Run, qrels: Qrels, place: Mapping[str, int] | None = None) -> Judged:
    """The gains of a run. place: of its documents, if it is known."""
    place = places(run) if place is None else place
    judged = [qrels.get(query, {}) for query in run.queries]
    counts = np.array([len(grades) for grades in judged], dtype=np.int64)
    rows = np.repeat(np.arange(len(judged)), counts)
    columns = np.fromiter((place.get(d, -1) for grades in judged for d in grades), np.int64, len(rows))
    grades = np.fromiter((max(0, g) for grades in judged for g in grades.values()), np.float64, len(rows))

    best = np.lexsort((-grades, rows))
    ideal = np.zeros((len(judged), max(1, counts.max(initial=0))))
    ideal[rows, np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)] = grades[best]

    width = len(run.documents) + 1  # column -1, of documents that are not in the corpus, is no pair of the run
    known = columns >= 0
    keys = (rows * width + columns)[known]
    order = np.argsort(keys)
    keys, grades = np.append(keys[order], -1), np.append(grades[known][order], 0.0)
    pairs = np.arange(len(judged))[:, None] * width + np.where(run.indices < 0, width - 1, run.indices)
    found = np.searchsorted(keys[:-1], pairs)
    return Judged(np.where(keys[found] == pairs, grades[found], 0.0), ideal)


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
    return _share(_dcg(judged.gains, k), _dcg(judged.ideal, k))


def ndcg_exp(judged: Judged, k: int) -> np.ndarray:
    """The same with the gain 2^grade - 1 (Burges et al., 2005)."""
    return _share(_dcg(np.exp2(judged.gains) - 1, k), _dcg(np.exp2(judged.ideal) - 1, k))


def _dcg(gains: np.ndarray, k: int) -> np.ndarray:
    gains = gains[:, :k]
    return (gains / np.log2(np.arange(gains.shape[1]) + 2)).sum(1)


def mrr(judged: Judged, k: int) -> np.ndarray:
    """1 / rank of the first relevant document among the first k, else 0."""
    hits = judged.gains[:, :k] > 0
    return np.where(hits.any(1), 1 / (hits.argmax(1) + 1), 0.0) if hits.shape[1] else np.zeros(len(hits))


def average_precision(judged: Judged, k: int) -> np.ndarray:
    """Mean, over all relevant documents, of the precision at their ranks; 0 for those below rank k (MAP)."""
    hits = judged.gains[:, :k] > 0
    at = hits.cumsum(1) / (np.arange(hits.shape[1]) + 1)
    return _share((at * hits).sum(1), judged.num_relevant)


def r_precision(judged: Judged, k: int) -> np.ndarray:
    """Share of the first R that is relevant, for R relevant documents."""
    wanted = judged.num_relevant
    hits = (judged.gains > 0) & (np.arange(judged.gains.shape[1]) < wanted[:, None])
    return _share(hits.sum(1).astype(float), wanted)


METRICS: dict[str, Callable[[Judged, int], np.ndarray]] = {
    "recall": recall,
    "precision": precision,
    "ndcg": ndcg,
    "ndcg_exp": ndcg_exp,
    "mrr": mrr,
    "map": average_precision,
    "r_precision": r_precision,
}
OF_WHOLE = ("ndcg", "ndcg_exp", "mrr", "map", "r_precision")  # may stand without a cut-off


def parse_metric(name: str) -> tuple[str, int]:
    """ "ndcg@10" -> its name and 10, "ndcg" -> WHOLE, "macro_f1" -> 1. Raises UserError for others."""
    match = re.fullmatch(r"([a-z_0-9]+)(?:@([1-9]\d*))?", name)
    metric, cut = match.groups() if match else ("", None)
    if metric in METRICS and (metric in OF_WHOLE if cut is None else metric != "r_precision"):
        return metric, int(cut or WHOLE)
    if name in AGGREGATES or name in CORRELATIONS:
        return name, 1
    cut = ", ".join(f"{metric}@K" for metric in METRICS if metric != "r_precision")
    whole = ", ".join((*OF_WHOLE, *AGGREGATES, *CORRELATIONS))
    raise UserError(f"metric {name!r}: allowed are {cut}, with K a whole number above 0, and {whole}")


def check_metric(name: str, told: str = "ranking") -> None:
    """Raise UserError for a metric that is unknown, or not of what is told: a ranking, or what a probe learns."""
    parse_metric(name)
    of_told = {"ranking": (*METRICS, "macro_f1", "micro_f1"), "number": tuple(CORRELATIONS)}.get(
        told, tuple(AGGREGATES)
    )
    if name.partition("@")[0] not in of_told:
        raise UserError(f"metric {name!r}: is not of a {told}, allowed are {', '.join(of_told)}")
