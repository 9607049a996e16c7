"""The logger of metrics.jsonl, and the interface of loggers that accept more than metrics."""

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
    """A logger of metrics that may also accept tables, pictures, histograms and models. By default they are ignored."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None: ...

    def log_picture(self, name: str, path: Path, step: int) -> None:
        """Log a picture. path: SVG or PNG file."""

    def log_histograms(self, histograms: Mapping[str, tuple[np.ndarray, np.ndarray]], step: int) -> None:
        """Log histograms: name -> counts (n,) and edges (n + 1,)."""

    def log_model(self, files: Sequence[Path]) -> None: ...

    def preempted(self) -> None:
        """Record that the run ends now and will be resumed later."""

    def close(self) -> None:
        """Record that the run is complete."""


def log_picture(loggers: Iterable[Logger], name: str, path: Path, step: int) -> None:
    """Pass an SVG or PNG file to the loggers that accept pictures."""
    for logger in loggers:
        if isinstance(logger, RunLogger):
            logger.log_picture(name, path, step)


def log_histograms(
    loggers: Iterable[Logger], histograms: Mapping[str, tuple[np.ndarray, np.ndarray]], step: int
) -> None:
    """Pass histograms (name -> counts (n,) and edges (n + 1,)) to the loggers that accept them."""
    for logger in loggers:
        if isinstance(logger, RunLogger) and histograms:
            logger.log_histograms(histograms, step)


class JsonlLogger(RunLogger):
    """Appends rows {"step": ..., "time": ..., name: value, ...} to a JSON lines file, without buffering.

    A resumed run repeats the steps since its last checkpoint and logs them again. If two rows have the same step and
    names, the later one counts.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self._unwritten: list[str] = []  # rows that could not be written yet

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        row = {"step": step, "time": round(time.time(), 3), **metrics}
        self._unwritten.append(json.dumps(row) + "\n")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _append(self.path, "".join(self._unwritten).encode())
            self._unwritten.clear()
        except OSError as error:
            if len(self._unwritten) == 1:
                log.warning(
                    "%s: cannot be written (%s); keeping rows in memory until it can", self.path, error.strerror
                )

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log nothing: the configuration is in the run's config.yaml."""


def _append(path: Path, content: bytes) -> None:
    """Append whole lines to a file, after ending a line that a kill has cut off. On OSError, append nothing."""
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
