"""Build tables of results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.build.suite import BenchmarkConfig
from experiments.results.results import Benchmarks, SystemResult, mean_over, total_cost
from experiments.shared.table_formats import PIPE_WIDTH, Column, Table

COST_COLUMNS = (
    Column("texts", ",d"),
    Column("tokens", ",d"),
    Column("texts/s", ",.1f", "highest"),
    Column("tokens/s", ",.0f", "highest"),
    Column("MFU", ".0%", "highest"),
    Column("device seconds", ",.1f", "lowest"),
    Column("memory, MB", ",d", "lowest"),
)


def result_tables(benchmarks: Benchmarks, metrics: Sequence[str], title: str) -> list[Table]:
    """Return a table for each set of metrics, with a block per benchmark, a row per system, and means at the end.

    A narrow screen shows only the first metrics that fit; a wide screen also shows the protocols.
    metrics: metrics of benchmarks without their own. title: title of the first table.
    """
    groups: dict[tuple[str, ...], Benchmarks] = {}
    for name, table in benchmarks.items():
        groups.setdefault(tuple(table.metrics or metrics), {})[name] = table
    tables = [_result_table(group, group_metrics) for group_metrics, group in groups.items()]
    for table in tables[:1]:
        table.title = title + _precision_note(benchmarks)
    return tables


def _precision_note(benchmarks: Benchmarks) -> str:
    """Return the part of a title that names the encoders' precision, or "" for fp32."""
    results = [result for table in benchmarks.values() for result in table.systems.values()]
    precisions = {result.precision for result in results if result.similarity != "bm25"}
    return "" if precisions <= {"fp32"} else f", measured in {' and '.join(sorted(precisions))}"


def _result_table(benchmarks: Benchmarks, metrics: Sequence[str]) -> Table:
    columns = [Column("task"), Column("benchmark"), Column("system")]
    columns += [Column(metric, ".4f", "highest", rank=i) for i, metric in enumerate(metrics)]
    grid = Table([*columns, Column("protocol", rank=len(metrics))])
    for name, table in benchmarks.items():
        for i, (system, result) in enumerate(table.systems.items(), start=1):
            task, label, protocol = (table.task, name, table.protocol) if i == 1 else ("", "", "")
            values = [result.metrics.get(metric) for metric in metrics]
            grid.add(task, label, system, *values, protocol, group=name, ends_section=i == len(table.systems))
    if len(benchmarks) > 1:
        _add_means(grid, benchmarks, metrics)
    return grid


def _add_means(grid: Table, benchmarks: Benchmarks, metrics: Sequence[str]) -> None:
    """Add the mean of each system over all benchmarks, or the number of benchmarks it was evaluated on.

    A mean over fewer benchmarks would not be comparable with the others.
    """
    systems = list(dict.fromkeys(system for table in benchmarks.values() for system in table.systems))
    for system in systems:
        means: list[float | str | None] = [mean_over(benchmarks, system, metric) for metric in metrics]
        count = sum(system in table.systems for table in benchmarks.values())
        if count < len(benchmarks):
            means[0] = f"({count} of {len(benchmarks)})"
        grid.add("mean" if system == systems[0] else "", "", system, *means, "", group=("mean",))


def result_records(benchmarks: Benchmarks) -> list[dict[str, Any]]:
    """Return one record per system and benchmark: what was measured, the metrics and the cost."""
    records = []
    for name, table in benchmarks.items():
        known = {key: getattr(table, key) for key in ("task", "split", "protocol", "queries", "documents")}
        for system, result in table.systems.items():
            measured = {key: getattr(result, key) for key in ("model", "similarity", "precision", "device")}
            spread = {f"{metric} spread": value for metric, value in (result.spread or {}).items()}
            cost = dataclasses.asdict(result.cost) if result.cost else {}
            records.append(
                {"benchmark": name, "system": system} | known | result.metrics | spread | measured | cost,
            )
    return records


def cost_tables(benchmarks: Benchmarks) -> list[Table]:
    """Return a table with the total cost of each system, and on how many benchmarks if not on all."""
    results: dict[str, dict[str, SystemResult]] = {}
    for name, table in benchmarks.items():
        for system, result in table.systems.items():
            results.setdefault(system, {})[name] = result
    with_cost = {
        system: {name: result for name, result in group.items() if result.cost}
        for system, group in results.items()
        if any(result.cost for result in group.values())
    }
    if not with_cost:
        return []
    num_priced = {s: sum(r.cost.money is not None for r in group.values()) for s, group in with_cost.items()}
    money_column = [Column("money", ",.4f", "lowest")] if any(num_priced.values()) else []
    grid = Table([Column("system"), Column("devices", ""), *COST_COLUMNS, *money_column], title="cost")
    for system, group in with_cost.items():
        cost, device = total_cost(list(group.values())), next(iter(group.values())).device
        total = len(results[system])
        is_partly_priced = 0 < num_priced[system] < len(group)
        money = f"({num_priced[system]} of {len(group)})" if is_partly_priced else cost.money
        grid.add(
            system if len(group) == total else f"{system} ({len(group)} of {total})",
            f"{cost.devices} x {device}",
            *(cost.texts, cost.tokens, cost.texts_per_second, cost.tokens_per_second, cost.mfu),
            *(cost.device_seconds, cost.memory_mb, *([money] if money_column else [])),
            group=tuple(group),
        )
    return [grid]


def suite_table(suite: Mapping[str, BenchmarkConfig]) -> Table:
    """Return a table of all benchmarks with their protocols and metrics."""
    columns = [Column(heading, folds=True) for heading in ("benchmark", "protocol", "metrics", "note")]
    grid = Table(columns, title="benchmarks", pipe_width=PIPE_WIDTH)
    for name, config in suite.items():
        grid.add(name, config.protocol, " ".join(config.metrics), config.note)
    return grid
