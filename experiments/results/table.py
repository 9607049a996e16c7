"""Results as a table on the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from experiments.results.cost import total
from experiments.shared.console import table_console

Results = dict[str, Any]

COSTS = (  # heading, key of cost.total, format
    ("system", "system", ""),
    ("devices", "device", ""),
    ("texts", "texts", ",d"),
    ("tokens", "tokens", ",d"),
    ("texts/s", "texts_per_second", ",.1f"),
    ("device seconds", "device_seconds", ",.1f"),
    ("memory, MB", "memory_mb", ",d"),
    ("money", "money", ",.4f"),
)


def show(results: Results, metrics: Sequence[str], title: str) -> None:
    """A table for each list of metrics: a block a benchmark, a row a system, and means over benchmarks at the end.

    metrics: of results that name none. On a narrow terminal only the first metrics have room, and on a wide one the
    protocols too; results.json has all.
    """
    console = table_console()
    groups: dict[tuple[str, ...], Results] = {}
    for name, result in results.items():
        groups.setdefault(tuple(result.get("metrics", metrics)), {})[name] = result
    console.print(title + _in_other_precision(results), style="italic", highlight=False)
    for own, group in groups.items():
        console.print(_table(group, own, console.width))


def _in_other_precision(results: Results) -> str:
    """What is added to a title where encoders did not compute in fp32."""
    encoders = [of for r in results.values() for of in r.get("measured", {}).values() if of["similarity"] != "bm25"]
    found = {of.get("precision", "fp32") for of in encoders}
    return "" if found <= {"fp32"} else f", measured in {' and '.join(sorted(found))}"


def _table(results: Results, metrics: Sequence[str], width: int) -> Table:
    systems = list(dict.fromkeys(system for result in results.values() for system in result["systems"]))
    names = {
        "task": max(len("task"), *(len(result["task"]) for result in results.values())),
        "benchmark": max(len("benchmark"), *map(len, results)),
        "system": max(len("system"), *map(len, systems)),
    }
    room = width - sum(names.values()) - 3 * len(names) - 1
    fitting = [m for i, m in enumerate(metrics) if i == 0 or sum(len(n) + 3 for n in metrics[: i + 1]) <= room]
    room -= sum(max(len(metric), 6) + 3 for metric in fitting)
    protocols = {name: result.get("protocol", "") for name, result in results.items()}
    told = max(map(len, protocols.values())) + 3 <= room and len(fitting) == len(metrics)

    table = Table()
    for heading in names:
        table.add_column(heading, no_wrap=True)
    for metric in fitting:
        table.add_column(metric, justify="right", no_wrap=True)
    if told:
        table.add_column("protocol", no_wrap=True)
    for name, result in results.items():
        for i, (system, figures) in enumerate(result["systems"].items()):
            labels = (result["task"], name) if i == 0 else ("", "")
            shown = (f"{figures[metric]:.4f}" if metric in figures else "" for metric in fitting)
            table.add_row(*labels, system, *shown, *([protocols[name] if i == 0 else ""] if told else []))
        table.add_section()
    for system in systems if len(results) > 1 else ():
        rows = [result["systems"][system] for result in results.values() if system in result["systems"]]
        first = "mean" if system == systems[0] else ""
        if len(rows) == len(results):  # a mean over fewer would stand beside others as if it were comparable
            table.add_row(first, "", system, *(f"{sum(row[m] for row in rows) / len(rows):.4f}" for m in fitting))
        else:
            table.add_row(first, "", system, *(f"({len(rows)} of {len(results)})" for _ in fitting[:1]))
    return table


def show_cost(results: Results) -> None:
    """What each system cost over all benchmarks of a table, or over how many, where not all results tell it."""
    measured: dict[str, list[Mapping[str, Any]]] = {}
    for result in results.values():
        for system, of in result.get("measured", {}).items():
            measured.setdefault(system, []).append(of)
    told = {system: [of for of in parts if "cost" in of] for system, parts in measured.items()}
    told = {system: parts for system, parts in told.items() if parts}
    if not told:
        return
    priced = {system: sum("money" in of["cost"] for of in parts) for system, parts in told.items()}
    table = Table(title="cost", title_justify="left")
    headings = COSTS if any(priced.values()) else COSTS[:-1]
    for heading, _, _ in headings:
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for system, parts in told.items():
        of = total(parts)
        row = of | {"system": system, "device": f"{of['devices']} x {parts[0]['device']}"}
        cells = {key: "" if row.get(key) is None else format(row[key], style) for _, key, style in headings}
        if len(parts) < len(measured[system]):
            cells["system"] += f" ({len(parts)} of {len(measured[system])})"
        if 0 < priced[system] < len(parts):
            cells["money"] = f"({priced[system]} of {len(parts)})"
        table.add_row(*cells.values())
    table_console().print(table)


def show_suite(suite: Mapping[str, Any]) -> None:
    """The benchmarks of a suite: name -> BenchmarkConfig."""
    table = Table(title="benchmarks", title_justify="left")
    for heading in ("benchmark", "protocol", "metrics", "note"):
        table.add_column(heading, overflow="fold")
    for name, config in suite.items():
        table.add_row(name, config.protocol, " ".join(config.metrics), config.note)
    table_console().print(table)
