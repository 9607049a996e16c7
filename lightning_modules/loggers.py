"""The logger of metrics.jsonl, Lightning's own loggers, and the interface of loggers that accept more than metrics."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from datamodules.files import append_lines, atomic_file, json_object

log = logging.getLogger(__name__)


class RunLogger(Logger):
    """A logger of metrics that may also accept tables, pictures, histograms and models. By default, it ignores them."""

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log nothing: the configuration is in the run's config.yaml."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None: ...

    def log_picture(self, name: str, path: Path, step: int) -> None:
        """Log a picture. path: SVG or PNG file."""

    def log_histograms(self, histograms: Mapping[str, tuple[np.ndarray, np.ndarray]], step: int) -> None:
        """Log histograms: name -> counts (n,) and edges (n + 1,)."""

    def log_model(self, files: Sequence[Path]) -> None: ...

    def rewind(self, step: int) -> None:
        """Forget the rows after an optimizer step, because training resumes there and will log them again."""

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
            return  # the resumed run measured this again with the same weights
        self._unwritten.append(json.dumps(row) + "\n")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_lines(self.path, "".join(self._unwritten))
            self._unwritten.clear()
        except OSError as error:
            if len(self._unwritten) == 1:
                log.warning(
                    "%s: cannot be written (%s); keeping rows in memory until it can", self.path, error.strerror
                )


class _TensorBoardLogger(TensorBoardLogger):
    @property
    def log_dir(self) -> str:
        return self.root_dir  # Lightning expands $NAME in it


def tensorboard_logger(folder: Path, step: int) -> Logger:
    """Return Lightning's logger that writes into folder/tensorboard. TensorBoard hides older values after the step."""
    return _TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False, purge_step=step + 1)


def csv_logger(folder: Path, step: int) -> Logger:
    """Return Lightning's logger that writes folder/csv/version_N/metrics.csv, with a new N at each start of the run."""
    return CSVLogger(folder, name="csv", flush_logs_every_n_steps=1)


LIGHTNING_LOGGERS: dict[str, Callable[[Path, int], Logger]] = {"tensorboard": tensorboard_logger, "csv": csv_logger}


class LightningLogger(RunLogger):
    """Passes the numbers of each row to one of Lightning's loggers. If that fails, the run continues without it.

    name: key of LIGHTNING_LOGGERS. folder: folder of the run.
    """

    def __init__(self, name: str, folder: Path):
        super().__init__()
        self._name, self.folder = name, folder
        self._step = 0  # where this start of the run begins
        self._logger: Logger | None = None
        self._has_failed = False

    @property
    def name(self) -> str:
        return self._name

    def rewind(self, step: int) -> None:
        self._step = step

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        if self._has_failed or not numbers:
            return
        try:
            if self._logger is None:  # before the first row, only `rewind` knows where the run starts
                folder = self.folder.absolute()  # absolute, so that a ~ in the path is not expanded
                self._logger = LIGHTNING_LOGGERS[self._name](folder, self._step)
            self._logger.log_metrics(numbers, step=step)
            self._logger.save()
        except Exception as error:  # for instance, the disk is full
            self._has_failed = True
            log.warning("%s: cannot be written (%s); from now on, metrics are not logged there", self._name, error)

    @rank_zero_only
    def close(self) -> None:
        if self._logger is not None and not self._has_failed:
            self._logger.finalize("success")

    def preempted(self) -> None:
        self.close()


def _row(line: bytes) -> dict[str, Any] | None:
    """Return a row of the file, or None for a damaged one."""
    row = json_object(line)
    return row if row is not None and isinstance(row.get("step"), int) else None
