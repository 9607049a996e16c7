"""Loggers of a run: metrics.jsonl, Lightning's loggers, and Weights & Biases."""

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
from experiments.run.wandb_environment import check_environment, wandb_mode
from experiments.run.wandb_sender import is_sent
from lightning_modules.distributed.signals import PREEMPTED
from lightning_modules.loggers import JsonlLogger, LightningLogger, RunLogger

log = logging.getLogger(__name__)

STEP = "trainer/global_step"  # the x-axis of every curve, as in Lightning's own logger


def build_loggers(config: Config, folder: Path) -> list[RunLogger]:
    """Return the loggers of a run. W&B is left out if it is disabled or not installed."""
    loggers: list[RunLogger] = [JsonlLogger(folder / "metrics.jsonl")]
    loggers += [LightningLogger(name, folder) for name in config.loggers]
    mode = wandb_mode(config.wandb.mode)
    if mode == "disabled":
        return loggers
    try:
        import wandb  # noqa: F401
    except ImportError:
        log.warning("wandb is not installed (pip install wandb): metrics only go to metrics.jsonl")
        return loggers
    check_environment()
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


def _harmless(method: Callable) -> Callable:
    """Run a method on the first rank only. If it fails, disable the W&B logger and let the run continue."""

    @functools.wraps(method)
    def call(self: WandbLogger, *args: Any, **kwargs: Any) -> None:
        if rank_zero_only.rank > 0 or self.has_failed:
            return
        try:
            method(self, *args, **kwargs)
        except (Exception, SystemExit) as error:  # W&B runs in a process of its own, which can fail in any way
            self.has_failed = True
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("W&B failed (%s): from now on, metrics only go to metrics.jsonl", reason)

    return call


class WandbLogger(RunLogger):
    """Log a run to a W&B file in wandb/ of the run's folder. The file is created with the first logged value.

    The file is written offline, so that no server can slow down training. Each attempt of a run has its own file,
    but all attempts have the same id.

    arguments: arguments of wandb.init.
    online: whether to start a process that sends the file (wandb_sender.py).
    patience: maximum number of seconds to wait for this process at the end of the run.
    """

    def __init__(self, folder: Path, arguments: Mapping[str, Any], online: bool, patience: float):
        super().__init__()
        self.folder, self.arguments, self.online, self.patience = folder, dict(arguments), online, patience
        self.has_failed = False
        self._run: Any = None
        self._sender: subprocess.Popen | None = None

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def run(self) -> Any:
        if self._run is None:
            self._run = self._start()
        return self._run

    def _start(self) -> Any:
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        if self.online:
            # Registered before W&B's own exit function, so that it runs after it.
            atexit.register(self._wait_for_sender)
        settings = wandb.Settings(x_transaction_log_flush_interval=5)
        arguments = self.arguments | {"dir": self.folder, "id": self._run_id(), "resume": "allow"}
        run = wandb.init(mode="offline", settings=settings, **arguments)
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        if self.online:
            self._sender = subprocess.Popen(
                [sys.executable, "-m", "experiments.run.wandb_sender", run.settings.sync_file],
                stdin=subprocess.DEVNULL,
                cwd=Path(__file__).parents[2],
            )
        return run

    def _run_id(self) -> str:
        """Return the run's id, which is stored in its folder. A trial gets its id from W&B's agent."""
        path = self.folder / "wandb_id"
        recorded = path.read_text().strip() if path.exists() else ""  # "" if the disk was full
        run_id = os.environ.get("WANDB_RUN_ID") or recorded or secrets.token_hex(4)
        path.write_text(run_id)
        return run_id

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
            html = path.read_text(encoding="utf-8")
        else:
            html = f'<img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        self.run.log({name: wandb.Html(html, inject=False), STEP: step})

    @_harmless
    def log_histograms(self, histograms: Mapping[str, tuple[np.ndarray, np.ndarray]], step: int) -> None:
        import wandb

        self.log_metrics({name: wandb.Histogram(np_histogram=each) for name, each in histograms.items()}, step)

    @_harmless
    def log_model(self, files: Sequence[Path]) -> None:
        """Log files as an artifact. They are not copied, so they must still exist when the artifact is sent."""
        import wandb

        artifact = wandb.Artifact(f"model-{self._run_id()}", type="model")
        for path in files:
            artifact.add_file(str(path), policy="immutable", skip_cache=True)
        self.run.log_artifact(artifact)

    @_harmless
    def preempted(self) -> None:
        """Mark the run as preempted, so that W&B gives the trial to the next agent with the same id and parameters."""
        self.run.mark_preempting()
        self._finish(PREEMPTED)

    @_harmless
    def close(self) -> None:
        self._finish(0)

    def _finish(self, status: int) -> None:
        import wandb

        self.run.finish(exit_code=status)
        wandb.teardown()  # after this, everything is on disk
        self._wait_for_sender()

    def _wait_for_sender(self) -> None:
        """Wait until everything is sent, at most `patience` seconds."""
        if self._sender is None:
            return
        sender, self._sender = self._sender, None
        try:
            sender.wait(self.patience)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            sender.terminate()
            sender.wait()
        if self._run is not None and not is_sent(Path(self._run.settings.sync_file)):
            log.warning("W&B did not receive the whole run; make sync folder=%s sends the rest", self.folder)
