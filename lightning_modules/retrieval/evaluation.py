"""Evaluate an encoder on a benchmark: encode, rank, measure.

With several ranks, each one encodes its share of the corpus, and ranks and measures its share of the queries.

Shapes: q queries (of one rank or of all), M documents, D dimensions, k documents per query, n metrics.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from datamodules.progress_lines import ProgressLines
from datamodules.records import SIMILARITIES, Benchmark, UserError, check_choice
from lightning_modules.distributed.collectives import gather_objects, rank, world_size
from lightning_modules.encoders.base import Encoder
from lightning_modules.retrieval import trec
from lightning_modules.retrieval.metrics import (
    CLASS_METRICS,
    LABEL_METRICS,
    NUMBER_METRICS,
    RANKING_METRICS,
    Run,
    check_metric,
    class_counts,
    judge,
    parse_metric,
    positions_of,
)
from lightning_modules.retrieval.probes import probe_runs
from lightning_modules.retrieval.ranking import rank_bm25, rank_vectors
from lightning_modules.retrieval.search import Shards
from lightning_modules.retrieval.vector_cache import VectorCache, check_same_size

METRICS = ("ndcg@10", "recall@20", "recall@100", "mrr@10", "map@100")
JUDGE_BLOCK = 2**22  # number of ranked documents to judge at a time

Stage = Literal["encode", "rank", "learn"]
StageAdvance = Callable[[Stage, int, int], None]
STAGES: Mapping[Stage, tuple[str, str]] = {  # stage -> verb and unit, for the log
    "encode": ("encodes", "texts"),
    "rank": ("ranks", "pairs"),
    "learn": ("learns", "draws"),
}


@dataclass(frozen=True, slots=True)
class QueryValues:
    """The measurements of q queries.

    metrics: names of the ranking metrics.
    queries: positions of the queries in the benchmark, ascending, (q,).
    values: value of each ranking metric, (q, n).
    documents, scores: the top document of each query and its score, (q, 1); for a probe, all predictions, (q, p).
    Documents are padded with -1. Metrics of classes and numbers are computed from these arrays.
    """

    metrics: tuple[str, ...]
    queries: np.ndarray
    values: np.ndarray
    documents: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """The result of one system on one benchmark.

    metrics: mean of each metric over all queries of all ranks; in few-shot learning, averaged over the draws.
    similarity: "dot", "cosine", "l2" or "bm25"; for a probe, its linear model, "svm" or "svr".
    num_texts: number of encoded documents and queries.
    seconds: seconds that this rank spent in each stage: "encode", "rank" (which includes learning) and "metrics".
    run: rankings of this rank's share of the queries; None in few-shot learning.
    query_values: measurements of the queries of all ranks; None in few-shot learning.
    draws: metrics of each draw of training papers in few-shot learning.
    """

    benchmark: Benchmark
    metrics: dict[str, float]
    similarity: str
    num_texts: int
    seconds: dict[str, float]
    run: Run | None = None
    query_values: QueryValues | None = None
    draws: tuple[dict[str, float], ...] = ()

    @property
    def protocol(self) -> str:
        return self.benchmark.protocol

    @property
    def spread(self) -> dict[str, float]:
        """Standard deviation of each metric over the draws of few-shot learning."""
        return {metric: statistics.pstdev(draw[metric] for draw in self.draws) for metric in self.metrics}

    def write(self, folder: Path, system: str) -> None:
        """Write the rankings, the values of each query and the judgements. All ranks must call this.

        system: name of the evaluated system, used in the names of the files.
        """
        whole_run = None if self.run is None else gather_run(self.run)
        if rank() != 0:
            return
        name = f"{self.benchmark.name}.{system}"
        if whole_run is None:
            draws = ((str(number), metrics.values()) for number, metrics in enumerate(self.draws, start=1))
            trec.write_table(("draw", *self.metrics), draws, folder / f"{name}.draws.tsv")
        else:
            assert self.query_values is not None
            values = self.query_values
            trec.write_trec(whole_run, folder / f"{name}.trec", system)
            ids = list(self.benchmark.queries)
            rows = ((ids[query], row) for query, row in zip(values.queries, values.values.tolist(), strict=True))
            trec.write_table(("query", *values.metrics), rows, folder / f"{name}.queries.tsv")
        trec.write_qrels(self.benchmark.qrels, folder / f"{self.benchmark.name}.qrels")


def evaluate(
    encoder: Encoder,
    benchmark: Benchmark,
    metrics: Sequence[str] = METRICS,
    *,
    similarity: str | None = None,
    token_budget: int | None = None,
    vectors: VectorCache | None = None,
    document_vectors: VectorCache | None = None,
    k: int | None = None,
    advance: StageAdvance | None = None,
) -> BenchmarkResult:
    """Evaluate an encoder on a benchmark. All ranks must call this.

    metrics: names of the metrics, unless the benchmark has its own.
    similarity: "dot", "cosine" or "l2", unless the benchmark has its own; by default as in training, or dot if unknown.
    token_budget: maximum number of tokens per forward pass.
    vectors: source of the encoder's vectors; by default, they are computed and not kept.
    document_vectors: cache of another model's document vectors, for an encoder trained to encode only queries; by
        default `vectors`. Probes do not use it.
    k: number of documents to rank per query, by default the deepest cut-off of the metrics.
    advance: called with the stage, the number of steps since the last call, and the total. A step is a text to encode,
        a query-document pair to rank, or a draw of training papers to learn from. By default, the progress is logged.

    Raises UserError for vectors that are not finite, unknown metrics, or a benchmark without relevant documents.
    """
    benchmark = benchmark.without_blank()
    metrics = _checked_metrics(benchmark, metrics)
    similarity = _similarity_of(encoder, benchmark, similarity)
    vectors = vectors or VectorCache(encoder, token_budget=token_budget)
    advance = advance or stage_lines(benchmark.name)
    k = k or ranking_depth(metrics, benchmark)
    if benchmark.training is not None:
        similarity = "svr" if benchmark.probe.learns == "number" else "svm"
    num_texts = len(benchmark.encoded_documents) + len(benchmark.queries)
    step = _counter(advance, "encode", num_texts // world_size())
    started = time.monotonic()
    encoded = _encode(benchmark, vectors, step, document_vectors)
    encode_seconds = time.monotonic() - started
    runs = _rank(encoder, benchmark, encoded, k, similarity, advance)
    return _measure_runs(runs, benchmark, metrics, similarity, num_texts, encode_seconds)


def evaluate_bm25(benchmark: Benchmark, metrics: Sequence[str] = METRICS, *, k: int | None = None) -> BenchmarkResult:
    """Evaluate BM25 on a benchmark, like evaluate(). Needs the package bm25s."""
    benchmark = benchmark.without_blank()
    metrics = _checked_metrics(benchmark, metrics)
    k = k or ranking_depth(metrics, benchmark)
    runs = (rank_bm25(benchmark, k) for _ in range(1))  # a generator, so that ranking is timed
    return _measure_runs(runs, benchmark, metrics, "bm25", 0, 0.0)


def rank_benchmark(
    encoder: Encoder,
    benchmark: Benchmark,
    k: int,
    *,
    similarity: str | None = None,
    token_budget: int | None = None,
    advance: Callable[[int], None] | None = None,
    vectors: VectorCache | None = None,
) -> Run:
    """Rank the documents for this rank's share of a benchmark's queries (every world_size-th one), without measuring.

    advance: called with the number of texts encoded since the last call. All other arguments are as in evaluate().
    """
    benchmark = benchmark.without_blank()
    similarity = _similarity_of(encoder, benchmark, similarity)
    encoded = _encode(benchmark, vectors or VectorCache(encoder, token_budget=token_budget), advance)
    return rank_vectors(benchmark, *encoded, k, similarity, device=encoder.device)


def _similarity_of(encoder: Encoder, benchmark: Benchmark, similarity: str | None) -> str:
    """Return the similarity of the benchmark, or else the requested one, or else the one used in training."""
    return check_choice("similarity", benchmark.similarity or similarity or encoder.similarity or "dot", SIMILARITIES)


def _checked_metrics(benchmark: Benchmark, metrics: Sequence[str]) -> tuple[str, ...]:
    """Return the metrics of an evaluation. Raises UserError if one is unknown or does not apply to the benchmark."""
    metrics = tuple(benchmark.metrics or metrics)
    if not metrics:
        raise UserError(f"{benchmark.name}: metrics is empty; name at least one")
    kind = "ranking" if benchmark.training is None else benchmark.probe.learns
    for name in metrics:
        check_metric(name, kind)
    return metrics


def _encode(
    benchmark: Benchmark,
    vectors: VectorCache,
    advance: Callable[[int], None] | None,
    document_vectors: VectorCache | None = None,
) -> tuple[list[str], np.ndarray, Shards]:
    """Return the ids of this rank's queries, their vectors, (q, D), and the vectors of the documents, (M, D).

    The documents are the corpus, or the training papers of a probe.
    """
    source = vectors if document_vectors is None or benchmark.training is not None else document_vectors
    task = source.encoder.document_task(benchmark.task) if benchmark.training is None else benchmark.task
    values = benchmark.encoded_documents.values()
    texts = values if isinstance(values, Sequence) else list(values)  # stored collections already have a sequence
    documents = source.vectors(texts, task, benchmark.name, advance)
    query_ids = list(benchmark.queries)[rank() :: world_size()]
    queries = vectors.vectors_of_rank(list(benchmark.queries.values()), benchmark.task, benchmark.name, advance)
    check_same_size(queries, documents[0])
    return query_ids, queries, documents


def _rank(
    encoder: Encoder,
    benchmark: Benchmark,
    encoded: tuple[list[str], np.ndarray, Shards],
    k: int,
    similarity: str,
    advance: StageAdvance,
) -> Iterator[Run]:
    """Yield the run of this rank's queries, or the run of each draw in few-shot learning."""
    query_ids, queries, documents = encoded
    if benchmark.training is None:
        step = _counter(advance, "rank", len(queries) * documents.count if benchmark.candidates is None else 0)
        yield rank_vectors(benchmark, *encoded, k, similarity, device=encoder.device, advance=step)
        return
    step = _counter(advance, "learn", benchmark.probe.draws)
    for run in probe_runs(benchmark, query_ids, queries, documents.gather(np.arange(documents.count))):
        yield run
        step(1)


def stage_lines(name: str) -> StageAdvance:
    """Return an `advance` of evaluate() that logs the progress of each stage on a benchmark."""
    lines: dict[Stage, ProgressLines] = {}

    def advance(stage: Stage, count: int, total: int) -> None:
        if stage not in lines:
            verb, unit = STAGES[stage]
            lines[stage] = ProgressLines(f"evaluation {verb} {name}", unit, total)
        lines[stage].advance(count)

    return advance


def _counter(advance: StageAdvance, stage: Stage, total: int) -> Callable[[int], None]:
    """Start a stage, and return a function that reports a number of completed steps."""
    advance(stage, 0, total)
    return lambda count: advance(stage, count, total)


def measure(run: Run, benchmark: Benchmark, metrics: Sequence[str]) -> dict[str, float]:
    """Return the mean of each metric over the queries of all ranks. run: rankings of this rank's share."""
    return mean_metrics(gather_query_values(measure_queries(run, benchmark, metrics)), benchmark, metrics)


def ranking_depth(metrics: Sequence[str], benchmark: Benchmark) -> int:
    """Return the number of documents to rank per query: the deepest cut-off, but at most the number of candidates."""
    cut_offs = [parse_metric(name) for name in metrics]
    most_relevant = max((sum(g > 0 for g in grades.values()) for grades in benchmark.qrels.values()), default=1)
    deepest = max(most_relevant if name == "r_precision" else cut_off for name, cut_off in cut_offs)
    if benchmark.candidates is None:
        return min(deepest, len(benchmark.corpus))
    return min(deepest, max(map(len, benchmark.candidates.values()), default=1))


def measure_queries(run: Run, benchmark: Benchmark, metrics: Sequence[str]) -> QueryValues:
    """Measure the queries of a run.

    Raises UserError if no query has a relevant document. With without_relevant="error", every query needs one.
    """
    names = tuple(name for name in metrics if name not in CLASS_METRICS and name not in NUMBER_METRICS)
    positions = positions_of(list(benchmark.queries))
    queries = np.array([positions[query] for query in run.queries], dtype=np.int64)
    if benchmark.training is None:
        _check_relevant(benchmark)
        values, is_counted = _ranking_values(run, benchmark, names)
        width = 1
    else:  # predicting no labels can be correct, so queries without labels still count
        values, is_counted = np.zeros((len(queries), 0)), np.ones(len(queries), dtype=bool)
        width = run.indices.shape[1]
    documents, scores = run.indices[:, :width], run.scores[:, :width]
    if not documents.shape[1]:
        documents, scores = np.full((len(queries), 1), -1), np.zeros((len(queries), 1))
    counted = (array[is_counted] for array in (queries, values, documents, scores))
    return merge_query_values([QueryValues(names, *counted)])


def _check_relevant(benchmark: Benchmark) -> None:
    grades = ((query, benchmark.qrels.get(query, {})) for query in benchmark.queries)
    unanswered = [query for query, grades_of_query in grades if not any(g > 0 for g in grades_of_query.values())]
    if len(unanswered) == len(benchmark.queries):
        raise UserError(f"{benchmark.name}: no query of the {benchmark.split} split has a relevant document")
    if unanswered and benchmark.without_relevant == "error":
        count, first = len(unanswered), unanswered[0]
        raise UserError(f"{benchmark.name}: {count} queries have no relevant document (first: {first!r})")


def _ranking_values(run: Run, benchmark: Benchmark, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the value of each metric for each query, (q, n), and whether the query counts in the mean, (q,)."""
    metrics = [(RANKING_METRICS[name], cut_off) for name, cut_off in map(parse_metric, names)]
    positions = positions_of(run.documents)
    values, is_counted = np.zeros((len(run.queries), len(metrics))), np.ones(len(run.queries), dtype=bool)
    step = max(1, JUDGE_BLOCK // max(1, run.indices.shape[1]))
    for start in range(0, len(run.queries), step):
        judged = judge(run.slice(start, start + step), benchmark.qrels, positions)
        for column, (metric, cut_off) in enumerate(metrics):
            values[start : start + step, column] = metric(judged, cut_off)
        if benchmark.without_relevant == "skip":
            is_counted[start : start + step] = judged.num_relevant > 0
    return values, is_counted


def gather_query_values(values: QueryValues) -> QueryValues:
    """Return the measurements of all ranks. A query that several ranks measured counts once."""
    return merge_query_values(gather_objects(values))


def merge_query_values(shares: Sequence[QueryValues]) -> QueryValues:
    """Merge the measurements of several ranks, in the order of the benchmark's queries."""
    queries, first = np.unique(np.concatenate([share.queries for share in shares]), return_index=True)
    arrays = (
        np.concatenate([getattr(share, name) for share in shares])[first] for name in ("values", "documents", "scores")
    )
    return QueryValues(shares[0].metrics, queries, *arrays)


def mean_metrics(values: QueryValues, benchmark: Benchmark, metrics: Sequence[str]) -> dict[str, float]:
    """Return the value of each metric over all measured queries."""
    means = dict(zip(values.metrics, values.values.mean(0).tolist(), strict=True)) if len(values.queries) else {}
    if any(name in CLASS_METRICS for name in metrics):
        counts = _count_classes(values, benchmark)
        predicts_labels = benchmark.training is not None and benchmark.probe.learns == "labels"
        functions = LABEL_METRICS if predicts_labels else CLASS_METRICS
        means |= {name: functions[name](counts) for name in metrics if name in functions}
    if any(name in NUMBER_METRICS for name in metrics):
        ids, predicted = list(benchmark.queries), values.scores[:, 0]
        true = np.array([next(iter(benchmark.qrels[ids[query]].values())) for query in values.queries])
        means |= {name: NUMBER_METRICS[name](predicted, true) for name in metrics if name in NUMBER_METRICS}
    return {name: means.get(name, 0.0) for name in metrics}


def _count_classes(values: QueryValues, benchmark: Benchmark) -> np.ndarray:
    """Return the class_counts of the measurements, (3, M). The classes are the documents of the corpus."""
    positions, ids = positions_of(list(benchmark.corpus)), list(benchmark.queries)
    true = [
        (row, positions[document])
        for row, query in enumerate(values.queries)
        for document, grade in benchmark.qrels.get(ids[query], {}).items()
        if grade > 0 and document in positions
    ]
    rows, classes = np.array(true, dtype=np.int64).reshape(-1, 2).T
    return class_counts(values.documents, rows, classes, len(positions))


def gather_run(run: Run) -> Run:
    """Return the rankings of all ranks as one run, in the order of the benchmark's queries."""
    if world_size() == 1:
        return run
    shares = gather_objects(run)
    queries = [query for share in shares for query in share.queries]
    turns = [range(r, len(queries), world_size()) for r in range(world_size())]  # as in rank_benchmark
    order = np.argsort(np.concatenate(turns))
    width = max(share.indices.shape[1] for share in shares)  # with candidates, that of a rank's longest list
    indices = np.concatenate([_widened(share.indices, width, -1) for share in shares])
    scores = np.concatenate([_widened(share.scores, width, -np.inf) for share in shares])
    return Run([queries[i] for i in order], run.documents, indices[order], scores[order])


def _widened(array: np.ndarray, width: int, padding: float) -> np.ndarray:
    """Return an array (q, K) with further columns of padding, (q, width)."""
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=padding)


def _measure_runs(
    runs: Iterable[Run],
    benchmark: Benchmark,
    metrics: Sequence[str],
    similarity: str,
    num_texts: int,
    encode_seconds: float,
) -> BenchmarkResult:
    """Measure one run, or the run of each draw in few-shot learning. runs: generator, timed as ranking."""
    seconds = {"encode": encode_seconds, "rank": 0.0, "metrics": 0.0}
    draws, started = [], time.monotonic()
    for run in runs:
        ranked = time.monotonic()
        values = gather_query_values(measure_queries(run, benchmark, metrics))
        draws.append(mean_metrics(values, benchmark, metrics))
        seconds["rank"] += ranked - started
        started = time.monotonic()
        seconds["metrics"] += started - ranked
    seconds["rank"] += time.monotonic() - started
    means = {metric: statistics.fmean(draw[metric] for draw in draws) for metric in metrics}
    if benchmark.training is not None and benchmark.probe.samples:
        return BenchmarkResult(benchmark, means, similarity, num_texts, seconds, draws=tuple(draws))
    return BenchmarkResult(benchmark, means, similarity, num_texts, seconds, run, values)
