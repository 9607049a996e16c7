"""Compare a joint model with one model per task: relative gains, and their mean over tasks, Delta_MTL."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from datamodules.records import UserError
from experiments.results.comparison import (
    MeasuredSystem,
    aligned_values,
    chosen_benchmarks,
    incomparable,
    open_systems,
)
from experiments.results.results import BenchmarkTable
from experiments.shared.table_formats import Column, Table
from lightning_modules.retrieval.relative_gain import relative_gains

SingleTaskModels = Mapping[str, Sequence[MeasuredSystem]]  # task -> seeds of its model


def open_single_task_models(
    entries: Sequence[str], joint: Sequence[MeasuredSystem], packages: Sequence[str] = ()
) -> dict[str, list[MeasuredSystem]]:
    """Open TASK:FOLDER or TASK:FOLDER:SYSTEM for each single-task model. Several entries of a task are its seeds.

    Raises UserError for a task that the joint model was not evaluated on.
    """
    tasks = list(dict.fromkeys(str(table.task) for system in joint for table in system.benchmarks.values()))
    names = defaultdict(list)
    for entry in entries:
        task, colon, name = entry.partition(":")
        if not colon or task not in tasks:
            raise UserError(
                f"single: expected TASK:FOLDER with a task that A has results on ({', '.join(tasks)}), got {entry}"
            )
        names[task].append(name)
    return {task: open_systems(f"single={task}", folders, packages) for task, folders in names.items()}


def compare_with_single_tasks(
    joint: Sequence[MeasuredSystem],
    single: SingleTaskModels,
    *,
    benchmarks: Sequence[str] = (),
    metric: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return the gains of the joint model on each benchmark and task, Delta_MTL, and why benchmarks are left out.

    benchmarks: by default, all benchmarks of the tasks.
    metric: by default, the main metric of each benchmark.
    options: options of relative_gains.

    Raises UserError if a task has no single-task model, or no benchmark on which the models can be compared.
    """
    tables = _tables(joint, single)
    values: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = defaultdict(dict)
    described, left_out = {}, {}
    for name in chosen_benchmarks(benchmarks, tables):
        task = str(tables[name].task)
        if task not in single:
            raise UserError(
                f"single: has no model of {task}, which A was evaluated on; add {task}:FOLDER, or name the benchmarks "
                "to compare with benchmark=NAME,..."
            )
        try:
            values[task][name], described[name] = _compare_on(name, joint, single[task], metric)
        except UserError as error:
            left_out[name] = str(error)
    if lost := {str(tables[name].task) for name in left_out} - set(values):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items() if tables[name].task in lost)
        raise UserError(
            f"single: the models of {', '.join(sorted(lost))} cannot be compared with A ({reasons}); evaluate both on "
            "the same data (make eval model=...)"
        )
    gains = relative_gains(values, **options)
    return {
        "A": list(map(str, joint)),
        "single": {task: list(map(str, systems)) for task, systems in single.items()},
        **options,
        "benchmarks": {name: each | dataclasses.asdict(gains.benchmarks[name]) for name, each in described.items()},
        "tasks": {task: dataclasses.asdict(gain) for task, gain in gains.tasks.items()},
        "delta_mtl": dataclasses.asdict(gains.delta_mtl),
        "left_out": left_out,
    }


def _tables(joint: Sequence[MeasuredSystem], single: SingleTaskModels) -> dict[str, BenchmarkTable]:
    """Return the joint model's benchmarks, and each single-task model's benchmarks on its own task."""
    tables = {name: table for system in joint for name, table in system.benchmarks.items()}
    for task, systems in single.items():
        results = {name: each for system in systems for name, each in system.benchmarks.items() if each.task == task}
        if not results:
            raise UserError(f"single={task}: {systems[0].folder} has no results of {task}; evaluate it on that task")
        tables |= results | tables
    return tables


def _compare_on(
    name: str, joint: Sequence[MeasuredSystem], single: Sequence[MeasuredSystem], metric: str | None
) -> tuple[tuple[np.ndarray, np.ndarray], dict[str, Any]]:
    """Return the values of both models on a benchmark, (S, Q) and (S', Q), and its entry for compare.json.

    Raises UserError if they cannot be compared.
    """
    if reason := incomparable((*joint, *single), name):
        raise UserError(reason)
    table, metric = joint[0].benchmarks[name], metric or joint[0].main_metric(name)
    values, single_values, queries = aligned_values(joint, single, name, metric)
    return (values, single_values), {
        **{key: getattr(table, key) for key in ("task", "split", "protocol", "data")},
        "metric": metric,
        "queries": len(queries),
        "mean_joint": float(values.mean()),
        "mean_single": float(single_values.mean()),
    }


def gain_table(content: Mapping[str, Any]) -> Table:
    """Return a table of gains in percent: for benchmarks, for tasks with several benchmarks, and Delta_MTL."""
    numbers = [("queries", "d"), ("A", ".4f"), ("single", ".4f"), ("gain %", "+.2f"), ("from", "+.2f"), ("to", "+.2f")]
    columns = [Column("task"), Column("benchmark", folds=True), Column("metric")]
    table = Table(
        [*columns, *(Column(heading, form) for heading, form in numbers)],
        title=f"Relative gain of A over single-task models, with {content['level']:.0%} interval",
    )
    for task, gain in content["tasks"].items():
        inside = {name: each for name, each in content["benchmarks"].items() if each["task"] == task}
        for name, each in inside.items():
            means = (each["queries"], each["mean_joint"], each["mean_single"])
            table.add(task, name, each["metric"], *means, *_percent(each), ends_section=len(inside) == 1)
        if len(inside) > 1:
            table.add(task, f"mean of {len(inside)}", "", None, None, None, *_percent(gain), ends_section=True)
    table.add("Delta_MTL", "mean over tasks", "", None, None, None, *_percent(content["delta_mtl"]))
    return table


def gain_records(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per benchmark, one per task (without benchmark), and one for Delta_MTL (without task)."""
    benchmarks = [{"task": each["task"], "benchmark": name, **each} for name, each in content["benchmarks"].items()]
    empty = dict.fromkeys(benchmarks[0])
    tasks = [empty | {"task": task, **gain} for task, gain in content["tasks"].items()]
    return [{"measure": "gain", **row} for row in (*benchmarks, *tasks)] + [
        {"measure": "delta_mtl", **empty, **content["delta_mtl"]}
    ]


def _percent(gain: Mapping[str, float]) -> list[float]:
    return [100 * gain[key] for key in ("gain", "low", "high")]
