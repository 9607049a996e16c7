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

from datamodules.files import atomic_file

log = logging.getLogger(__name__)


class RunLogger(Logger):
    """A logger of metrics that may also accept tables, pictures, histograms and models. By default they are ignored."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None: ...

    def log_picture(self, name: str, path: Path, step: int) -> None:
        """Log a picture. path: SVG or PNG file."""

    def log_histograms(self, histograms: Mapping[str, tuple[np.ndarray, np.ndarray]], step: int) -> None:
        """Log histograms: name -> counts (n,) and edges (n + 1,)."""

    def log_model(self, files: Sequence[Path]) -> None: ...

    def rewind(self, step: int) -> None:
        """Forget the rows after an optimizer step, because training resumes there and logs them again."""

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

    A resumed run repeats the steps since its last checkpoint and logs them again. `rewind` removes their rows.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self._unwritten: list[str] = []  # rows that could not be written yet
        self._resumed_at: int | None = None
        self._logged_there: set[frozenset[str]] = set()  # names in each row of the step where training resumed

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def rewind(self, step: int) -> None:
        rows = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
        kept = [(row, content) for row in rows if (content := _row(row)) and content["step"] <= step]
        if len(kept) < len(rows):
            with atomic_file(self.path) as file:
                file.write(b"".join(row.rstrip(b"\n") + b"\n" for row, _ in kept))
        self._resumed_at = step
        self._logged_there = {frozenset(content) for _, content in kept if content["step"] == step}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        row = {"step": step, "time": round(time.time(), 3), **metrics}
        if step == self._resumed_at and frozenset(row) in self._logged_there:
            return  # measured again with the same weights
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


def _row(line: bytes) -> dict[str, Any] | None:
    """Return a row of the file, or None for a damaged one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


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
