"""List runs: python -m experiments.runs [root=runs]

A row for each run below the folder root, the latest first: its folder; in which settings it differs from what its
experiment and scale are now (and these, where the folder's name does not tell them); how far it is; its mean over
benchmarks in the first metric, and BM25's; experiment, scale and seed; the hours that its devices trained together; and
when something was last logged. On a narrow terminal some columns are left out.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from datamodules.records import UserError
from experiments.config.experiment import as_dict, load_config
from experiments.reporting.run_files import RunFiles
from experiments.run.folder import flat
from experiments.shared.console import counted, entry_point, key_values, table_console

log = logging.getLogger(__name__)

KEYS = {"root": "runs"}
HEADINGS = (
    "run",
    "differs in",
    "steps",
    "mean",
    "metric",
    "BM25",
    "experiment",
    "scale",
    "seed",
    "device hours",
    "last logged",
)
RIGHT = ("steps", "mean", "BM25", "seed", "device hours")
LEAVE_OUT = ("seed", "scale", "experiment", "device hours", "last logged", "BM25", "metric", "steps", "mean")
NARROWEST = 24  # letters of the settings, which are folded
TOLD_ELSEWHERE = ("experiment", "scale", "run.", "wandb.")


def row(run: RunFiles) -> list[str]:
    """A run's cells, in the order of HEADINGS."""
    wanted, means = run.config["trainer"]["max_steps"], run.means()
    experiment, scale, seed = run.config["experiment"], run.config["scale"], str(run.config["run"]["seed"])
    told = run.path.name.startswith(f"{experiment}-{scale}-seed{seed}-")
    names = [] if told else [f"EXP={experiment}", f"SCALE={scale}", f"run.seed={seed}"]
    metric = run.results["metrics"][0] if run.results else ""
    logged = max((values["time"] for values in run.metrics.values() if "time" in values), default=None)
    return [
        str(run.path),
        " ".join([*names, *differences(run.config)]),
        f"{wanted:,}" if run.results else f"{run.last_step:,} of {wanted:,}",
        f"{means['trained']:.4f}" if "trained" in means else "",
        metric,
        f"{means['bm25']:.4f}" if "bm25" in means else "",
        *(experiment, scale, seed),
        f"{device_hours(run):.2f}",
        time.strftime("%Y-%m-%d %H:%M", time.localtime(logged)) if logged else "",
    ]


def differences(config: Mapping[str, Any]) -> Iterator[str]:
    """key=value of a run that its experiment has otherwise; of tasks that this does not name, their names alone."""
    usual = _usual(config["experiment"], config["scale"])
    for key, value in flat(config):
        of_other_task = key.startswith("task.") and key.split(".")[1] not in usual.get("tasks", ())
        if key.startswith(TOLD_ELSEWHERE) or of_other_task or usual.get(key) == value:
            continue
        yield f"{key}={_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@functools.cache
def _usual(experiment: str, scale: str) -> dict[str, Any]:
    """The settings of an experiment, by keys with dots; none where it is there no more, or needs further ones."""
    try:
        return dict(flat(as_dict(load_config(experiment, [f"scale={scale}"]))))
    except UserError:
        return {}


def device_hours(run: RunFiles) -> float:
    """Of training, in all attempts that came to an end of their own; those that were killed have noted none."""
    attempts = run.manifest.get("attempts", ())
    return sum((of["seconds"] or 0) * of.get("devices", 1) for of in attempts) / 3600


def table_of(rows: Sequence[Sequence[str]], title: str, width: int) -> Table:
    """As many columns as there is room for; names of folders stay whole, to be copied."""
    longest = {h: max(map(len, (h, *(cells[i] for cells in rows)))) for i, h in enumerate(HEADINGS)}
    least = longest | {"differs in": min(longest["differs in"], NARROWEST)}
    shown = list(HEADINGS)
    for heading in LEAVE_OUT:
        if sum(least[name] + 3 for name in shown) + 1 > width:
            shown.remove(heading)
    table = Table(title=title, title_justify="left")
    for heading in shown:
        folds = heading == "differs in"
        table.add_column(
            heading,
            justify="right" if heading in RIGHT else "left",
            no_wrap=not folds,
            overflow="fold" if folds else "ignore",
            min_width=None if folds else longest[heading],
        )
    for cells in rows:
        table.add_row(*(cells[HEADINGS.index(heading)] for heading in shown))
    return table


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
    console = table_console()
    found.sort(key=lambda cells: cells[-1], reverse=True)
    console.print(table_of(found, f"{counted(len(found), 'run')} in {root}", console.width))
    for line in unread:
        log.warning("%s", line)


if __name__ == "__main__":
    entry_point(main)
