"""Loggers of runs: what they may take besides metrics, and metrics.jsonl, one line of JSON for every row."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger(__name__)


class RunLogger(Logger):
    """A logger that may also take tables, pictures, histograms and the model; by itself it takes none."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None: ...

    def log_picture(self, name: str, path: Path, step: int) -> None:
        """path: an SVG or PNG file."""

    def log_histograms(self, histograms: Mapping[str, tuple[np.ndarray, np.ndarray]], step: int) -> None:
        """histograms: name -> counts (n,) and edges (n + 1,)."""

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


def log_histograms(
    loggers: Iterable[Logger], histograms: Mapping[str, tuple[np.ndarray, np.ndarray]], step: int
) -> None:
    """Give histograms to those loggers that take them. histograms: name -> counts (n,) and edges (n + 1,)."""
    for logger in loggers:
        if isinstance(logger, RunLogger) and histograms:
            logger.log_histograms(histograms, step)


class JsonlLogger(RunLogger):
    """Appends {"step": ..., "time": ..., name: value, ...} lines to a file, each written out at once.

    A resumed run does the steps since its checkpoint again, and logs them again: of two rows with the same step and
    names, the later counts.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self._waiting: list[str] = []  # lines that the disk had no room for

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        row = {"step": step, "time": round(time.time(), 3), **metrics}
        self._waiting.append(json.dumps(row) + "\n")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _append(self.path, "".join(self._waiting).encode())
            self._waiting.clear()
        except OSError as error:
            if len(self._waiting) == 1:
                log.warning("%s cannot be written (%s): its rows wait until it can", self.path, error.strerror)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration stands in the run's config.yaml."""


def _append(path: Path, content: bytes) -> None:
    """Append whole lines to a file, all or nothing, after whatever line a kill has cut off. Raises OSError."""
    with open(path, "ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            content = content if file.read(1) == b"\n" else b"\n" + content
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(end)
            raise
