"""Loggers of runs. metrics.jsonl: every row as a line of JSON, whatever other loggers do."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class RunLogger(Logger):
    """A logger that may also take tables, pictures and the model; none does by itself."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None: ...

    def log_picture(self, name: str, path: Path, step: int) -> None:
        """path: an SVG or PNG file."""

    def log_model(self, files: Sequence[Path]) -> None: ...

    def preempted(self) -> None:
        """The run ends, and goes on later."""

    def close(self) -> None:
        """The run is over, and has succeeded."""


def log_picture(loggers: Iterable[Logger], name: str, path: Path, step: int) -> None:
    """Give an SVG or PNG file to those loggers that take it."""
    for logger in loggers:
        if isinstance(logger, RunLogger):
            logger.log_picture(name, path, step)


class JsonlLogger(RunLogger):
    """Appends {"step": ..., "time": ..., name: value, ...} lines to a file, each written out at once.

    A resumed run does the steps since its checkpoint again, and logs them again: of two rows with the same step and
    names, the later counts.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        row = {"step": step, "time": round(time.time(), 3), **metrics}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration stands in the run's config.yaml."""
