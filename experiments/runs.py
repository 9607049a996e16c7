"""List runs: python -m experiments.runs [root=runs]"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from datamodules.options import option
from datamodules.records import UserError
from experiments.config.arguments import parse
from experiments.config.experiment import as_dict, load_config
from experiments.reporting.run_files import RunFiles
from experiments.run.folder import flat
from experiments.shared.console import counted, entry_point, table_console

log = logging.getLogger(__name__)

SPEED_COLUMNS = {  # heading -> key in metrics.jsonl, and format
    "tokens/s": ("train/tokens_per_second", ",.0f"),
    "pairs/s": ("train/pairs_per_second", ",.1f"),
    "MFU": ("train/mfu", ".0%"),
    "padding": ("train/padding_share", ".0%"),
    "waiting": ("train/data_share", ".0%"),
    "MB": ("train/memory_mb", ",.0f"),
}
RIGHT_ALIGNED = ("steps", "mean", "BM25", "seed", "device hours", *SPEED_COLUMNS)
# Columns that are left out on a narrow terminal, in this order.
OPTIONAL_COLUMNS = (
    *("padding", "pairs/s", "MB", "waiting", "seed", "scale", "experiment", "device hours", "tokens/s", "MFU"),
    *("last logged", "BM25", "metric", "steps", "mean"),
)
SETTINGS_WIDTH = 24  # minimum number of characters of the column "differs in", whose text is folded
IN_OTHER_COLUMNS = ("experiment", "scale", "run.", "wandb.", "loggers")  # prefixes of keys


@dataclass(kw_only=True)
class RunsOptions:
    """List runs, the latest first.

    A row shows how a run differs from the current settings of its experiment, its progress, its mean over the
    benchmarks in the first metric, next to BM25's, its device hours, and the medians of its logged speeds. On a narrow
    terminal, some columns are left out.
    """

    root: Path = option(Path("runs"), "folder with runs at any depth")


def main(arguments: Sequence[str]) -> None:
    root = parse(RunsOptions, arguments).root
    rows, problems = [], []
    for path in sorted(root.rglob("config.yaml")):
        if not (path.parent / "checkpoints").is_dir():  # a file of another tool
            continue
        try:
            rows.append(row(RunFiles(path.parent)))
        except (UserError, KeyError, TypeError, AttributeError, ValueError) as error:
            problems.append(f"{path.parent}: not a run of this version ({error})")
    if not rows and not problems:
        raise UserError(f"root: there are no runs in {root}")
    rows.sort(key=lambda cells: cells["last logged"], reverse=True)
    console = table_console()
    console.print(table_of(rows, f"{counted(len(rows), 'run')} in {root}", console.width))
    for problem in problems:
        log.warning("%s", problem)


def row(run: RunFiles) -> dict[str, str]:
    """Return the cells of a run by column."""
    max_steps, means = run.config["trainer"]["max_steps"], run.means()
    steps = f"{run.last_step:,} of {max_steps:,}"
    if run.results:
        stopped_at = run.results.info.stopped_at
        steps = f"{stopped_at:,} of {max_steps:,}, stopped early" if stopped_at else f"{max_steps:,}"
    experiment, scale, seed = run.config["experiment"], run.config["scale"], str(run.config["run"]["seed"])
    has_default_name = run.path.name.startswith(f"{experiment}-{scale}-seed{seed}-")
    names = [] if has_default_name else [f"EXP={experiment}", f"SCALE={scale}", f"run.seed={seed}"]
    logged = max((values["time"] for values in run.metrics.values() if "time" in values), default=None)
    return {
        "run": str(run.path),
        "differs in": " ".join([*names, *differences(run.config)]),
        "steps": steps,
        "mean": f"{means['trained']:.4f}" if "trained" in means else "",
        "metric": run.results.info.metrics[0] if run.results else "",
        "BM25": f"{means['bm25']:.4f}" if "bm25" in means else "",
        "experiment": experiment,
        "scale": scale,
        "seed": seed,
        "device hours": f"{device_hours(run):.2f}",
        **{heading: _median(run, key, form) for heading, (key, form) in SPEED_COLUMNS.items()},
        "last logged": time.strftime("%Y-%m-%d %H:%M", time.localtime(logged)) if logged else "",
    }


def _median(run: RunFiles, key: str, form: str) -> str:
    value = run.typical(key)
    return "" if value is None else format(value, form)


def differences(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield key=value where a run differs from its experiment, except for tasks that the experiment does not have."""
    current = _current_settings(config["experiment"], config["scale"])
    for key, value in flat(config):
        is_of_other_task = key.startswith("task.") and key.split(".")[1] not in current.get("tasks", ())
        if not key.startswith(IN_OTHER_COLUMNS) and not is_of_other_task and current.get(key) != value:
            yield f"{key}={_as_text(value)}"


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_as_text, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@functools.cache
def _current_settings(experiment: str, scale: str) -> dict[str, Any]:
    """Return an experiment's settings by dotted key; {} if it no longer exists or needs further keys."""
    try:
        return dict(flat(as_dict(load_config(experiment, [f"scale={scale}"]))))
    except UserError:
        return {}


def device_hours(run: RunFiles) -> float:
    """Return the hours of training times devices, summed over all attempts that were not killed."""
    attempts = run.manifest.get("attempts", ())
    return sum((attempt["seconds"] or 0) * attempt.get("devices", 1) for attempt in attempts) / 3600


def table_of(rows: Sequence[Mapping[str, str]], title: str, width: int) -> Table:
    """Return a table with as many columns as fit. Folder names are never cut, so that they can be copied."""
    table = Table(title=title, title_justify="left")
    if not rows:
        return table
    longest = {heading: max(map(len, (heading, *(cells[heading] for cells in rows)))) for heading in rows[0]}
    least = longest | {"differs in": min(longest["differs in"], SETTINGS_WIDTH)}
    shown = list(longest)
    for heading in OPTIONAL_COLUMNS:
        if sum(least[name] + 3 for name in shown) + 1 > width:
            shown.remove(heading)
    for heading in shown:
        folds = heading == "differs in"
        table.add_column(
            heading,
            justify="right" if heading in RIGHT_ALIGNED else "left",
            no_wrap=not folds,
            overflow="fold" if folds else "ignore",
            min_width=None if folds else longest[heading],
        )
    for cells in rows:
        table.add_row(*(cells[heading] for heading in shown))
    return table


if __name__ == "__main__":
    entry_point(main)
