"""Files of an evaluation, in the formats of trec_eval and as tab-separated tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from datamodules.records import Qrels
from lightning_modules.retrieval.metrics import Run


def write_trec(run: Run, path: Path, tag: str) -> None:
    """Write a run for trec_eval: query Q0 document rank score tag. Scores are written exactly."""
    digits = 9 if run.scores.dtype == np.float32 else 17
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as lines:
        for query, indices, scores in zip(run.queries, run.indices, run.scores, strict=True):
            for position, (index, score) in enumerate(zip(indices.tolist(), scores.tolist(), strict=True), start=1):
                if index >= 0:
                    lines.write(f"{query} Q0 {run.documents[index]} {position} {score:.{digits}g} {tag}\n")


def write_qrels(qrels: Qrels, path: Path) -> None:
    """Write judgements for trec_eval: query 0 document grade."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as lines:
        for query, grades in qrels.items():
            lines.writelines(f"{query} 0 {document} {grade}\n" for document, grade in grades.items())


def write_draws(draws: Sequence[Mapping[str, float]], path: Path) -> None:
    """Write a table of the metrics of each draw in few-shot learning."""
    rows = ((str(number), metrics.values()) for number, metrics in enumerate(draws, start=1))
    _write_table(("draw", *draws[0]), rows, path)


def write_query_values(metrics: Sequence[str], rows: Iterable[tuple[str, Iterable[float]]], path: Path) -> None:
    """Write a table of the metrics of each counted query. rows: query id and the value of each metric."""
    _write_table(("query", *metrics), rows, path)


def _write_table(header: Sequence[str], rows: Iterable[tuple[str, Iterable[float]]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as lines:
        lines.write("\t".join(header) + "\n")
        for name, values in rows:
            lines.write("\t".join((name, *(f"{value:.17g}" for value in values))) + "\n")
