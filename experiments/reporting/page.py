"""The content of the report's sections. The markup is in report.html.jinja and macros.html.jinja."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from experiments.reporting.charts import (
    NUM_COLOURS,
    Chart,
    LegendEntry,
    Series,
    dot_rows,
    format_number,
    histogram,
    line_chart,
    scatter,
)
from experiments.reporting.run_files import COMPUTED, CONFIG, RunFiles, Source
from lightning_modules.pictures import transplants

PAPER_SYSTEMS = ("BM25", "SPECTER 2.0", "SciMult", "DPR (SciMult")  # prefixes of the rows in the paper's tables to show
SYSTEM_COLOURS = {"bm25": 1, "untrained": 7, "start": 7, "trained": 0, "encoder": 0}
SECTIONS = {
    "results": "Results",
    "curves": "Training",
    "experts": "Experts and gradients",
    "mining": "Hard negatives",
    "map": "Map of papers",
    "queries": "Examples",
    "failures": "Failures",
    "run": "The run",
}
MINING_COLUMNS = {  # key in a mining report -> heading and format
    "negatives": ("per query", ".1f"),
    "false_negative_rate": ("look like positives", ".1%"),
    "margin_p50": ("median margin", ".3g"),
    "without": ("queries without", ".1%"),
    "distinct": ("distinct", ".1%"),
    "kept": ("kept from before", ".1%"),
    "age": ("age in steps", ",.0f"),
}


def render(run: RunFiles) -> str:
    """Return the page. It includes styles, scripts and charts, so it needs no other file."""
    return (
        environment()
        .get_template("report.html.jinja")
        .render(
            sections=SECTIONS,
            run=run,
            config=run.source(CONFIG),
            computed=run.source(COMPUTED),
            results=run.source("results.json"),
            unfinished=None if run.results else run.baselines,
            manifest=run.source("manifest.json"),
            tiles=_tiles(run),
            result_tables=result_tables,
            result_chart=_result_chart,
            curves=_curves(run),
            expert_charts=_expert_charts(run),
            transplants=_transplants(run),
            mining_charts=_mining_charts(run),
            margins=_margins(run),
            mining_columns=MINING_COLUMNS,
            maps=_maps(run),
            map_legend=[
                LegendEntry(name, i) for i, name in enumerate((run.computed.get("map") or {}).get("labels", ()))
            ],
            train_command=lambda attempt: shlex.join(
                ["python", "-m", "experiments.train", *attempt.value["command"][1:]]
            ),
            settings=yaml.safe_dump(dict(run.config), sort_keys=False),
        )
    )


def environment() -> Environment:
    """Return the template environment: escaping, the macros, and our style sheet as `style`."""
    folder = Path(__file__).parent
    pages = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    pages.trim_blocks = pages.lstrip_blocks = True
    pages.filters |= {"figure": figure, "quote": quote}
    pages.globals["style"] = Markup((folder / "style.css").read_text(encoding="utf-8"))
    return pages


def figure(source: Source, form: str = ".3f") -> Markup:
    """Return a number as HTML with its location in the run's files. form: a format specification."""
    markup = '<data value="{}" data-source="{}">{}</data>'
    return Markup(markup).format(repr(source.value), source.location, format_number(source.value, form))


def quote(source: Source, text: Any = None) -> Markup:
    """Return text as HTML with its location in the run's files. text: by default the source's value."""
    text = source.value if text is None else text
    return Markup('<span data-source="{}">{}</span>').format(source.location, text)


@dataclass
class ResultRow:
    system: str
    values: Source
    style: str = ""


@dataclass
class ResultBlock:
    """The rows of one benchmark. paper_sizes: sizes of the paper's data, if they differ from ours."""

    name: str
    protocol: str
    source: Source
    rows: list[ResultRow] = field(default_factory=list)
    paper_sizes: Source | None = None

    def is_best(self, row: ResultRow, metric: str) -> bool:
        """Return whether a row has the highest value of all measured systems, if there are several."""
        values = [each.values[metric].value for each in self.rows if each.style != "paper" and metric in each.values]
        return len(values) > 1 and row.style != "paper" and row.values[metric].value == max(values)


def _tiles(run: RunFiles) -> list[tuple[str, Source, str, str]]:
    """Return the label, value, format and unit of each large figure at the top of the page."""
    computed, tiles = run.source(COMPUTED), []
    if "mean" in computed:
        metric = run.results.info.metrics[0]
        labels = {
            "trained": f"mean {metric}",
            "bm25": f"mean {metric} of BM25",
            "untrained": "untrained",
            "start": "before training",
        }
        means = computed["mean"]
        tiles = [(label, means[system], ".3f", "") for system, label in labels.items() if system in means]
    if computed["time"].value["value"]:
        tiles.append(("training", computed["time"]["value"], ".1f", computed["time"].value["unit"]))
    if computed["parameters_million"].value:
        tiles.append(("parameters", computed["parameters_million"], ",.1f", "million"))
    return tiles


def metrics_of(benchmark: Source, results: Source) -> Sequence[str]:
    return benchmark.value.get("metrics") or results.value["metrics"]


def result_tables(results: Source, paper: Source | None = None) -> dict[tuple[str, ...], list[ResultBlock]]:
    """Group the benchmarks by their metrics: benchmarks with the same metrics share a table.

    paper: the paper's figures for benchmarks with one of its protocols.
    """
    tables: dict[tuple[str, ...], list[ResultBlock]] = {}
    for name, result in results["benchmarks"]:
        protocol = result.value.get("protocol") or f"{result.value['task']}, {result.value['split']}"
        block = ResultBlock(name, protocol, result)
        for system, values in result["systems"]:
            block.rows.append(ResultRow(system, values, "ours" if system in ("trained", "encoder") else ""))
        if paper and name in paper:
            if "systems" in paper[name]:
                for system, values in paper[name]["systems"]:
                    if system.startswith(PAPER_SYSTEMS):
                        block.rows.append(ResultRow(system, values, "paper"))
            else:
                block.paper_sizes = paper[name]["sizes"]
        tables.setdefault(tuple(metrics_of(result, results)), []).append(block)
    return tables


def _result_chart(results: Source) -> Chart:
    rows = []
    for name, result in results["benchmarks"]:
        metric = metrics_of(result, results)[0]
        values = [
            (system, SYSTEM_COLOURS.get(system, (2 + i) % NUM_COLOURS), values[metric])
            for i, (system, values) in enumerate(result["systems"])
        ]
        rows.append((f"{name}, {metric}", values))
    return dot_rows("Main metric of each benchmark", rows)


def _series(run: RunFiles, key: str, label: str, colour: int) -> Series:
    history = run.history(key)
    return Series(label, list(history), list(history.values()), colour % NUM_COLOURS)


def _by_task(run: RunFiles, prefix: str, suffix: str) -> list[Series]:
    """Return the values of prefix/TASK/suffix, one line per task."""
    return [_series(run, f"{prefix}/{task}/{suffix}", task, colour) for colour, task in enumerate(run.tasks)]


def _curves(run: RunFiles) -> list[Chart | None]:
    metric = run.config["evaluation"]["metrics"][0]
    dev = [key for key in run.keys if key.startswith("val/") and key.endswith(f"/{metric}")]
    dev_series = [_series(run, key, key.split("/")[1], colour) for colour, key in enumerate(dev)]
    shares = [
        _series(run, "train/mfu", "MFU", 5),
        _series(run, "train/padding_share", "padding", 1),
        _series(run, "train/data_share", "waiting for data", 2),
    ]
    return [
        line_chart("Training loss", _by_task(run, "train", "loss"), zero=True),
        line_chart("Training accuracy", _by_task(run, "train", "accuracy")),
        line_chart(f"{metric} on dev", dev_series),
        line_chart("Temperature", _by_task(run, "train", "temperature"), ".4f"),
        line_chart("Task weight", _by_task(run, "train", "weight")),
        line_chart("Learning rate", [_series(run, "train/lr", "last parameter group", 0)], ".2g", zero=True),
        line_chart("Tokens per second", [_series(run, "train/tokens_per_second", "all ranks", 5)], ",.0f", zero=True),
        line_chart("Pairs per second", [_series(run, "train/pairs_per_second", "all ranks", 5)], ",.1f", zero=True),
        line_chart("Use of the hardware", shares, ".1%", zero=True),
        line_chart("Peak memory, MB", [_series(run, "train/memory_mb", "largest rank", 5)], ",.0f", zero=True),
    ]


def _expert_charts(run: RunFiles) -> list[Chart | None]:
    pairs = [(f"{a} and {b}", f"diag/{a}/gradient_cosine/{b}") for a, b in itertools.permutations(run.tasks, 2)]
    cosines = [(label, key) for label, key in pairs if key in run.keys]
    keys = [key for key in run.keys if key.startswith("diag/experts/") and key.endswith("/distance")]
    distances = [(key.split("/")[2].replace("-", " and "), key) for key in keys]

    def labelled(entries: Sequence[tuple[str, str]]) -> list[Series]:
        return [_series(run, key, label, colour) for colour, (label, key) in enumerate(entries)]

    return [
        line_chart("Cosine of gradients", labelled(cosines)),
        line_chart("Distance of experts", labelled(distances), zero=True),
        line_chart("Gradient norm", _by_task(run, "diag", "gradient_norm"), zero=True),
        line_chart("Effective negatives", _by_task(run, "diag", "effective_negatives"), ".1f", zero=True),
        line_chart("Masked documents", _by_task(run, "diag", "masked_share"), ".2%", zero=True),
        line_chart("Mean cosine of texts", _by_task(run, "diag", "mean_cosine")),
    ]


@dataclass(frozen=True)
class Transplants:
    """The last transplant matrix: each task's loss with each expert, and how much worse it is than with the task's own.

    rows: task -> loss and excess for each task's expert. The loss is None if both tasks share the expert. The excess is
        0 for the task's own expert, 1 for the worst expert, and 0 if the loss is not finite.
    """

    step: int
    source: Source
    rows: dict[str, list[tuple[Source | None, float]]]


def _transplants(run: RunFiles) -> Transplants | None:
    steps = [step for step, row in run.metrics.items() if any("/transplant/" in key for key in row)]
    if not steps:
        return None
    logged = run.row(steps[-1])
    matrix = transplants({key.removeprefix("diag/"): value for key, value in logged.value.items()}, run.tasks)

    def cell(task: str, other: str) -> tuple[Source | None, float]:
        loss = logged[f"diag/{task}/transplant/{other}"] if (task, other) in matrix.values else None
        shade = matrix.shades.get((task, other), 0.0)
        return loss, abs(shade) if math.isfinite(shade) else 0.0

    rows = {task: [cell(task, other) for other in run.tasks] for task in run.tasks if (task, task) in matrix.values}
    return Transplants(steps[-1], logged, rows) if rows else None


def _mining_charts(run: RunFiles) -> list[Chart | None]:
    return [
        line_chart("Look like positives", _by_task(run, "mine", "false_negative_rate"), ".1%", zero=True),
        line_chart("Median margin", _by_task(run, "mine", "margin_p50")),
    ]


def _margins(run: RunFiles) -> list[Chart]:
    """Return a histogram of margins for each task, from the last mining."""
    if not run.minings:
        return []
    last = run.minings[next(reversed(run.minings))]
    histograms = {task: report.value["histogram"] for task, report in last}
    return [histogram(f"Margins, {task}", h["counts"], h["edges"]) for task, h in histograms.items() if h["counts"]]


def _maps(run: RunFiles) -> list[tuple[Source, Chart]]:
    """Return each task's entry in report.json, and its map."""
    if not run.computed.get("map"):
        return []
    content = run.source(COMPUTED)["map"]
    groups, titles = content.value["groups"], list(content["titles"])
    return [(entry, scatter(task, np.array(entry.value["places"]), groups, titles)) for task, entry in content["tasks"]]
