"""Where a run is told of: metrics.jsonl, and Weights & Biases."""

from __future__ import annotations

import atexit
import base64
import functools
import logging
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from experiments.config.experiment import as_dict
from experiments.config.schema import Config
from experiments.results.final_table import FinalTable
from experiments.run.endings import PREEMPTED
from experiments.run.sender import is_sent
from lightning_modules.loggers import JsonlLogger, RunLogger

log = logging.getLogger(__name__)

STEP = "trainer/global_step"  # the x-axis of every curve, as in Lightning's own logger


def build_loggers(config: Config, folder: Path) -> list[RunLogger]:
    loggers: list[RunLogger] = [JsonlLogger(folder / "metrics.jsonl")]
    mode = os.environ.get("WANDB_MODE", config.wandb.mode)
    if mode == "disabled":
        return loggers
    try:
        import wandb  # noqa: F401
    except ImportError:
        log.warning("wandb is not installed: metrics go to metrics.jsonl alone (pip install wandb)")
        return loggers
    run = config.wandb
    arguments = {
        "project": run.project,
        "entity": run.entity,
        "name": run.name or folder.name,
        "group": run.group or f"{config.experiment}-{config.scale}",
        "tags": run.tags or [config.experiment, config.scale, f"seed{config.run.seed}"],
        "config": as_dict(config),
    }
    return [*loggers, WandbLogger(folder, arguments, mode == "online", run.finish_timeout)]


def log_end(loggers: Sequence[RunLogger], table: FinalTable, step: int, model: Sequence[Path]) -> None:
    """Tell of what a run came to. model: the files that are it."""
    for logger in loggers:
        logger.log_metrics(table.flat(), step=step)
        logger.log_table("results", *table.rows(), step=step)
        if table.config.wandb.checkpoints:
            logger.log_model(model)
        logger.close()


def _harmless(method: Callable) -> Callable:
    """On the first rank alone; what W&B raises ends its log, and not the run."""

    @functools.wraps(method)
    def call(self: WandbLogger, *given: Any, **named: Any) -> None:
        if rank_zero_only.rank > 0 or self.failed:
            return
        try:
            method(self, *given, **named)
        except (Exception, SystemExit) as error:  # a foreign process, which may die of anything
            self.failed = True
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("W&B failed (%s): from here on metrics go to metrics.jsonl alone", why)

    return call


class WandbLogger(RunLogger):
    """A run in W&B's own file, in wandb/ of its folder; started by what is logged first.

    The file is written offline, so that no server can hold the training up. online: another process sends it meanwhile
    (sender.py); patience: seconds that the end of the run waits for it. Every attempt of a run has a file of its own,
    and all have one id.
    """

    def __init__(self, folder: Path, arguments: Mapping[str, Any], online: bool, patience: float):
        super().__init__()
        self.folder, self.arguments, self.online, self.patience = folder, dict(arguments), online, patience
        self.failed = False
        self._run: Any = None
        self._sender: subprocess.Popen | None = None

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return ""

    @property
    def run(self) -> Any:
        if self._run is None:
            self._run = self._start()
        return self._run

    def _start(self) -> Any:
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        if self.online:
            atexit.register(self._wait)  # before W&B registers the end of the run, and so after it
        settings = wandb.Settings(x_transaction_log_flush_interval=5)
        given = self.arguments | {"dir": self.folder, "id": self._identity(), "resume": "allow"}
        run = wandb.init(mode="offline", settings=settings, **given)
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        if self.online:
            self._sender = subprocess.Popen(
                [sys.executable, "-m", "experiments.run.sender", run.settings.sync_file],
                stdin=subprocess.DEVNULL,
                cwd=Path(__file__).parents[2],
            )
        return run

    def _identity(self) -> str:
        """The run's id, kept in its folder; W&B's agent has chosen that of a trial."""
        path = self.folder / "wandb_id"
        if chosen := os.environ.get("WANDB_RUN_ID"):
            path.write_text(chosen)
        elif not path.exists():
            path.write_text(secrets.token_hex(4))
        return path.read_text().strip()

    @_harmless
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.run.log({**metrics, STEP: step})

    @_harmless
    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        import wandb

        self.run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows]), STEP: step})

    @_harmless
    def log_picture(self, name: str, path: Path, step: int) -> None:
        import wandb

        if path.suffix == ".svg":
            shown = path.read_text(encoding="utf-8")
        else:
            shown = f'<img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        self.run.log({name: wandb.Html(shown, inject=False), STEP: step})

    @_harmless
    def log_histograms(self, histograms: Mapping[str, tuple[np.ndarray, np.ndarray]], step: int) -> None:
        import wandb

        self.log_metrics({name: wandb.Histogram(np_histogram=counted) for name, counted in histograms.items()}, step)

    @_harmless
    def log_model(self, files: Sequence[Path]) -> None:
        """Files as an artifact; none is copied, so that they must be there still when it is sent."""
        import wandb

        artifact = wandb.Artifact(f"model-{self._identity()}", type="model")
        for path in files:
            artifact.add_file(str(path), policy="immutable", skip_cache=True)
        self.run.log_artifact(artifact)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration was given at the start, once."""

    @_harmless
    def preempted(self) -> None:
        """A sweep gives the run to its next agent, with its id and parameters."""
        self.run.mark_preempting()
        self._finish(PREEMPTED)

    @_harmless
    def close(self) -> None:
        self._finish(0)

    def _finish(self, status: int) -> None:
        import wandb

        self.run.finish(exit_code=status)
        wandb.teardown()  # only then all is on the disk
        self._wait()

    def _wait(self) -> None:
        """Until all is sent, or patience ends."""
        if self._sender is None:
            return
        sender, self._sender = self._sender, None
        try:
            sender.wait(self.patience)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            sender.terminate()
            sender.wait()
        if self._run is not None and not is_sent(Path(self._run.settings.sync_file)):
            log.warning("W&B was not sent all of the run: make sync folder=%s does it later", self.folder)
