"""List runs: python -m experiments.runs [root=runs]"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.options import option
from datamodules.records import UserError, counted
from experiments.config.arguments import parse
from experiments.config.experiment import as_dict, load_config
from experiments.reporting.run_files import RunFiles
from experiments.run.folder import flat
from experiments.shared.console import entry_point
from experiments.shared.table_formats import (
    PIPE_WIDTH,
    Column,
    Format,
    Table,
    format_option,
    print_tables,
    reserve_stdout,
)

log = logging.getLogger(__name__)

SPEED_COLUMNS = {  # heading -> key in metrics.jsonl, and format
    "tokens/s": ("train/tokens_per_second", ",.0f"),
    "pairs/s": ("train/pairs_per_second", ",.1f"),
    "MFU": ("train/mfu", ".0%"),
    "padding": ("train/padding_share", ".0%"),
    "waiting": ("train/data_share", ".0%"),
    "MB": ("train/memory_mb", ",.0f"),
}
# Columns that are left out on a narrow screen, in this order.
OPTIONAL_COLUMNS = (
    *("padding", "pairs/s", "MB", "waiting", "device hours", "tokens/s", "MFU"),
    *("last logged", "BM25", "metric", "steps", "mean"),
)
NOT_SETTINGS = ("run.", "wandb.", "loggers", "experiment", "scale")  # prefixes of keys
TARGET = "._target_"
DATA_NODE = re.compile(r"task\.(?P<task>[^.]+)\.data\.(?P<name>[^.]+)(?=\.)")


@dataclass(kw_only=True)
class RunsOptions:
    """List runs, the latest first.

    A row shows the settings that differ from the run's experiment, with names as short as possible. Settings that all
    runs share are above the table. A row also shows the progress, the mean of the first metric over the benchmarks for
    the run and for BM25, the device hours, and the medians of the logged speeds. A narrow terminal shows fewer columns.
    """

    root: Path = option(Path("runs"), "folder with runs at any depth")
    format: Format = format_option()


@dataclass(frozen=True)
class ListedRun:
    """A run in the list.

    settings: dotted key -> value of settings that differ from the experiment's, or that replace a default folder name.
    record: the run's figures under the keys of the machine formats.
    data: the data on which the mean was measured.
    """

    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    record: Mapping[str, Any]
    data: Hashable


def main(arguments: Sequence[str]) -> None:
    options = parse(RunsOptions, arguments)
    reserve_stdout(options.format)
    runs, problems = [], []
    for path in sorted(options.root.rglob("config.yaml")):
        if not (path.parent / "checkpoints").is_dir():  # config.yaml of another tool
            continue
        try:
            runs.append(list_run(RunFiles(path.parent)))
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            problems.append(f"{path.parent}: not a run of this version ({error})")
    if not runs and not problems:
        raise UserError(f"root: found no runs in {options.root}; start one with make train, or set another root")
    runs.sort(key=lambda run: run.record["last logged"] or "", reverse=True)
    print_tables(options.format, [table_of(runs, f"{counted(len(runs), 'run')} in {options.root}")], records_of(runs))
    for problem in problems:
        log.warning("%s", problem)


def list_run(run: RunFiles) -> ListedRun:
    """Read what the list shows about a run."""
    max_steps, results = run.config["trainer"]["max_steps"], run.results
    means = results.means() if results else {}
    experiment, scale, seed = run.config["experiment"], run.config["scale"], run.config["run"]["seed"]
    logged = max((values["time"] for values in run.metrics.values() if "time" in values), default=None)
    record = {
        "run": str(run.path),
        **{"experiment": experiment, "scale": scale, "seed": seed},
        "steps": (results.info.stopped_at or results.info.steps) if results else run.last_step,
        "max_steps": max_steps,
        "complete": results is not None and bool(results.info.stopped_at or results.info.steps >= max_steps),
        "mean": means.get("trained"),
        "metric": results.info.metrics[0] if results else None,
        "BM25": means.get("bm25"),
        "device hours": device_hours(run),
        **{heading: run.median(key) for heading, (key, _) in SPEED_COLUMNS.items()},
        "last logged": time.strftime("%Y-%m-%d %H:%M", time.localtime(logged)) if logged else None,
    }
    has_default_name = run.path.name.startswith(f"{experiment}-{scale}-seed{seed}-")
    named = {} if has_default_name else {"experiment": experiment, "scale": scale, "run.seed": seed}
    data = [(name, table.protocol, table.data) for name, table in results.benchmarks.items()] if results else []
    return ListedRun(run.config, named | differences(run.config), record, (record["metric"], *data))


def differences(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that differ from its experiment, without tasks that the experiment lacks."""
    current = _current_settings(config["experiment"], config["scale"])
    changed = {}
    for key, value in flat(config):
        is_of_other_task = key.startswith("task.") and key.split(".")[1] not in current.get("tasks", ())
        if not key.startswith(NOT_SETTINGS) and not is_of_other_task and current.get(key) != value:
            changed[key] = value
    return changed


def _as_text(key: str, value: Any) -> str:
    """Return a value as typed on the command line, and only the name of a class."""
    if isinstance(value, list):
        return f"[{','.join(_as_text('', item) for item in value)}]"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text.rpartition(".")[2] if key.endswith(TARGET) else text


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Return the shortest end of each dotted key that no other key has. A node is named after its class."""
    paths = {key: key.removesuffix(TARGET).split(".") for key in keys}
    counts = Counter(tuple(path[i:]) for path in paths.values() for i in range(len(path)))
    return {
        key: ".".join(next((path[i:] for i in reversed(range(len(path))) if counts[tuple(path[i:])] == 1), path))
        for key, path in paths.items()
    }


@functools.cache
def _current_settings(experiment: str, scale: str) -> dict[str, Any]:
    """Return an experiment's settings by dotted key, or {} if it no longer exists or needs further keys."""
    try:
        return dict(flat(as_dict(load_config(experiment, [f"scale={scale}"], checks_classes=False))))
    except UserError:
        return {}


def device_hours(run: RunFiles) -> float:
    """Return the device hours of training, summed over all attempts that were not killed."""
    attempts = run.manifest.get("attempts", ())
    return sum((attempt["seconds"] or 0) * attempt.get("devices", 1) for attempt in attempts) / 3600


def table_of(runs: Sequence[ListedRun], title: str) -> Table:
    """Return the table of runs. Folder names are never cut, so that they can be copied."""
    short = short_keys({key for run in runs for key, _ in flat(run.config)})
    shared = _shared_settings(runs)
    if shared:
        title += f", all with {_settings_text(shared, short)}"
    metrics = {run.record["metric"] for run in runs} - {None}
    mean = f"mean {metrics.pop()}" if len(metrics) == 1 else "mean"
    texts = [_cells(run, {k: v for k, v in run.settings.items() if k not in shared}, short) for run in runs]
    columns = {
        "run": Column("run"),
        "differs in": Column("differs in", folds=True),
        "steps": Column("steps", ""),
        "mean": Column(mean, ".4f", "highest"),
        "metric": Column("metric"),
        "BM25": Column("BM25", ".4f"),
        "device hours": Column("device hours", ".2f"),
        **{heading: Column(heading, form) for heading, (_, form) in SPEED_COLUMNS.items()},
        "last logged": Column("last logged"),
    }
    if mean != "mean":
        del columns["metric"]
    shown = [key for key in columns if any(cells[key] not in (None, "") for cells in texts)]
    ranks = {key: rank for rank, key in enumerate(reversed(OPTIONAL_COLUMNS), start=1)}
    ranked = [dataclasses.replace(columns[key], rank=ranks.get(key, 0)) for key in shown]
    table = Table(ranked, title, pipe_width=PIPE_WIDTH)
    for run, cells in zip(runs, texts, strict=True):
        table.add(*(cells[key] for key in shown), group=run.data)
    return table


def _shared_settings(runs: Sequence[ListedRun]) -> dict[str, Any]:
    """Return the settings that several runs have in common; {} for a single run."""
    if len(runs) < 2:
        return {}
    first, *others = runs
    return {k: v for k, v in first.settings.items() if all((k, v) in run.settings.items() for run in others)}


def _cells(run: ListedRun, settings: Mapping[str, Any], short: Mapping[str, str]) -> dict[str, Any]:
    """Return the cells of a run by column."""
    steps, max_steps = run.record["steps"], run.record["max_steps"]
    text = f"{steps:,}" if steps == max_steps and run.record["complete"] else f"{steps:,} of {max_steps:,}"
    early = ", stopped early" if run.record["complete"] and steps < max_steps else ""
    return {**run.record, "differs in": _settings_text(settings, short), "steps": text + early}


def _settings_text(settings: Mapping[str, Any], short: Mapping[str, str]) -> str:
    """Return settings as key=value. Data sets that the experiment does not have are only named."""
    texts: dict[str, Any] = {}
    for key, value in settings.items():
        node = DATA_NODE.match(key)
        if node and node[0] + TARGET in settings:
            names = texts.setdefault(f"{node['task']}.data", [])
            names += [node["name"]] if node["name"] not in names else []
        else:
            texts[short[key]] = _as_text(key, value)
    return " ".join(f"{key}={_as_text('', value)}" for key, value in texts.items())


def records_of(runs: Sequence[ListedRun]) -> list[dict[str, Any]]:
    """Return a record for each run, with its values of all settings that any of the runs changed."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    settings = [dict(flat(run.config)) for run in runs]
    return [
        {**run.record, **{key: values.get(key) for key in keys if key not in ("experiment", "scale", "run.seed")}}
        for run, values in zip(runs, settings, strict=True)
    ]


if __name__ == "__main__":
    entry_point(main)
