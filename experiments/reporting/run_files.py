"""What a run's folder holds, read once: whatever is missing or was cut short is simply not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from datamodules.files import read_json
from datamodules.records import UserError
from experiments.config.paths import read_config, runs_there
from experiments.reporting.charts import NUM_TONES, Series
from experiments.reporting.source import Source

CONFIG = "config.yaml"
FIGURES = "report.json"  # what the report itself works out, beside the page


class RunFiles:
    """path: of the run. figures: what stands in report.json.

    Raises UserError for a folder that is no run.
    """

    def __init__(self, path: Path):
        if not (path / "config.yaml").is_file():
            raise UserError(f"RUN: {path} is no run's folder (it has no config.yaml). {runs_there()}")
        self.path = path
        self.config = read_config(path)
        self.figures: dict[str, Any] = {}

    def json(self, name: str) -> Any:
        """The content of a JSON file of the run, None where it has none."""
        path = self.path / name
        return read_json(path) if path.is_file() else None

    def at(self, name: str) -> Source | None:
        """The content of a file with its place; of report.json, what will stand in it."""
        if name == FIGURES:
            return Source(self.figures, f"{FIGURES}#")
        content = self.config if name == CONFIG else self.json(name)
        return None if content is None else Source(content, f"{name}#")

    def row(self, step: int) -> Source:
        """What was logged at a step."""
        return Source(self.metrics[step], f"metrics.jsonl#step={step}")

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        return self.json("manifest.json") or {}

    @cached_property
    def results(self) -> Mapping[str, Any] | None:
        return self.json("results.json")

    @cached_property
    def metrics(self) -> Mapping[int, Mapping[str, Any]]:
        """Step -> its values: of what was logged twice, after a resume, the later. A line cut short is left out."""
        found: dict[int, dict[str, Any]] = {}
        path = self.path / "metrics.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            found.setdefault(row["step"], {}).update(row)
        return dict(sorted(found.items()))

    def means(self) -> dict[str, float]:
        """System that was measured on all benchmarks -> mean of the first metric over them; none without results."""
        if not self.results:
            return {}
        metric, benchmarks = self.results["metrics"][0], self.results["benchmarks"].values()
        systems = dict.fromkeys(system for of in benchmarks for system in of["systems"])
        values = {s: [of["systems"][s][metric] for of in benchmarks if s in of["systems"]] for s in systems}
        return {s: sum(of) / len(of) for s, of in values.items() if len(of) == len(benchmarks)}

    @property
    def last_step(self) -> int:
        """The last step of which anything was logged."""
        return max(self.metrics, default=0)

    @cached_property
    def keys(self) -> list[str]:
        """All names of metrics.jsonl, in order of appearance."""
        return list(dict.fromkeys(key for row in self.metrics.values() for key in row))

    def series(self, key: str, label: str, tone: int) -> Series:
        """The values of a name over steps."""
        steps = [step for step, row in self.metrics.items() if isinstance(row.get(key), int | float)]
        return Series(label, steps, [self.row(step)[key] for step in steps], tone % NUM_TONES)

    @cached_property
    def tasks(self) -> list[str]:
        return list(self.config.get("tasks", ()))

    def each(self, pattern: str) -> dict[str, Source]:
        """Path -> content of the JSON files of a pattern, in order of their names."""
        paths = sorted(str(path.relative_to(self.path)) for path in self.path.glob(pattern))
        return {path: self.at(path) for path in paths}

    @cached_property
    def rounds(self) -> Mapping[str, Source]:
        """The report of each mining."""
        return self.each("negatives/*/report.json")

    @cached_property
    def evaluations(self) -> Mapping[str, Source]:
        """The results of each `make eval` in the run's folder."""
        return self.each("evaluation/*/results.json")
