"""What a sweep came to: its trials by their metric, the best first."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.table import Table

from datamodules.files import write_json
from experiments.shared.console import table_console
from experiments.sweeping.controller import Controller
from experiments.sweeping.file import Sweep


def ranked(controller: Controller) -> list[dict[str, Any]]:
    """A row for each trial: number, parameters, state, value and run, and why it was stopped; the best first."""
    sweep, states, rows = controller.sweep, controller.states(), []
    for trial in controller.trials:
        known = states.get(trial.number, {})
        state, value = known.get("state", "waiting"), trial.value(sweep.metric, sweep.maximize)
        row = {"trial": trial.number, "parameters": dict(trial.parameters), "state": state, "value": value}
        why = {"step": known["step"], "reason": known["reason"]} if state == "stopped" else {}
        rows.append(row | why | {"run": str(trial.folder)})
    return sorted(rows, key=lambda row: _key(row, sweep.maximize))


def _key(row: dict[str, Any], maximize: bool) -> tuple[bool, float]:
    """Finished ones first, then by value."""
    if row["value"] is None or not math.isfinite(row["value"]):
        return True, math.inf
    return row["state"] != "finished", -row["value"] if maximize else row["value"]


def write_table(folder: Path, sweep: Sweep, rows: list[dict[str, Any]]) -> None:
    """results.json of the sweep."""
    goal = "maximize" if sweep.maximize else "minimize"
    content = {"sweep": sweep.name, "experiment": sweep.experiment, "overrides": list(sweep.overrides)}
    write_json(folder / "results.json", content | {"metric": sweep.metric, "goal": goal, "trials": rows})


def show(sweep: Sweep, rows: list[dict[str, Any]]) -> None:
    console = table_console()
    table = Table(title=f"{sweep.name} ({sweep.experiment}): {sweep.metric}", title_justify="left")
    names = [parameter.name for parameter in sweep.parameters]
    for heading in ("trial", *names, "state", sweep.metric.rpartition("/")[2]):
        table.add_column(heading, justify="left" if heading == "state" else "right")
    stopped = any("reason" in row for row in rows)
    if stopped:
        table.add_column("why", overflow="fold")
    for row in rows:
        value = "" if row["value"] is None else f"{row['value']:.4f}"
        cells = (_short(row["parameters"][name]) for name in names)
        state = f"stopped early at step {row['step']}" if "reason" in row else row["state"]
        table.add_row(str(row["trial"]), *cells, state, value, *([row.get("reason", "")] if stopped else []))
    console.print(table)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "null" if value is None else str(value)
