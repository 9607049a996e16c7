"""Single queries, with their words: what was asked, what a system ranked first, and what was relevant."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from datamodules.records import Benchmark, Document
from experiments.results.measured import Measured
from experiments.results.texts import benchmark_of

log = logging.getLogger(__name__)

MOST_RELEVANT = 3  # of a query that are shown


def largest(
    a: Measured, b: Measured, name: str, queries: Sequence[str], values_a: np.ndarray, values_b: np.ndarray, count: int
) -> dict[str, list[dict[str, Any]]]:
    """For each side the queries on which it is ahead the most. values_a, values_b: (Q,)."""
    differences = values_a - values_b
    order = np.argsort(-differences, kind="stable")
    chosen = {
        "A": [i for i in order[:count] if differences[i] > 0],
        "B": [i for i in order[::-1][:count] if differences[i] < 0],
    }
    ids = [queries[i] for side in chosen.values() for i in side]
    if not ids:
        return {side: [] for side in chosen}
    benchmark = benchmark_of(a, name)
    relevant = a.judgements(name, ids)
    rankings = {"A": a.ranking(name, ids), "B": b.ranking(name, ids)}

    def example(i: int) -> dict[str, Any]:
        query = queries[i]
        grades = relevant.get(query, {})
        best = sorted(grades, key=grades.get, reverse=True)[:MOST_RELEVANT]
        firsts = {side: ranked[query][0][0] if ranked.get(query) else None for side, ranked in rankings.items()}
        return {
            "query": query,
            "text": words(benchmark and benchmark.queries.get(query), query),
            "A": float(values_a[i]),
            "B": float(values_b[i]),
            **{f"first_{side}": first and told(benchmark, first, grades) for side, first in firsts.items()},
            "relevant": [told(benchmark, document, grades) for document in best],
        }

    return {side: [example(i) for i in rows] for side, rows in chosen.items()}


def told(benchmark: Benchmark | None, document: str, grades: dict[str, int]) -> dict[str, Any]:
    """A document as a reader knows it, and how relevant it is."""
    return {
        "id": document,
        "text": words(benchmark and benchmark.corpus.get(document), document),
        "grade": grades.get(document, 0),
    }


def words(document: Document | None, id: str, most: int = 120) -> str:
    """The title of a paper or label, the words of a query; the id where there is no text."""
    text = (document.title or document.text) if document else ""
    text = " ".join(text.split()) or id
    return text if len(text) <= most else text[: most - 1].rsplit(" ", 1)[0] + "…"
