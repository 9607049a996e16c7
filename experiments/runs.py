"""List runs: python -m experiments.runs [root=runs]

A row for each run below the folder root, the latest first: its experiment, scale, seed, how far it is, its mean over
benchmarks in the first metric, the hours that its devices trained together, and when something was last logged.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from datamodules.records import UserError
from experiments.console import entry_point, key_values
from experiments.reporting.run_files import RunFiles

log = logging.getLogger(__name__)

KEYS = {"root": "runs"}
HEADINGS = ("run", "experiment", "scale", "seed", "state", "metric", "mean", "BM25", "device hours", "last logged")
RIGHT = ("seed", "mean", "BM25", "device hours")


def row(run: RunFiles) -> list[str]:
    """A run's cells, in the order of HEADINGS."""
    config, wanted = run.config, run.config["trainer"]["max_steps"]
    state = f"complete, {wanted:,} steps" if run.results else f"at step {run.last_step:,} of {wanted:,}"
    means = run.means()
    metric = run.results["metrics"][0] if run.results else ""
    logged = max((values["time"] for values in run.metrics.values() if "time" in values), default=None)
    return [
        str(run.path),
        *(config["experiment"], config["scale"], str(config["run"]["seed"]), state, metric),
        *(f"{means[system]:.4f}" if system in means else "" for system in ("trained", "bm25")),
        f"{device_hours(run):.2f}",
        time.strftime("%Y-%m-%d %H:%M", time.localtime(logged)) if logged else "",
    ]


def device_hours(run: RunFiles) -> float:
    """Of training, in all attempts that came to an end of their own; those that were killed have noted none."""
    attempts = run.manifest.get("attempts", ())
    return sum((of["seconds"] or 0) * of.get("devices", 1) for of in attempts) / 3600


def main(arguments: Sequence[str]) -> None:
    root = Path(key_values(arguments, KEYS)["root"])
    found, unread = [], []
    for path in sorted(root.rglob("config.yaml")):
        if not (path.parent / "checkpoints").is_dir():  # another tool's file
            continue
        try:
            found.append(row(RunFiles(path.parent)))
        except (UserError, KeyError, TypeError) as error:
            unread.append(f"{path.parent}: is no run of this version ({error})")
    if not found and not unread:
        raise UserError(f"root: there are no runs in {root}")
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    table = Table(title=f"{len(found)} runs in {root}", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold", justify="right" if heading in RIGHT else "left")
    for cells in sorted(found, key=lambda cells: cells[-1], reverse=True):
        table.add_row(*cells)
    console.print(table)
    for line in unread:
        log.warning("%s", line)


if __name__ == "__main__":
    entry_point(main)
