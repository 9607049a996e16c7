"""From runs to figures, and the files that these can be recomputed from."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datamodules.records import Benchmark
from lightning_modules.distributed.collectives import rank
from lightning_modules.retrieval.measure import (
    means,
    of_all_ranks,
    query_values,
    whole_run,
    write_draws,
    write_qrels,
    write_query_values,
    write_trec,
)
from lightning_modules.retrieval.metrics import Run


def figures_of(
    runs: Iterable[Run],
    benchmark: Benchmark,
    metrics: Sequence[str],
    seconds: dict[str, float],
    folder: Path,
    system: str,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures of one run, or the means of those of each draw in few-shot learning, and then how they spread.

    seconds: by part, to which those of ranking, which runs come out of, and of metrics are added. folder: of the files
    beside the figures, which the first rank writes: ranking and single queries, or the figures of each draw.
    """
    seconds |= {"rank": 0.0, "metrics": 0.0}
    found, started = [], time.monotonic()
    for run in runs:
        ranked = time.monotonic()
        values = of_all_ranks(query_values(run, benchmark, metrics))
        found.append(means(values, benchmark, metrics))
        seconds["rank"] += ranked - started
        started = time.monotonic()
        seconds["metrics"] += started - ranked
    seconds["rank"] += time.monotonic() - started
    several = bool(benchmark.training and benchmark.probe.samples)
    whole = None if several else whole_run(run)
    if rank() == 0:
        path = folder / f"{benchmark.name}.{system}"
        if several:
            write_draws(found, path.with_name(f"{path.name}.draws.tsv"))
        else:
            write_trec(whole, path.with_name(f"{path.name}.trec"), system)
            write_query_values(values, benchmark, path.with_name(f"{path.name}.queries.tsv"))
        write_qrels(benchmark, folder / f"{benchmark.name}.qrels")
    figures = {metric: statistics.fmean(of[metric] for of in found) for metric in metrics}
    spread = {metric: statistics.pstdev(of[metric] for of in found) for metric in metrics}
    return figures, {"draws": len(found), "spread": spread} if several else {}
