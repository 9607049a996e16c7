"""What the report works out itself, kept in report.json: comparisons, single queries, and a map of papers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from datamodules.records import UserError
from experiments.reporting.paper_map import paper_map
from experiments.reporting.run_files import RunFiles
from experiments.results import paper
from experiments.results.differences import told, words
from experiments.results.measured import Measured, aligned
from experiments.results.texts import benchmark_of
from lightning_modules.retrieval.significance import compare, holm

log = logging.getLogger(__name__)

LEVEL, DRAWS = 0.95, 10_000
TYPICAL = (0.9, 0.5)  # quantiles of a benchmark's queries that are shown
HARDEST, TOP = 3, 5


def work_out(run: RunFiles, num_papers: int) -> dict[str, Any]:
    """All figures that stand in no other file of the run. num_papers: of the map, 0 for none."""
    attempts = run.manifest.get("attempts", ())
    found: dict[str, Any] = {
        "last_step": run.last_step,
        "seconds": (seconds := sum(attempt["seconds"] or 0 for attempt in attempts)),
        "time": in_words(seconds),
        "parameters_million": run.manifest.get("parameters", 0) / 1e6,
        "level": LEVEL,
    }
    found["paper"] = {path: of_paper(content.value) for path, content in run.evaluations.items()}
    if run.results:
        trained = Measured(run.path, "trained", run.results)
        found["mean"] = run.means()
        found["differences"] = _differences(trained)
        found["queries"] = {name: part for name in trained.benchmarks if (part := _queries(trained, name))}
    if num_papers:
        found["map"] = paper_map(run, num_papers)
    return found


def in_words(seconds: float) -> dict[str, Any]:
    """A time in the unit that people would name."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return {"value": seconds / size, "unit": unit}
    return {"value": seconds, "unit": "seconds"}


def of_paper(content: Mapping[str, Any]) -> dict[str, Any]:
    """Benchmark -> what the paper has under its protocol: figures as shares, or why they cannot stand beside ours."""
    found = {}
    for name, of in content["benchmarks"].items():
        columns = [c for t in paper.tables() for c in t.columns if c.protocol == of.get("protocol")]
        if not columns:
            continue
        sizes = {"queries": columns[0].queries, "documents": columns[0].documents}
        if any(size not in (None, of[key]) for key, size in sizes.items()):
            found[name] = {"sizes": sizes}
            continue
        systems: dict[str, dict[str, float]] = {}
        for metric in of["metrics"]:
            for system, cell in paper.figures(of["protocol"], metric).items():
                systems.setdefault(system, {})[metric] = cell.value / 100
        found[name] = {"systems": systems}
    return found


def _differences(trained: Measured) -> dict[str, dict[str, Any]]:
    """Benchmark -> other system -> how far the trained encoder is ahead in the main metric."""
    found: dict[str, dict[str, Any]] = {}
    for name, of in trained.benchmarks.items():
        for system in of["systems"]:
            if system == trained.system:
                continue
            other = dataclasses.replace(trained, system=system)
            try:
                a, b, _ = aligned([trained], [other], name, _main(trained, name))
            except UserError as error:
                log.warning("%s", error)
                continue
            found.setdefault(name, {})[system] = dataclasses.asdict(compare(a, b, level=LEVEL, draws=DRAWS))
    flat = [of for against in found.values() for of in against.values()]
    for of, p in zip(flat, holm([of["p"] for of in flat]), strict=True):
        of["p_holm"] = p
    return found


def _main(measured: Measured, name: str) -> str:
    of = measured.benchmarks[name]
    return (of.get("metrics") or measured.results["metrics"])[0]


def _queries(trained: Measured, name: str) -> dict[str, Any]:
    """Queries as most are, and those that went worst; nothing where single queries were not measured."""
    metric = _main(trained, name)
    try:
        values = trained.values(name, metric)
        ids = list(values)
        hits = trained.first_ranks(name, ids)
    except UserError as error:
        log.warning("%s", error)
        return {}
    order = sorted(ids, key=lambda query: (values[query], -hits[query] if hits[query] else -np.inf))
    hardest = order[:HARDEST]
    typical = [order[round(quantile * (len(order) - 1))] for quantile in TYPICAL]
    benchmark = benchmark_of(trained, name)
    chosen = list(dict.fromkeys((*typical, *hardest)))
    rankings, grades = trained.ranking(name, chosen), trained.judgements(name, chosen)

    def described(query: str) -> dict[str, Any]:
        ranked, judged = rankings.get(query, []), grades.get(query, {})
        places = {document: place for place, (document, _) in enumerate(ranked, start=1)}
        wanted = sorted(judged, key=lambda d: (-judged[d], places.get(d, np.inf)))[:TOP]
        return {
            "query": query,
            "text": words(benchmark and benchmark.queries.get(query), query),
            metric: values[query],
            "relevant": len(judged),
            "first_relevant": hits[query],
            "top": [told(benchmark, document, judged) | {"rank": i} for i, (document, _) in enumerate(ranked[:TOP], 1)],
            "wanted": [told(benchmark, document, judged) | {"rank": places.get(document)} for document in wanted],
        }

    return {
        "metric": metric,
        "depth": max((len(ranked) for ranked in rankings.values()), default=0),
        "typical": [described(query) for query in typical],
        "hardest": [described(query) for query in hardest],
    }
