"""metrics.jsonl: every logged row of a run as one line of JSON, whatever other loggers do."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
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
