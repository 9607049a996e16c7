"""Curves and lines of training: each task's means over the last steps."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from torchmetrics import MeanMetric, SumMetric

from datamodules.records import ContrastiveBatch, UserError

log = logging.getLogger(__name__)


class TrainingLog(L.Callback):
    """Logs, every n steps, the means since the last time of what training_step returned, for each task by itself, and
    the number of its batches.

    Tasks take turns, so the values of one step alone would show one task, or with an unlucky n always the same.

    plain: also print a line, for logs in which a progress bar is of no use.
    """

    def __init__(self, every_n_steps: int, plain: bool):
        self.every_n_steps, self.plain = every_n_steps, plain
        self.losses: dict[str, float] = {}  # of each task, at the last log
        self._clear()

    def _clear(self) -> None:
        self.means: dict[str, dict[str, MeanMetric]] = defaultdict(dict)  # task -> name -> mean over batches and ranks
        self.tokens, self.seconds = SumMetric(), 0.0  # of training steps alone

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._clear()
        self.logged_at = trainer.global_step

    def on_train_batch_start(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: ContrastiveBatch, batch_idx: int
    ) -> None:
        means = self.means[batch.task]
        for name, value in outputs.items():
            if name not in means:
                means[name] = MeanMetric(nan_strategy="disable").to(value.device)  # a loss that is no number shows
            means[name].update(value.detach())
        self.tokens.to(outputs["loss"].device).update(batch.num_tokens)
        step = trainer.global_step
        due = step > self.logged_at and (step % self.every_n_steps == 0 or step == trainer.max_steps)
        if due:
            float(outputs["loss"])  # waits for the GPU, so that the time is that of the steps
        self.seconds += time.perf_counter() - self.started
        if due:
            self.logged_at = step
            self._log(trainer, batch, step)
            self._clear()

    def _log(self, trainer: L.Trainer, batch: ContrastiveBatch, step: int) -> None:
        tasks = sorted(self.means)  # the same on every rank, as are the names
        # Lightning counts loss for accumulation: it is divided there, and multiplied here again.
        scale = {"loss": trainer.accumulate_grad_batches}
        values: dict[str, Any] = {
            f"train/{task}/{name}": scale.get(name, 1) * float(self.means[task][name].compute())
            for task in tasks
            for name in sorted(self.means[task])
        }
        values |= {f"train/{task}/batches": self.means[task]["loss"].update_count for task in tasks}
        values["train/lr"] = trainer.optimizers[0].param_groups[-1]["lr"]
        values["train/tokens_per_second"] = float(self.tokens.compute()) / self.seconds
        values["train/batch"] = batch.fingerprint
        for task in tasks:
            if not math.isfinite(values[f"train/{task}/loss"]):
                raise UserError(
                    f"the loss of {task} is not finite at step {step}: try a lower optim.lr, a longer optim.warmup or "
                    "trainer.gradient_clip_val (the last checkpoint before may still be good)"
                )
        self.losses = {task: values[f"train/{task}/loss"] for task in tasks}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        if self.plain and trainer.is_global_zero:
            losses = "  ".join(f"{task} {loss:.3f}" for task, loss in self.losses.items())
            rate = values["train/tokens_per_second"]
            log.info(
                "step %d/%d  loss: %s  lr %.1e  %.0f tokens/s",
                step,
                trainer.max_steps,
                losses,
                values["train/lr"],
                rate,
            )


class TrainingBar(RichProgressBar):
    """A progress bar with every task's last loss, for terminals."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"  # one epoch is the whole training

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, str]:
        logs = (callback for callback in trainer.callbacks if isinstance(callback, TrainingLog))
        return {task: f"{loss:.3f}" for log in logs for task, loss in log.losses.items()}
