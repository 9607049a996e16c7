"""Training logs: metrics of each task, a progress bar, and the load of each rank."""

from __future__ import annotations

import logging
import math
import os
import platform
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import RichProgressBar
from torchmetrics import MeanMetric, SumMetric

from datamodules.records import ContrastiveBatch, UserError
from lightning_modules.distributed.collectives import rank, world_size

log = logging.getLogger(__name__)
GIB = 1 << 30


class TrainingLog(L.Callback):
    """Logs every n optimizer steps, for each task: means of the outputs of training_step, and the number of batches.

    Each batch has one task, so the values of a single step would not show all tasks.

    plain: whether to also log a line of text, for output without a progress bar.
    """

    def __init__(self, every_n_steps: int, plain: bool):
        self.every_n_steps, self.plain = every_n_steps, plain
        self.losses: dict[str, float] = {}  # last logged loss of each task
        self._clear()

    def _clear(self) -> None:
        self.means: dict[str, dict[str, MeanMetric]] = defaultdict(dict)  # task -> name -> mean over batches and ranks
        self.tokens, self.seconds = SumMetric(), 0.0  # of training steps only

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
                means[name] = MeanMetric(nan_strategy="disable").to(value.device)  # show a loss that is NaN
            means[name].update(value.detach())
        self.tokens.to(outputs["loss"].device).update(batch.num_tokens)
        step = trainer.global_step
        due = step > self.logged_at and (step % self.every_n_steps == 0 or step == trainer.max_steps)
        if due:
            float(outputs["loss"])  # wait for the GPU, so that its time is counted
        self.seconds += time.perf_counter() - self.started
        if due:
            self.logged_at = step
            self._log(trainer, batch, step)
            self._clear()

    def _log(self, trainer: L.Trainer, batch: ContrastiveBatch, step: int) -> None:
        values = self._values(trainer, batch)
        tasks = sorted(self.means)
        for task in tasks:
            if not math.isfinite(values[f"train/{task}/loss"]):
                raise UserError(
                    f"the loss of {task} is not finite at step {step}: try a lower learning rate, a longer warm-up or "
                    "gradient clipping (the last checkpoint before this step may still be good)"
                )
        self.losses = {task: values[f"train/{task}/loss"] for task in tasks}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        if self.plain and trainer.is_global_zero:
            losses = "  ".join(f"{task} {loss:.3f}" for task, loss in self.losses.items())
            numbers = (step, trainer.max_steps, losses, values["train/lr"], values["train/tokens_per_second"])
            log.info("step %d/%d  loss: %s  lr %.1e  %.0f tokens/s", *numbers)

    def _values(self, trainer: L.Trainer, batch: ContrastiveBatch) -> dict[str, Any]:
        """Return the values to log, computed in the same order on every rank."""
        tasks = sorted(self.means)
        # Undo Lightning's division of the loss by the number of accumulated batches.
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
        return values


class TrainingBar(RichProgressBar):
    """A progress bar with the last logged loss of each task."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"  # instead of the epoch: there is only one

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, str]:
        logs = (callback for callback in trainer.callbacks if isinstance(callback, TrainingLog))
        return {task: f"{loss:.3f}" for log in logs for task, loss in log.losses.items()}


@dataclass
class RankLoad:
    """Size of the first batch of a rank, and its memory after that batch."""

    name: str
    num_queries: int
    num_documents: int
    memory: str


class RankReport(L.Callback):
    """Logs the load of each rank after the first batch, and the number of negatives per query.

    Raises UserError at the start of training if ranks have different precisions, as they may on different hardware.
    """

    def __init__(self) -> None:
        self.printed = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        precisions = [str(trainer.precision)] * world_size()
        if world_size() > 1:
            dist.all_gather_object(precisions, str(trainer.precision))
        if len(set(precisions)) > 1:
            by_rank = ", ".join(f"rank {i} {precision}" for i, precision in enumerate(precisions))
            raise UserError(f"precision: must be the same on all ranks, got {by_rank}; set fp32 or bf16")

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: ContrastiveBatch, batch_idx: int
    ) -> None:
        if self.printed:
            return
        self.printed = True
        name = f"rank {rank()} ({module.device} on {platform.node()})"
        load = RankLoad(name, len(batch.queries), len(batch.documents), memory(module.device))
        loads = [load] * world_size()
        if world_size() > 1:
            dist.all_gather_object(loads, load)
        for load in loads:
            log.info("%s: %d queries, %d documents, %s", load.name, load.num_queries, load.num_documents, load.memory)
        negatives = sum(load.num_documents for load in loads) - 1
        ranks = f"{len(loads)} rank{'s' if len(loads) > 1 else ''}"
        log.info("in this batch (%s) a query has up to %d negatives, from %s", batch.task, negatives, ranks)


def memory(device: torch.device) -> str:
    """Describe the peak memory of this process so far, and the memory of the device."""
    if device.type == "cuda":
        used, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        return f"{used / GIB:.1f} of {total / GIB:.1f} GiB of the GPU"
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{used / GIB:.1f} of {total / GIB:.1f} GiB"
