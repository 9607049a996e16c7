"""From a run to its figures: the value of each metric for each query, and their means.

Each rank measures its share of the queries; what they found is put together, each query once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from datamodules.records import Benchmark, UserError
from lightning_modules.distributed.collectives import world_size
from lightning_modules.retrieval.metrics import METRICS, Run, judge, parse_metric, places
from lightning_modules.retrieval.predictions import AGGREGATES, CORRELATIONS, OF_LABELS, class_counts

BLOCK = 2**22  # ranked documents that are judged at once


@dataclass(frozen=True, slots=True)
class QueryValues:
    """What was measured of q queries.

    queries: (q,) their positions in the benchmark, ascending. values: (q, n) of the metrics of METRICS, in the order of
    names. documents, scores: (q, p) what the others measure: the document that stands first, or all that a linear model
    tells, -1 for none.
    """

    names: tuple[str, ...]
    queries: np.ndarray
    values: np.ndarray
    documents: np.ndarray
    scores: np.ndarray


def depth(metrics: Sequence[str], benchmark: Benchmark) -> int:
    """Documents to keep for each query: the deepest cut-off of the metrics, at most all that are ranked."""
    cuts = [parse_metric(name) for name in metrics]
    most = max((sum(g > 0 for g in grades.values()) for grades in benchmark.qrels.values()), default=1)
    deepest = max(most if name == "r_precision" else k for name, k in cuts)
    if benchmark.candidates is None:
        return min(deepest, len(benchmark.corpus))
    return min(deepest, max(map(len, benchmark.candidates.values()), default=1))


def query_values(run: Run, benchmark: Benchmark, metrics: Sequence[str]) -> QueryValues:
    """Measure this rank's share of a benchmark's queries.

    Raises UserError if no query of the benchmark has a relevant document, or one has none and that is an error.
    """
    names = tuple(name for name in metrics if name not in AGGREGATES and name not in CORRELATIONS)
    position = {query: i for i, query in enumerate(benchmark.queries)}
    queries = np.array([position[query] for query in run.queries], dtype=np.int64)
    if benchmark.training is None:
        _check_relevant(benchmark)
        values, keep, told = *_ranked_values(run, benchmark, names), 1
    else:  # where a model may tell nothing, a query without labels counts
        values, keep, told = np.zeros((len(queries), 0)), np.ones(len(queries), dtype=bool), run.indices.shape[1]
    documents, scores = run.indices[:, :told], run.scores[:, :told]
    if not documents.shape[1]:
        documents, scores = np.full((len(queries), 1), -1), np.zeros((len(queries), 1))
    return each_once([QueryValues(names, queries[keep], values[keep], documents[keep], scores[keep])])


def _check_relevant(benchmark: Benchmark) -> None:
    bare = [q for q, grades in benchmark.qrels.items() if not any(grade > 0 for grade in grades.values())]
    if len(bare) == len(benchmark.qrels):
        raise UserError(f"{benchmark.name}: no query of the {benchmark.split} split has a relevant document")
    if bare and benchmark.without_relevant == "error":
        raise UserError(f"{benchmark.name}: {len(bare)} queries have no relevant document, the first is {bare[0]!r}")


def _ranked_values(run: Run, benchmark: Benchmark, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(q, n) the value of each metric for each query, and (q,) which queries count."""
    parsed, place = [(METRICS[name], k) for name, k in map(parse_metric, names)], places(run)
    values, keep = np.zeros((len(run.queries), len(parsed))), np.ones(len(run.queries), dtype=bool)
    step = max(1, BLOCK // max(1, run.indices.shape[1]))
    for start in range(0, len(run.queries), step):
        judged = judge(run.part(start, start + step), benchmark.qrels, place)
        for column, (function, k) in enumerate(parsed):
            values[start : start + step, column] = function(judged, k)
        if benchmark.without_relevant == "skip":
            keep[start : start + step] = judged.num_relevant > 0
    return values, keep


def of_all_ranks(values: QueryValues) -> QueryValues:
    """What all ranks measured, each query once however often it was ranked."""
    if world_size() == 1:
        return values
    shares: list[QueryValues] = [values] * world_size()
    dist.all_gather_object(shares, values)
    return each_once(shares)


def each_once(shares: Sequence[QueryValues]) -> QueryValues:
    queries, first = np.unique(np.concatenate([share.queries for share in shares]), return_index=True)
    rest = (
        np.concatenate([getattr(share, key) for share in shares])[first] for key in ("values", "documents", "scores")
    )
    return QueryValues(shares[0].names, queries, *rest)


def means(values: QueryValues, benchmark: Benchmark, metrics: Sequence[str]) -> dict[str, float]:
    """The figure of each metric, over all queries that were measured."""
    found = dict(zip(values.names, values.values.mean(0).tolist(), strict=True)) if len(values.queries) else {}
    if any(name in AGGREGATES for name in metrics):
        counts = _class_counts(values, benchmark)
        of_labels = benchmark.training is not None and benchmark.probe.learns == "labels"
        aggregates = OF_LABELS if of_labels else AGGREGATES
        found |= {name: aggregates[name](counts) for name in metrics if name in aggregates}
    if any(name in CORRELATIONS for name in metrics):
        ids, predicted = list(benchmark.queries), values.scores[:, 0]
        true = np.array([next(iter(benchmark.qrels[ids[query]].values())) for query in values.queries])
        found |= {name: CORRELATIONS[name](predicted, true) for name in metrics if name in CORRELATIONS}
    return {name: found.get(name, 0.0) for name in metrics}


def _class_counts(values: QueryValues, benchmark: Benchmark) -> np.ndarray:
    """Documents are classes or labels."""
    place = {document: i for i, document in enumerate(benchmark.corpus)}
    ids = list(benchmark.queries)
    true = [
        (row, place[document])
        for row, query in enumerate(values.queries)
        for document, grade in benchmark.qrels[ids[query]].items()
        if grade > 0 and document in place
    ]
    rows, classes = np.array(true, dtype=np.int64).reshape(-1, 2).T
    return class_counts(values.documents, rows, classes, len(place))


def measure(run: Run, benchmark: Benchmark, metrics: Sequence[str]) -> Mapping[str, float]:
    """The figures of a run over all queries of all ranks. run: this rank's share of the benchmark's queries."""
    return means(of_all_ranks(query_values(run, benchmark, metrics)), benchmark, metrics)


def whole_run(run: Run) -> Run:
    """All ranks' shares of a run as one, in the order of the benchmark's queries, at which ranks take turns."""
    if world_size() == 1:
        return run
    shares: list[Run] = [run] * world_size()
    dist.all_gather_object(shares, run)
    queries = [query for share in shares for query in share.queries]
    turns = [range(r, len(queries), world_size()) for r in range(world_size())]
    back = np.argsort(np.concatenate(turns))
    indices, scores = (np.concatenate([getattr(share, key) for share in shares]) for key in ("indices", "scores"))
    return Run([queries[i] for i in back], run.documents, indices[back], scores[back])


def write_trec(run: Run, path: Path, tag: str) -> None:
    """Write a run as trec_eval reads it: query Q0 document rank score tag. Scores have all of their digits."""
    digits = 9 if run.scores.dtype == np.float32 else 17
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as lines:
        for query, indices, scores in zip(run.queries, run.indices, run.scores, strict=True):
            for position, (index, score) in enumerate(zip(indices.tolist(), scores.tolist(), strict=True), start=1):
                if index >= 0:
                    lines.write(f"{query} Q0 {run.documents[index]} {position} {score:.{digits}g} {tag}\n")


def write_qrels(benchmark: Benchmark, path: Path) -> None:
    """Write what was measured with as trec_eval reads it: query 0 document grade."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as lines:
        for query, grades in benchmark.qrels.items():
            lines.writelines(f"{query} 0 {document} {grade}\n" for document, grade in grades.items())


def write_draws(draws: Sequence[Mapping[str, float]], path: Path) -> None:
    """Write the figures of each draw of few-shot learning: a header, then a line a draw, tabs between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as lines:
        lines.write("\t".join(("draw", *draws[0])) + "\n")
        for number, figures in enumerate(draws, start=1):
            lines.write("\t".join((str(number), *(f"{value:.17g}" for value in figures.values()))) + "\n")


def write_query_values(values: QueryValues, benchmark: Benchmark, path: Path) -> None:
    """Write the value of each metric for each query that counts: a header, then a line a query, tabs between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = list(benchmark.queries)
    with open(path, "w", encoding="utf-8") as lines:
        lines.write("\t".join(("query", *values.names)) + "\n")
        for query, row in zip(values.queries, values.values.tolist(), strict=True):
            lines.write("\t".join((ids[query], *(f"{value:.17g}" for value in row))) + "\n")
