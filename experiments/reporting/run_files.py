"""The files in a run's folder, read once. A missing or truncated file counts as absent."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datamodules.files import read_json, read_rows
from datamodules.records import UserError
from experiments.config.experiment import read_config
from experiments.config.run_config import existing_runs
from experiments.results.results import Results, read_results, read_run_results, read_tables
from experiments.run.folder import manifest_of
from lightning_modules.mining.report import read_values

log = logging.getLogger(__name__)

CONFIG, MANIFEST = "config.yaml", "manifest.json"
COMPUTED = "report.json"  # the report's own calculations, stored next to the page


@dataclass(frozen=True)
class Source:
    """A value from a run's files, and where it is stored.

    location: FILE#/KEY/KEY with keys as in RFC 6901 (JSON pointers), or FILE#step=STEP/KEY for JSON lines.
    """

    value: Any
    location: str

    def __getitem__(self, key: Any) -> Source:
        return Source(self.value[key], f"{self.location}/{str(key).replace('~', '~0').replace('/', '~1')}")

    def __contains__(self, key: Any) -> bool:
        return key in self.value

    def __iter__(self) -> Iterator[Any]:
        """Yield the items of a list, or the keys and values of a mapping."""
        if isinstance(self.value, list):
            return (self[i] for i in range(len(self.value)))
        return ((key, self[key]) for key in self.value)


class RunFiles:
    """The files of one run. Raises UserError if the folder is not a run.

    path: folder of the run.
    computed: content of report.json.
    """

    def __init__(self, path: Path):
        if not (path / CONFIG).is_file():
            raise UserError(f"RUN: {path} is not a run's folder (it has no {CONFIG}). {existing_runs()}")
        self.path = path
        self.config = read_config(path)
        self.computed: dict[str, Any] = {}

    def source(self, name: str) -> Source | None:
        """Return the content of a file with its location, or None if it is missing."""
        if name == COMPUTED:
            return Source(self.computed, f"{COMPUTED}#")
        if not (self.path / name).is_file():
            return None
        read = {CONFIG: lambda: self.config, MANIFEST: lambda: self.manifest}
        return Source(read[name]() if name in read else read_json(self.path / name), f"{name}#")

    def row(self, step: int) -> Source:
        """Return the values logged at a step."""
        return Source(self.metrics[step], f"metrics.jsonl#step={step}")

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        return manifest_of(self.path)

    @cached_property
    def results(self) -> Results | None:
        path = self.path / "results.json"
        return read_run_results(path)[0] if path.is_file() else None

    @cached_property
    def metrics(self) -> Mapping[int, Mapping[str, Any]]:
        """Logged values by step. If a step was logged twice, the later value counts. Damaged lines are skipped."""
        metrics: dict[int, dict[str, Any]] = {}
        for row in read_rows(self.path / "metrics.jsonl"):
            if type(row.get("step")) is int:
                metrics.setdefault(row["step"], {}).update(row)
        return dict(sorted(metrics.items()))

    @property
    def last_step(self) -> int:
        """The last step with a logged value."""
        return max(self.metrics, default=0)

    @cached_property
    def keys(self) -> list[str]:
        """All keys of metrics.jsonl, in order of appearance."""
        return list(dict.fromkeys(key for row in self.metrics.values() for key in row))

    def history(self, key: str) -> dict[int, Source]:
        """Return the values of a key by step."""
        return {s: self.row(s)[key] for s, row in self.metrics.items() if isinstance(row.get(key), int | float)}

    def median(self, key: str) -> float | None:
        """Return the median of the logged values of a key, or None if there are none."""
        values = [source.value for source in self.history(key).values()]
        return statistics.median(values) if values else None

    @cached_property
    def tasks(self) -> list[str]:
        return list(self.config.get("tasks", ()))

    def matching(self, pattern: str, read: Callable[[Path], Any]) -> dict[str, Source]:
        """Return the content of the JSON files whose path matches a pattern, ordered by path.

        read: function that raises UserError for a damaged file. Such files are left out, with a warning.
        """
        sources = {}
        for path in sorted(self.path.glob(pattern)):
            try:
                read(path)
            except UserError as error:
                log.warning("the report leaves out a damaged file: %s", error)
                continue
            name = str(path.relative_to(self.path))
            sources[name] = self.source(name)
        return sources

    @cached_property
    def baselines(self) -> Source | None:
        """The results of BM25 and of the encoder before training, or None if they are missing."""
        return self.matching("baselines.json", read_tables).get("baselines.json")

    @cached_property
    def minings(self) -> Mapping[str, Source]:
        """The report of each mining during training."""
        return self.matching("negatives/*/report.json", read_values)

    @cached_property
    def evaluations(self) -> Mapping[str, Source]:
        """The results of each `make eval` that are in the run's folder."""
        return self.matching("evaluation/*/results.json", read_results)
