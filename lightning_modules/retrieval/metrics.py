"""Metrics of rankings and predictions, as pure functions of arrays.

We do not use torchmetrics' retrieval metrics: they treat a score of 0 or less as "not relevant", and do not count
relevant documents that were not retrieved.

Shapes: Q queries, K retrieved documents per query, M documents. Every metric is best at 1. RANKING_METRICS return one
value per query, float64 (Q,). CLASS_METRICS and NUMBER_METRICS return one value for all queries together.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.records import Qrels, UserError

WHOLE_RANKING = sys.maxsize  # cut-off of a metric without a number in its name
SORT_BLOCK = 2**22  # number of ranked documents to sort at a time


@dataclass(frozen=True, slots=True)
class Run:
    """A ranking of documents for every query, best first.

    queries, documents: ids.
    indices: (Q, K) positions in documents, padded with -1.
    scores: (Q, K). Documents with equal scores are ordered by descending id, as in trec_eval.
    """

    queries: Sequence[str]
    documents: Sequence[str]
    indices: np.ndarray
    scores: np.ndarray

    def slice(self, start: int, stop: int) -> Run:
        """Return the rankings of queries start to stop - 1."""
        return Run(self.queries[start:stop], self.documents, self.indices[start:stop], self.scores[start:stop])


def id_order(documents: Sequence[str]) -> np.ndarray:
    """Return each document's position in descending order of ids, (M,)."""
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
    """Sort each query's documents into a run.

    indices: (Q, K) positions in documents, in any order, padded with -1.
    scores: (Q, K).
    order: id_order(documents), computed here by default.
    """
    # Index -1 refers to the last entry.
    by_id = np.append(id_order(documents) if order is None else order, len(documents))
    indices, scores = indices.copy(), scores.copy()
    step = max(1, SORT_BLOCK // max(1, indices.shape[1]))
    for start in range(0, len(indices), step):
        rows, values = indices[start : start + step], scores[start : start + step]
        best = np.lexsort((by_id[rows], np.where(rows < 0, np.inf, -values)), axis=1)
        indices[start : start + step] = np.take_along_axis(rows, best, axis=1)
        scores[start : start + step] = np.take_along_axis(values, best, axis=1)
    return Run(queries, documents, indices, scores)


@dataclass(frozen=True, slots=True)
class Judged:
    """The gains of a run, from which ranking metrics are computed. A gain is a document's grade, or 0 if irrelevant.

    gains: (Q, K), in the order of the ranking.
    ideal: (Q, R), in the order of the best possible ranking, R >= 1.
    """

    gains: np.ndarray
    ideal: np.ndarray

    @property
    def num_relevant(self) -> np.ndarray:
        """Number of relevant documents of each query, retrieved or not, (Q,)."""
        return (self.ideal > 0).sum(1)


def positions_of(ids: Sequence[str]) -> dict[str, int]:
    """Return the position of each id."""
    return {id: position for position, id in enumerate(ids)}


def judge(run: Run, qrels: Qrels, positions: Mapping[str, int] | None = None) -> Judged:
    """Look up the gains of a run. positions: positions_of(run.documents), computed here by default."""
    positions = positions_of(run.documents) if positions is None else positions
    judgements = [qrels.get(query, {}) for query in run.queries]
    counts = np.array([len(grades) for grades in judgements], dtype=np.int64)
    rows = np.repeat(np.arange(len(judgements)), counts)
    columns = np.fromiter((positions.get(d, -1) for grades in judgements for d in grades), np.int64, len(rows))
    grades = np.fromiter((max(0, g) for grades in judgements for g in grades.values()), np.float64, len(rows))

    best = np.lexsort((-grades, rows))
    ideal = np.zeros((len(judgements), max(1, counts.max(initial=0))))
    ideal[rows, np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)] = grades[best]

    # Encode each judgement as one number, row * width + column. Judged documents outside the corpus are left out.
    width = len(run.documents) + 1
    in_corpus = columns >= 0
    keys = (rows * width + columns)[in_corpus]
    order = np.argsort(keys)
    keys, grades = np.append(keys[order], -1), np.append(grades[in_corpus][order], 0.0)
    pairs = np.arange(len(judgements))[:, None] * width + np.where(run.indices < 0, width - 1, run.indices)
    matches = np.searchsorted(keys[:-1], pairs)
    return Judged(np.where(keys[matches] == pairs, grades[matches], 0.0), ideal)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide, with 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0)


def recall(judged: Judged, k: int) -> np.ndarray:
    """Share of the relevant documents that are among the first k."""
    return _ratio((judged.gains[:, :k] > 0).sum(1).astype(float), judged.num_relevant)


def precision(judged: Judged, k: int) -> np.ndarray:
    """Share of the first k documents that are relevant."""
    return (judged.gains[:, :k] > 0).sum(1) / k


def ndcg(judged: Judged, k: int) -> np.ndarray:
    """Discounted cumulative gain of the first k, divided by the best possible value. The gain is the grade."""
    return _ratio(_dcg(judged.gains, k), _dcg(judged.ideal, k))


def ndcg_exp(judged: Judged, k: int) -> np.ndarray:
    """nDCG with the gain 2^grade - 1 (Burges et al., 2005)."""
    return _ratio(_dcg(np.exp2(judged.gains) - 1, k), _dcg(np.exp2(judged.ideal) - 1, k))


def _dcg(gains: np.ndarray, k: int) -> np.ndarray:
    gains = gains[:, :k]
    return (gains / np.log2(np.arange(gains.shape[1]) + 2)).sum(1)


def mrr(judged: Judged, k: int) -> np.ndarray:
    """Reciprocal rank of the first relevant document among the first k, or 0."""
    hits = judged.gains[:, :k] > 0
    return np.where(hits.any(1), 1 / (hits.argmax(1) + 1), 0.0) if hits.shape[1] else np.zeros(len(hits))


def average_precision(judged: Judged, k: int) -> np.ndarray:
    """Mean precision at the ranks of all relevant documents (MAP); those below rank k count 0."""
    hits = judged.gains[:, :k] > 0
    precision_at_rank = hits.cumsum(1) / (np.arange(hits.shape[1]) + 1)
    return _ratio((precision_at_rank * hits).sum(1), judged.num_relevant)


def r_precision(judged: Judged, k: int) -> np.ndarray:
    """Share of relevant documents among the first R, for a query with R relevant documents."""
    num_relevant = judged.num_relevant
    hits = (judged.gains > 0) & (np.arange(judged.gains.shape[1]) < num_relevant[:, None])
    return _ratio(hits.sum(1).astype(float), num_relevant)


def class_counts(predicted: np.ndarray, queries: np.ndarray, classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Count how often each class is predicted correctly, is predicted, and is true, (3, num_classes).

    predicted: distinct classes of each query, (Q, p), padded with -1.
    queries, classes: true pairs, (n,) each.
    """
    correct = classes[(predicted[queries] == classes[:, None]).any(1)]
    all_predicted = predicted[predicted >= 0]
    return np.stack([np.bincount(part, minlength=num_classes) for part in (correct, all_predicted, classes)])


def macro_f1(counts: np.ndarray) -> float:
    """Mean F1 over the classes that are predicted or true for some query. counts: (3, C) of class_counts."""
    hits, predicted_or_true = counts[0], counts[1] + counts[2]
    occurs = predicted_or_true > 0
    return float((2 * hits[occurs] / predicted_or_true[occurs]).mean()) if occurs.any() else 0.0


def macro_f1_of_labels(counts: np.ndarray) -> float:
    """Macro F1 for queries with several labels. A label that never occurs counts as 0."""
    return float((2 * counts[0] / np.maximum(1, counts[1] + counts[2])).mean())


def micro_f1(counts: np.ndarray) -> float:
    """F1 over all decisions pooled. It equals accuracy if each query has one class."""
    return float(2 * counts[0].sum() / max(1, (counts[1] + counts[2]).sum()))


def binary_f1(counts: np.ndarray) -> float:
    """F1 of the second of two classes. Raises UserError if there are not exactly two."""
    if counts.shape[1] != 2:
        raise UserError(
            f"metric f1 needs exactly two classes (it scores the second), but there are {counts.shape[1]}; use macro_f1"
        )
    return float(2 * counts[0, 1] / max(1, counts[1, 1] + counts[2, 1]))


def kendall_tau(predicted: np.ndarray, true: np.ndarray) -> float:
    """Kendall's tau-b between predicted and true numbers, (Q,) each; 0 if one of them is constant."""
    try:
        from scipy.stats import kendalltau
    except ImportError as error:
        raise UserError("metric kendall_tau needs SciPy (pip install scipy)") from error
    tau = float(kendalltau(predicted, true).statistic)
    return 0.0 if np.isnan(tau) else tau


RANKING_METRICS: dict[str, Callable[[Judged, int], np.ndarray]] = {
    "recall": recall,
    "precision": precision,
    "ndcg": ndcg,
    "ndcg_exp": ndcg_exp,
    "mrr": mrr,
    "map": average_precision,
    "r_precision": r_precision,
}
CLASS_METRICS: dict[str, Callable[[np.ndarray], float]] = {"macro_f1": macro_f1, "micro_f1": micro_f1, "f1": binary_f1}
LABEL_METRICS = CLASS_METRICS | {"macro_f1": macro_f1_of_labels}
NUMBER_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {"kendall_tau": kendall_tau}
CUT_OFF_IS_OPTIONAL = ("ndcg", "ndcg_exp", "mrr", "map", "r_precision")


def parse_metric(name: str) -> tuple[str, int]:
    """Split a metric into its name and its cut-off: "ndcg@10" -> ("ndcg", 10).

    "ndcg" gets the cut-off WHOLE_RANKING, and "macro_f1" gets 1. Raises UserError for an unknown metric.
    """
    match = re.fullmatch(r"([a-z_0-9]+)(?:@([1-9]\d*))?", name)
    metric, cut_off = match.groups() if match else ("", None)
    if metric in RANKING_METRICS and (metric in CUT_OFF_IS_OPTIONAL if cut_off is None else metric != "r_precision"):
        return metric, int(cut_off or WHOLE_RANKING)
    if name in CLASS_METRICS or name in NUMBER_METRICS:
        return name, 1
    with_cut_off = ", ".join(f"{metric}@K" for metric in RANKING_METRICS if metric != "r_precision")
    without = ", ".join((*CUT_OFF_IS_OPTIONAL, *CLASS_METRICS, *NUMBER_METRICS))
    raise UserError(f"metric {name!r}: expected one of {with_cut_off} with a positive whole number K, {without}")


def check_metric(name: str, kind: str = "ranking") -> None:
    """Raise UserError for a metric that is unknown or does not apply.

    kind: type of result: "ranking", or the prediction of a probe: "class", "labels" or "number".
    """
    parse_metric(name)
    applicable = {"ranking": (*RANKING_METRICS, "macro_f1", "micro_f1"), "number": tuple(NUMBER_METRICS)}
    names = applicable.get(kind, tuple(CLASS_METRICS))
    if name.partition("@")[0] not in names:
        raise UserError(f"metric {name!r}: does not apply to a {kind}; expected one of {', '.join(names)}")
