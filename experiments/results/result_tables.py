"""Results as tables on the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from experiments.build.suite import BenchmarkConfig
from experiments.results.cost import total_cost
from experiments.results.results import Benchmarks, SystemResult
from experiments.shared.console import table_console


def show(benchmarks: Benchmarks, metrics: Sequence[str], title: str) -> None:
    """Print a table for each set of metrics: blocks of benchmarks, rows of systems, and their means at the end.

    A narrow terminal shows only the first metrics that fit, a wide one also the protocols; results.json has them all.
    metrics: metrics of benchmarks without their own.
    """
    console = table_console()
    groups: dict[tuple[str, ...], Benchmarks] = {}
    for name, table in benchmarks.items():
        groups.setdefault(tuple(table.metrics or metrics), {})[name] = table
    console.print(title + _precision_note(benchmarks), style="italic")
    for group_metrics, group in groups.items():
        console.print(_table(group, group_metrics, console.width))


def _precision_note(benchmarks: Benchmarks) -> str:
    """Return the part of a title that names the encoders' precision, if it is not fp32."""
    results = [result for table in benchmarks.values() for result in table.systems.values()]
    precisions = {result.precision for result in results if result.similarity != "bm25"}
    return "" if precisions <= {"fp32"} else f", measured in {' and '.join(sorted(precisions))}"


def _table(benchmarks: Benchmarks, metrics: Sequence[str], width: int) -> Table:
    systems = list(dict.fromkeys(system for table in benchmarks.values() for system in table.systems))
    widths = {
        "task": max(len("task"), *(len(table.task or "") for table in benchmarks.values())),
        "benchmark": max(len("benchmark"), *map(len, benchmarks)),
        "system": max(len("system"), *map(len, systems)),
    }
    room = width - sum(widths.values()) - 3 * len(widths) - 1
    fitting = [m for i, m in enumerate(metrics) if i == 0 or sum(len(n) + 3 for n in metrics[: i + 1]) <= room]
    room -= sum(max(len(metric), 6) + 3 for metric in fitting)
    protocols = {name: table.protocol or "" for name, table in benchmarks.items()}
    with_protocol = max(map(len, protocols.values())) + 3 <= room and len(fitting) == len(metrics)

    grid = Table()
    for heading in widths:
        grid.add_column(heading, no_wrap=True)
    for metric in fitting:
        grid.add_column(metric, justify="right", no_wrap=True)
    if with_protocol:
        grid.add_column("protocol", no_wrap=True)
    for name, table in benchmarks.items():
        for i, (system, result) in enumerate(table.systems.items()):
            labels = (table.task, name) if i == 0 else ("", "")
            cells = (f"{result.metrics[metric]:.4f}" if metric in result.metrics else "" for metric in fitting)
            grid.add_row(*labels, system, *cells, *([protocols[name] if i == 0 else ""] if with_protocol else []))
        grid.add_section()
    if len(benchmarks) > 1:
        _add_means(grid, benchmarks, systems, fitting)
    return grid


def _add_means(grid: Table, benchmarks: Benchmarks, systems: Sequence[str], metrics: Sequence[str]) -> None:
    """Add the mean of each system over all benchmarks, or the number of benchmarks it was evaluated on.

    A mean over fewer benchmarks could not be compared with the others.
    """
    for system in systems:
        rows = [table.systems[system].metrics for table in benchmarks.values() if system in table.systems]
        label = "mean" if system == systems[0] else ""
        if len(rows) == len(benchmarks):
            grid.add_row(label, "", system, *(f"{sum(row[m] for row in rows) / len(rows):.4f}" for m in metrics))
        else:
            grid.add_row(label, "", system, f"({len(rows)} of {len(benchmarks)})")


def show_cost(benchmarks: Benchmarks) -> None:
    """Print the total cost of each system, and the number of benchmarks it covers if not all have a cost."""
    results: dict[str, list[SystemResult]] = {}
    for table in benchmarks.values():
        for system, result in table.systems.items():
            results.setdefault(system, []).append(result)
    with_cost = {
        system: [r for r in group if r.cost] for system, group in results.items() if any(r.cost for r in group)
    }
    if not with_cost:
        return
    num_priced = {system: sum(r.cost.money is not None for r in group) for system, group in with_cost.items()}
    grid = Table(title="cost", title_justify="left")
    grid.add_column("system")
    headings = ["devices", "texts", "tokens", "texts/s", "tokens/s", "MFU", "device seconds", "memory, MB"]
    for heading in [*headings, "money"] if any(num_priced.values()) else headings:
        grid.add_column(heading, justify="right")
    for system, group in with_cost.items():
        cost = total_cost([r.cost for r in group], [r.seconds["encode"] for r in group])
        total = len(results[system])
        money = "" if cost.money is None else f"{cost.money:,.4f}"
        if 0 < num_priced[system] < len(group):
            money = f"({num_priced[system]} of {len(group)})"
        grid.add_row(
            system if len(group) == total else f"{system} ({len(group)} of {total})",
            f"{cost.devices} x {group[0].device}",
            f"{cost.texts:,d}",
            f"{cost.tokens:,d}",
            "" if cost.texts_per_second is None else f"{cost.texts_per_second:,.1f}",
            "" if cost.tokens_per_second is None else f"{cost.tokens_per_second:,.0f}",
            "" if cost.mfu is None else f"{cost.mfu:.0%}",
            f"{cost.device_seconds:,.1f}",
            f"{cost.memory_mb:,d}",
            *([money] if any(num_priced.values()) else []),
        )
    table_console().print(grid)


def show_suite(suite: Mapping[str, BenchmarkConfig]) -> None:
    """Print all benchmarks with their protocols and metrics."""
    grid = Table(title="benchmarks", title_justify="left")
    for heading in ("benchmark", "protocol", "metrics", "note"):
        grid.add_column(heading, overflow="fold")
    for name, config in suite.items():
        grid.add_row(name, config.protocol, " ".join(config.metrics), config.note)
    table_console().print(grid)
