"""Report the results of `make bench BENCH=gpu`: on the console, in gpu.json, and in gpu.html with a plot."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import logging
import os
import platform
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.table import Column, Table

from datamodules.files import write_json, write_text
from experiments.bench.gpu_checks import Check
from experiments.bench.gpu_parts import OURS, Figure
from experiments.bench.peer import PEER, peer_version
from experiments.bench.workload import Workload
from experiments.reporting.charts import Chart, dot_rows
from experiments.reporting.page import environment
from experiments.reporting.run_files import Source
from experiments.shared.console import relative_path, table_console
from lightning_modules.retrieval.compute import describe_device

log = logging.getLogger(__name__)

COLUMNS = ("part", "system", "setting", "speed", "unit", "useful TFLOP/s", "MFU", f"x {PEER}'s best")
SYSTEMS = {OURS: 0, f"{PEER}, best": 1, f"{PEER}, default": 7}  # and its colour in the plot
PAGE = """{% from "macros.html.jinja" import charts, table %}
<!doctype html>
<html lang="en">
<head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>Speed on {{ facts["device"] }}</title><link rel="icon" href="data:,"/><style>{{ style }}</style></head>
<body><header><h1>Speed on {{ facts["device"] }}</h1>
<p>{% for name, value in facts.items() %}{{ name }}: {{ value }}{% if not loop.last %}; {% endif %}{% endfor %}</p>
</header>
<main>{% if chart %}{{ charts([chart]) }}{% endif %}
{% for headings, rows in tables if rows %}
{% call table(headings, "", "texts") %}
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
{% endcall %}
{% endfor %}
</main></body></html>
"""


class Results:
    """The figures and checks so far. Each is printed when it is added."""

    def __init__(self, workload: Workload):
        self.facts, self.started = facts(workload), time.perf_counter()
        self.figures: list[Figure] = []
        self.checks: list[Check] = []
        self.skipped: list[tuple[str, str]] = []
        for name, value in self.facts.items():
            log.info("%s: %s", name, value)

    def add(self, result: Figure | Check) -> None:
        seconds = time.perf_counter() - self.started
        if isinstance(result, Check):
            self.checks.append(result)
            log.info("%4.0f s  %s  %s: %s", seconds, result.verdict, result.name, result.detail)
            return
        self.figures.append(result)
        share = f", MFU {result.mfu:.2f}" if result.mfu else ""
        speed = f"{format_speed(result.speed)} {result.unit}{share}"
        log.info("%4.0f s  %s  %s, %s: %s", seconds, result.part, result.system, result.setting, speed)

    def skip(self, part: str, reason: str) -> None:
        self.skipped.append((part, reason))
        log.info("%4.0f s  %s  %s", time.perf_counter() - self.started, part, reason)

    def write(self, folder: Path) -> None:
        """Print the tables, and write gpu.json and gpu.html."""
        self.facts["seconds"] = f"{time.perf_counter() - self.started:.0f}"
        tables = [
            (COLUMNS, [self._row(figure) for figure in self.figures]),
            (("check", "", "figures"), [(check.name, check.verdict, check.detail) for check in self.checks]),
            (("part", "not measured"), self.skipped),
        ]
        for headings, rows in tables:
            if rows:
                table = Table(*(Column(heading, overflow="fold") for heading in headings))
                for row in rows:
                    table.add_row(*row)
                table_console().print(table)
        content = {
            "facts": self.facts,
            "figures": [dataclasses.asdict(figure) for figure in self.figures],
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "skipped": dict(self.skipped),
        }
        write_json(folder / "gpu.json", content)
        page = environment().from_string(PAGE)
        write_text(folder / "gpu.html", page.render(facts=self.facts, chart=plot(self.figures), tables=tables))
        log.info("wrote %s and gpu.html", relative_path(folder / "gpu.json"))

    def _row(self, figure: Figure) -> tuple[str, ...]:
        best = best_of(self.figures, figure.part, figure.unit)
        ratio = f"{figure.speed / best.speed:.2f}" if best and figure.system == OURS else ""
        flops, mfu = f"{figure.flops / 1e12:.3g}" if figure.flops else "", f"{figure.mfu:.2f}" if figure.mfu else ""
        return figure.part, figure.system, figure.setting, format_speed(figure.speed), figure.unit, flops, mfu, ratio


def facts(workload: Workload) -> dict[str, str]:
    """Describe the device, the versions and the workload."""
    peer, lengths = peer_version(), workload.lengths
    busy = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    packages = ("torch", "transformers", "lightning")
    config = workload.encoder().backbone.config
    return {
        "device": describe_device(workload.device),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
        + f", Python {platform.python_version()}",
        PEER: peer or "not installed, so there is nothing to compare with (pip install sentence-transformers)",
        "FlashAttention package": "installed" if importlib.util.find_spec("flash_attn") else "not installed",
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} threads, load at the start {busy}",
        "encoder": f"{config.num_hidden_layers} layers, {config.hidden_size} hidden, {workload.pooling} pooling, "
        f"{workload.precision}, random weights",
        "texts": f"{len(lengths):,}, {lengths.mean():.0f} tokens in the mean, at most {lengths.max()}",
        "ceiling": f"{workload.ceiling / 1e12:.3g} TFLOP/s, a matrix product of the encoder's width",
    }


def best_of(figures: list[Figure], part: str, unit: str) -> Figure | None:
    """Return the fastest setting of sentence-transformers in a part, or None."""
    rivals = [f for f in figures if (f.part, f.unit, f.system) == (part, unit, PEER)]
    return max(rivals, key=lambda figure: figure.speed, default=None)


def plot(figures: list[Figure]) -> Chart | None:
    """Return a chart of MFU by part: ours, and sentence-transformers with its best and its default settings."""
    rows = []
    for part in dict.fromkeys(figure.part for figure in figures if figure.mfu):
        rows.append((part, list(_dots(figures, part))))
    return dot_rows("Model FLOPs utilisation", rows) if rows else None


def _dots(figures: list[Figure], part: str) -> Iterator[tuple[str, int, Source]]:
    candidates = [(number, figure) for number, figure in enumerate(figures) if figure.part == part and figure.mfu]
    ours = [each for each in candidates if each[1].system == OURS]
    theirs = [each for each in candidates if each[1].system == PEER]
    default = [each for each in theirs if each[1].is_default]
    for (system, colour), points in zip(SYSTEMS.items(), (ours, theirs, default), strict=True):
        if points:
            number, figure = max(points, key=lambda each: each[1].mfu)
            yield system, colour, Source(figure.mfu, f"gpu.json#/figures/{number}/mfu")


def format_speed(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
