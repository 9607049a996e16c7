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
from lightning_modules.distributed import world_size
from lightning_modules.metrics import (
    AGGREGATES,
    METRICS,
    Run,
    class_counts,
    judge,
    parse_metric,
    places,
)

BLOCK = 2**22  # ranked documents that are judged at once


@dataclass(frozen=True, slots=True)
class QueryValues:
    """What was measured of q queries.

    queries: (q,) their positions in the benchmark, ascending. values: (q, n) of the metrics, in the order of names;
    none for metrics of AGGREGATES. best: (q,) the document that stands first, -1 for none.
    """

    names: tuple[str, ...]
    queries: np.ndarray
    values: np.ndarray
    best: np.ndarray


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
    bare = [q for q, grades in benchmark.qrels.items() if not any(grade > 0 for grade in grades.values())]
    if len(bare) == len(benchmark.qrels):
        raise UserError(f"{benchmark.name}: no query of the {benchmark.split} split has a relevant document")
    if bare and benchmark.without_relevant == "error":
        raise UserError(f"{benchmark.name}: {len(bare)} queries have no relevant document, the first is {bare[0]!r}")
    parsed = [(METRICS[name], k) for name, k in map(parse_metric, metrics) if name in METRICS]
    place, position = places(run), {query: i for i, query in enumerate(benchmark.queries)}
    values, keep = np.zeros((len(run.queries), len(parsed))), np.ones(len(run.queries), dtype=bool)
    step = max(1, BLOCK // max(1, run.indices.shape[1]))
    for start in range(0, len(run.queries), step):
        judged = judge(run.part(start, start + step), benchmark.qrels, place)
        for column, (function, k) in enumerate(parsed):
            values[start : start + step, column] = function(judged, k)
        if benchmark.without_relevant == "skip":
            keep[start : start + step] = judged.num_relevant > 0
    queries = np.array([position[query] for query in run.queries], dtype=np.int64)
    best = run.indices[:, 0] if run.indices.shape[1] else np.full(len(run.queries), -1)
    names = tuple(name for name in metrics if name not in AGGREGATES)
    return each_once([QueryValues(names, queries[keep], values[keep], best[keep])])


def of_all_ranks(values: QueryValues) -> QueryValues:
    """What all ranks measured, each query once however often it was ranked."""
    if world_size() == 1:
        return values
    shares: list[QueryValues] = [values] * world_size()
    dist.all_gather_object(shares, values)
    return each_once(shares)


def each_once(shares: Sequence[QueryValues]) -> QueryValues:
    queries, first = np.unique(np.concatenate([share.queries for share in shares]), return_index=True)
    values, best = (np.concatenate([getattr(share, key) for share in shares])[first] for key in ("values", "best"))
    return QueryValues(shares[0].names, queries, values, best)


def means(values: QueryValues, benchmark: Benchmark, metrics: Sequence[str]) -> dict[str, float]:
    """The figure of each metric, over all queries that were measured."""
    found = dict(zip(values.names, values.values.mean(0).tolist(), strict=True)) if len(values.queries) else {}
    if any(name in AGGREGATES for name in metrics):
        counts = _class_counts(values, benchmark)
        found |= {name: AGGREGATES[name](counts) for name in metrics if name in AGGREGATES}
    return {name: found.get(name, 0.0) for name in metrics}


def _class_counts(values: QueryValues, benchmark: Benchmark) -> np.ndarray:
    """Documents are classes, and the first one of a ranking is the class that is predicted."""
    place = {document: i for i, document in enumerate(benchmark.corpus)}
    ids = list(benchmark.queries)
    true = [
        (row, place[document])
        for row, query in enumerate(values.queries)
        for document, grade in benchmark.qrels[ids[query]].items()
        if grade > 0 and document in place
    ]
    rows, classes = np.array(true, dtype=np.int64).reshape(-1, 2).T
    return class_counts(values.best, rows, classes, len(place))


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
    """Write a run as trec_eval reads it: query Q0 document rank score tag."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as lines:
        for query, indices, scores in zip(run.queries, run.indices, run.scores, strict=True):
            for position, (index, score) in enumerate(zip(indices.tolist(), scores.tolist(), strict=True), start=1):
                if index >= 0:
                    lines.write(f"{query} Q0 {run.documents[index]} {position} {score:.9g} {tag}\n")


def write_qrels(benchmark: Benchmark, path: Path) -> None:
    """Write what was measured with as trec_eval reads it: query 0 document grade."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as lines:
        for query, grades in benchmark.qrels.items():
            lines.writelines(f"{query} 0 {document} {grade}\n" for document, grade in grades.items())


def write_query_values(values: QueryValues, benchmark: Benchmark, path: Path) -> None:
    """Write the value of each metric for each query that counts: a header, then a line a query, tabs between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = list(benchmark.queries)
    with open(path, "w", encoding="utf-8") as lines:
        lines.write("\t".join(("query", *values.names)) + "\n")
        for query, row in zip(values.queries, values.values.tolist(), strict=True):
            lines.write("\t".join((ids[query], *(f"{value:.17g}" for value in row))) + "\n")
