"""What a run logs: metrics.jsonl, one line of JSON for every row, and the plots that W&B makes besides."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only


class JsonlLogger(Logger):
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


def log_histograms(
    loggers: Iterable[Logger], histograms: Mapping[str, tuple[np.ndarray, np.ndarray]], step: int
) -> None:
    """Plots for W&B, where it is on. histograms: name -> counts (n,) and edges (n + 1,)."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and histograms:
            import wandb

            found = {name: wandb.Histogram(np_histogram=histogram) for name, histogram in histograms.items()}
            logger.log_metrics(found, step=step)
