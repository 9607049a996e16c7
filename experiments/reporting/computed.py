"""Calculations for the report, stored in report.json: comparisons, single queries, and a map of papers."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from datamodules.records import Benchmark, UserError
from experiments.config.experiment import from_dict
from experiments.reporting.charts import NUM_COLOURS
from experiments.reporting.run_files import RunFiles
from experiments.results import paper
from experiments.results.comparison import (
    MeasuredSystem,
    aligned_values,
    benchmark_of,
    benchmarks_of_run,
    describe_document,
    short_text,
)
from lightning_modules.encoders.loading import checkpoint_of, load_encoder
from lightning_modules.retrieval.compute import describe_device, resolve_device
from lightning_modules.retrieval.significance import compare, holm

log = logging.getLogger(__name__)

LEVEL, DRAWS = 0.95, 10_000  # level of confidence intervals, number of bootstrap samples
TYPICAL = (0.9, 0.5)  # quantiles of the queries that are shown as typical
NUM_HARDEST, NUM_RANKED = 3, 5


def compute(run: RunFiles, num_papers: int, device: str = "auto", packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Compute the numbers of the report that no other file of the run contains.

    num_papers: number of papers on the map, 0 for no map.
    device: name of the device that encodes them.
    packages: packages that the user allows.
    """
    seconds = sum(attempt["seconds"] or 0 for attempt in run.manifest.get("attempts", ()))
    computed: dict[str, Any] = {
        "last_step": run.last_step,
        "seconds": seconds,
        "time": in_readable_unit(seconds),
        "parameters_million": run.manifest.get("parameters", 0) / 1e6,
        "level": LEVEL,
        "paper": {path: paper_figures(content.value) for path, content in run.evaluations.items()},
    }
    if run.results:
        trained = MeasuredSystem(run.path, "trained", run.results, packages)
        computed["mean"] = run.results.means()
        computed["differences"] = _differences(trained)
        queries = {name: _queries(trained, name) for name in trained.benchmarks}
        computed["queries"] = {name: content for name, content in queries.items() if content}
    if num_papers:
        computed["map"] = paper_map(run, num_papers, resolve_device(device), packages)
    return computed


def in_readable_unit(seconds: float) -> dict[str, Any]:
    """Return a duration in the largest unit in which it is at least 2."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return {"value": seconds / size, "unit": unit}
    return {"value": seconds, "unit": "seconds"}


def paper_figures(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the paper's figures, as shares, for each benchmark with one of the paper's protocols.

    If the paper has another number of queries or documents, the entry has the paper's sizes instead.
    """
    figures = {}
    for name, result in results["benchmarks"].items():
        columns = [c for t in paper.tables() for c in t.columns if c.protocol == result.get("protocol")]
        if not columns:
            continue
        sizes = {"queries": columns[0].queries, "documents": columns[0].documents}
        if any(size not in (None, result[key]) for key, size in sizes.items()):
            figures[name] = {"sizes": sizes}
            continue
        systems: dict[str, dict[str, float]] = {}
        for metric in result["metrics"]:
            for system, cell in paper.figures(result["protocol"], metric).items():
                systems.setdefault(system, {})[metric] = cell.value / 100
        figures[name] = {"systems": systems}
    return figures


def _differences(trained: MeasuredSystem) -> dict[str, dict[str, Any]]:
    """Return the trained encoder's lead over each other system on each benchmark, in the main metric."""
    differences: dict[str, dict[str, Any]] = {}
    for name, result in trained.benchmarks.items():
        for system in result.systems:
            if system == trained.system:
                continue
            other = dataclasses.replace(trained, system=system)
            try:
                a, b, _ = aligned_values([trained], [other], name, trained.main_metric(name))
            except UserError as error:
                log.warning("%s", error)
                continue
            comparison = dataclasses.asdict(compare(a, b, level=LEVEL, draws=DRAWS))
            differences.setdefault(name, {})[system] = comparison
    comparisons = [comparison for systems in differences.values() for comparison in systems.values()]
    for comparison, p in zip(comparisons, holm([c["p"] for c in comparisons]), strict=True):
        comparison["p_holm"] = p
    return differences


def _queries(trained: MeasuredSystem, name: str) -> dict[str, Any]:
    """Return typical queries and the worst queries, or {} if there are no values per query."""
    metric = trained.main_metric(name)
    try:
        values = trained.values(name, metric)
        ids = list(values)
        first_ranks = trained.first_ranks(name, ids)
    except UserError as error:
        log.warning("%s", error)
        return {}
    order = sorted(ids, key=lambda query: (values[query], -first_ranks[query] if first_ranks[query] else -np.inf))
    hardest = order[:NUM_HARDEST]
    typical = [order[round(quantile * (len(order) - 1))] for quantile in TYPICAL]
    benchmark = benchmark_of(trained, name)
    chosen = list(dict.fromkeys((*typical, *hardest)))
    rankings, qrels = trained.ranking(name, chosen), trained.judgements(name, chosen)

    def describe(query: str) -> dict[str, Any]:
        ranking, grades = [document for document, _ in rankings.get(query, [])], qrels.get(query, {})
        ranks = {document: rank for rank, document in enumerate(ranking, start=1)}
        relevant = sorted(grades, key=lambda d: (-grades[d], ranks.get(d, np.inf)))[:NUM_RANKED]
        return {
            "query": query,
            "text": short_text(benchmark and benchmark.queries.get(query), query),
            metric: values[query],
            "relevant": len(grades),
            "first_relevant": first_ranks[query],
            "top": [
                describe_document(benchmark, d, grades) | {"rank": i}
                for i, d in enumerate(ranking[:NUM_RANKED], start=1)
            ],
            "wanted": [describe_document(benchmark, d, grades) | {"rank": ranks.get(d)} for d in relevant],
        }

    return {
        "metric": metric,
        "depth": max((len(ranking) for ranking in rankings.values()), default=0),
        "typical": [describe(query) for query in typical],
        "hardest": [describe(query) for query in hardest],
    }


def paper_map(
    run: RunFiles, num_papers: int, device: torch.device, packages: tuple[str, ...] = ()
) -> dict[str, Any] | None:
    """Return, for each task, the same test papers in two dimensions, encoded by the task's expert.

    Returns None if the run has no checkpoint, no data, or no task whose queries are papers.
    """
    try:
        config = from_dict(run.config, str(run.path / "config.yaml"), packages)
        benchmarks = benchmarks_of_run(run.path.resolve(), config.evaluation.split, packages).values()
        checkpoint = checkpoint_of(run.path)
        encoder = load_encoder(checkpoint, packages=packages).to(device)
    except (UserError, OSError) as error:
        log.warning("no map of papers: %s", error)
        return None
    kinds = {name: task.kind for name, task in config.task.items()}
    labelled = [benchmark for benchmark in benchmarks if kinds[benchmark.task] == "classification"]
    candidates = labelled or [benchmark for benchmark in benchmarks if kinds[benchmark.task] == "link_prediction"]
    if not candidates:
        return None
    benchmark = candidates[0]
    ids = evenly_spaced(list(benchmark.queries), num_papers)
    names, groups = label_groups(benchmark, ids) if labelled else ([], [0] * len(ids))
    log.info("encoding %d papers for the map on %s", len(ids), describe_device(device))
    papers = [benchmark.queries[id] for id in ids]
    maps = {}
    for task in encoder.tasks:
        vectors = encoder.encode(papers, task, token_budget=config.data.token_budget).double().numpy()
        points, variances = principal_components(vectors)
        maps[task] = {"places": points.round(4).tolist(), "variance": float(variances[:2].sum())}
        if names:
            maps[task]["same_label"] = same_label_share(vectors, groups)
    chance = [share * share for share in np.bincount(groups) / len(groups)]
    return {
        "benchmark": benchmark.name,
        "checkpoint": str(checkpoint.relative_to(run.path)),
        "papers": len(ids),
        "ids": ids,
        "titles": [short_text(paper, paper.id) for paper in papers],
        "labels": names,
        "groups": list(groups),
        "chance": float(sum(chance)) if names else None,
        "tasks": maps,
    }


def evenly_spaced(ids: Sequence[str], count: int) -> list[str]:
    """Return at most `count` ids, spread over the whole list."""
    if len(ids) <= count:
        return list(ids)
    return [ids[i] for i in np.linspace(0, len(ids) - 1, count).round().astype(int)]


def label_groups(benchmark: Benchmark, ids: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the names of the most frequent labels, and the group of each paper. The last group is "other".

    A paper with several labels belongs to the most frequent one, which in a hierarchy is the highest.
    """
    labels = [[label for label, grade in benchmark.qrels[id].items() if grade > 0] for id in ids]
    counts = Counter(label for paper_labels in labels for label in paper_labels)
    main = [max(paper_labels, key=lambda label: (counts[label], label), default=None) for paper_labels in labels]
    kept = [label for label, _ in Counter(label for label in main if label).most_common(NUM_COLOURS - 1)]
    group = {label: i for i, label in enumerate(kept)}
    names = [short_text(benchmark.corpus.get(label), label, 40) for label in kept]
    return [*names, "other"], [group.get(label, len(kept)) for label in main]


def principal_components(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Project vectors (n, D) onto their first two principal components, (n, 2), scaled to at most 1 from the centre.

    The second result is each component's share of the variance.
    """
    centred = vectors - vectors.mean(0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    points = left[:, :2] * singular[:2]
    if points.shape[1] < 2:
        points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    signs = np.sign(points[np.abs(points).argmax(0), range(2)])  # a component's sign is arbitrary
    variance = singular**2
    return points * signs / max(np.abs(points).max(), 1e-12), variance / max(variance.sum(), 1e-12)


def same_label_share(vectors: np.ndarray, groups: Sequence[int]) -> float:
    """Return the share of papers whose nearest neighbour, by cosine in all dimensions, is in the same group."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
    similarities = unit @ unit.T
    np.fill_diagonal(similarities, -np.inf)
    groups = np.asarray(groups)
    return float((groups[similarities.argmax(1)] == groups).mean())
