"""Interference between the tasks of an arm: cosines of their gradients, and rankings by other experts."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.files import read_rows
from datamodules.records import UserError
from experiments.results.comparison import MeasuredSystem, aligned_values
from experiments.shared.table_formats import Column, Table
from lightning_modules.retrieval.significance import bootstrap_interval

COSINE = re.compile(r"diag/([^/]+)/gradient_cosine/([^/]+)")

Content = Mapping[str, Any]


def gradient_cosines(run: Path) -> dict[str, float]:
    """Return TASK/OTHER -> mean cosine of the two tasks' gradients over the logged steps."""
    cosines: dict[str, list[float]] = defaultdict(list)
    for row in read_rows(run / "metrics.jsonl"):
        for key, value in row.items():
            if (match := COSINE.fullmatch(key)) and isinstance(value, float) and math.isfinite(value):
                cosines[f"{match[1]}/{match[2]}"].append(value)
    return {pair: statistics.fmean(values) for pair, values in cosines.items()}


def check_transplants(transplants: Mapping[str, str], benchmarks: Content) -> None:
    """Raise UserError if the two benchmarks of a transplant were measured on different data."""
    for name, original in transplants.items():
        if {name, original} <= benchmarks.keys() and any(
            benchmarks[name][key] != benchmarks[original][key] for key in ("data", "metric")
        ):
            raise UserError(f"transplants.{name}: expected the same data and main metric as {original}")


def interference(
    arm: str,
    runs: Sequence[Content],
    systems: Sequence[MeasuredSystem],
    transplants: Mapping[str, str],
    benchmarks: Content,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each pair of different tasks of an arm. Values are means over seeds, steps and benchmarks.

    runs: content of study.json for each seed, which has the cosines.
    transplants: benchmark ranked by another task's expert -> benchmark on the same data ranked by its own.
    """
    measured: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for name, original in transplants.items():
        if all({name, original} <= system.benchmarks.keys() for system in systems):
            by_other, by_own, _ = aligned_values(systems, systems, name, benchmarks[original]["metric"], original)
            measured[benchmarks[original]["task"], benchmarks[name]["task"]].append((by_other, by_own))
    cosines: dict[tuple[str, str], float] = {}
    for key in sorted(set.intersection(*(set(run["cosines"]) for run in runs))):
        task, other = key.split("/")
        cosines[task, other] = cosines[other, task] = statistics.fmean(run["cosines"][key] for run in runs)
    if not cosines and all(np.array_equal(a, b) for pairs in measured.values() for a, b in pairs):
        return  # all tasks have the same vectors, and nothing was logged
    for task, other in sorted({*cosines, *measured}):
        row = {"arm": arm, "task": task, "other": other, "cosine": cosines.get((task, other))}
        if pairs := measured.get((task, other)):
            by_other, by_own = (
                statistics.fmean(float(values.mean()) for values in side) for side in zip(*pairs, strict=True)
            )
            low, high = bootstrap_interval(pairs, paired_seeds=True)
            row |= {"own": by_own, "transplanted": by_other, "difference": by_other - by_own, "low": low, "high": high}
        yield row


def interference_table(rows: Sequence[Content]) -> Table:
    """Return a table of the rows of `interference`, in points."""
    has_transplants = any("own" in row for row in rows)
    columns = [*map(Column, ("arm", "task", "other task")), Column("cosine of gradients", ".2f")]
    transplants = [Column("own expert", ".1f"), Column("other's expert", ".1f"), Column("difference", "")]
    table = Table([*columns, *transplants] if has_transplants else columns)
    for row in rows:
        points = [100 * row[key] if key in row else None for key in ("own", "transplanted")]
        measured = [*points, with_interval(row) if "own" in row else None] if has_transplants else []
        table.add(row["arm"], row["task"], row["other"], row["cosine"], *measured)
    return table


def with_interval(row: Content) -> str:
    """Format a difference in points with its interval."""
    difference, low, high = (f"{100 * row[key]:+.1f}" for key in ("difference", "low", "high"))
    return f"{difference} [{low}, {high}]"
