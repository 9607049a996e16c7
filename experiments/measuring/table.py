"""Results as a table on the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Results = dict[str, Any]


def show(results: Results, metrics: Sequence[str], title: str) -> None:
    """A table for each list of metrics: a block a benchmark, a row a system, and means over benchmarks at the end.

    metrics: of results that name none. On a narrow terminal only the first metrics have room; results.json has all.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    groups: dict[tuple[str, ...], Results] = {}
    for name, result in results.items():
        groups.setdefault(tuple(result.get("metrics", metrics)), {})[name] = result
    for number, (own, group) in enumerate(groups.items()):
        console.print(_table(group, own, title if number == 0 else None, console.width))


def _table(results: Results, metrics: Sequence[str], title: str | None, width: int) -> Table:
    systems = list(dict.fromkeys(system for result in results.values() for system in result["systems"]))
    names = {
        "task": max(len("task"), *(len(result["task"]) for result in results.values())),
        "benchmark": max(len("benchmark"), *map(len, results)),
        "system": max(len("system"), *map(len, systems)),
    }
    room = width - sum(names.values()) - 3 * len(names) - 1
    fitting = [m for i, m in enumerate(metrics) if i == 0 or sum(len(n) + 3 for n in metrics[: i + 1]) <= room]

    table = Table(title=title, title_justify="left")
    for heading in names:
        table.add_column(heading, no_wrap=True)
    for metric in fitting:
        table.add_column(metric, justify="right", no_wrap=True)
    for name, result in results.items():
        for i, (system, figures) in enumerate(result["systems"].items()):
            labels = (result["task"], name) if i == 0 else ("", "")
            shown = (f"{figures[metric]:.4f}" if metric in figures else "" for metric in fitting)
            table.add_row(*labels, system, *shown)
        table.add_section()
    for system in systems if len(results) > 1 else ():
        rows = [result["systems"][system] for result in results.values() if system in result["systems"]]
        first = "mean" if system == systems[0] else ""
        if len(rows) == len(results):  # a mean over fewer would stand beside others as if it were comparable
            table.add_row(first, "", system, *(f"{sum(row[m] for row in rows) / len(rows):.4f}" for m in fitting))
        else:
            table.add_row(first, "", system, *(f"({len(rows)} of {len(results)})" for _ in fitting[:1]))
    return table


def show_suite(suite: Mapping[str, Any]) -> None:
    """The benchmarks of a suite: name -> BenchmarkConfig."""
    console = Console()
    table = Table(title="benchmarks", title_justify="left")
    for heading in ("benchmark", "protocol", "metrics", "note"):
        table.add_column(heading, overflow="fold")
    for name, config in suite.items():
        table.add_row(name, config.protocol, " ".join(config.metrics), config.note)
    (console if console.is_terminal else Console(width=200)).print(table)
