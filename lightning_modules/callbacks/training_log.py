"""Training logs: metrics of each task, a progress bar, and the load of each rank."""

from __future__ import annotations

import dataclasses
import logging
import math
import platform
import time
from collections import Counter, defaultdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor

from datamodules.packed import ContrastiveBatch
from datamodules.records import UserError
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.distributed.collectives import gather_objects, mean_over_ranks, rank
from lightning_modules.loggers import RunLogger
from lightning_modules.memory import Memory
from lightning_modules.throughput import ThroughputMeter, computing_dtype, encoder_ceiling, pads_attention

log = logging.getLogger(__name__)
GIB = 1 << 30


class TrainingLog(L.Callback):
    """Logs the means of training_step's outputs and the number of batches, for each task, every n optimizer steps.

    Each batch has one task, so the values of a single step would not cover all tasks.

    plain: whether to also log a line of text, for output without a progress bar.
    peak_tflops: peak speed of a device, in TFLOP/s, for the utilisation; 0 measures a matrix product.
    """

    def __init__(self, every_n_steps: int, plain: bool, peak_tflops: float = 0.0):
        self.every_n_steps, self.plain, self.peak_tflops = every_n_steps, plain, peak_tflops
        self.latest: dict[str, str] = {}  # values for the progress bar: last losses, and speed
        # For each task: sums of each output over the batches since the last row, and the number of these batches.
        self.sums: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self.num_batches: Counter[str] = Counter()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last row, so that a resumed run logs the same rows as an uninterrupted run."""
        return {"sums": self._totals(), "num_batches": dict(self.num_batches)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_batches.update(state["num_batches"])
        for task, sums in state["sums"].items():
            self.sums[task] = {name: torch.tensor(total) for name, total in sums.items()}

    def on_train_start(self, trainer: L.Trainer, module: ContrastiveModule) -> None:
        for sums in self.sums.values():
            sums |= {name: total.to(module.device) for name, total in sums.items()}
        self.logged_at = trainer.global_step
        dtype = computing_dtype(str(trainer.precision))
        ceiling = 1e12 * self.peak_tflops or encoder_ceiling(module.encoder, dtype)
        origin = "given" if self.peak_tflops else f"a large matrix product in {str(dtype).removeprefix('torch.')}"
        log.info("MFU is relative to %s GFLOP/s per device (%s)", f"{ceiling / 1e9:,.0f}", origin)
        self.meter = ThroughputMeter(module.encoder, ceiling, pads_attention(module.encoder, dtype))
        self.waited = self._waited(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.rewind(trainer.global_step)

    @staticmethod
    def _waited(trainer: L.Trainer) -> float:
        """Return the seconds that training has waited for batches so far, or 0 if the loader does not count them."""
        return getattr(trainer.train_dataloader, "waited", 0.0)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.started = getattr(trainer.train_dataloader, "asked_at", time.perf_counter())

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: ContrastiveBatch, batch_idx: int
    ) -> None:
        sums = self.sums[batch.task]
        for name, value in outputs.items():
            sums[name] = sums.get(name, 0) + value.detach().float()
        self.num_batches[batch.task] += 1
        step = trainer.global_step
        due = step > self.logged_at and (step % self.every_n_steps == 0 or step == trainer.max_steps)
        if due:
            float(outputs["loss"])  # wait for the GPU, so that its time is counted
        waited = self._waited(trainer)
        self.meter.add(batch, time.perf_counter() - self.started, waited - self.waited)
        self.waited = waited
        if due:
            self.logged_at = step
            self._log(trainer, batch, step)
            self.sums.clear()
            self.num_batches.clear()

    def _log(self, trainer: L.Trainer, batch: ContrastiveBatch, step: int) -> None:
        values, speed = self._values(trainer, batch), self.meter.read()
        values |= {f"train/{name}": value for name, value in dataclasses.asdict(speed).items()}
        tasks = sorted(self.num_batches)
        for task in tasks:
            if not math.isfinite(values[f"train/{task}/loss"]):
                raise UserError(
                    f"the loss of {task} is not finite at step {step}; try a lower learning rate, a longer warm-up or "
                    "gradient clipping (the last checkpoint before this step may still be good)"
                )
        losses = {task: f"{values[f'train/{task}/loss']:.3f}" for task in tasks}
        self.latest = losses | {"tokens/s": f"{speed.tokens_per_second:,.0f}", "MFU": f"{speed.mfu:.0%}"}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        if self.plain and trainer.is_global_zero:
            parts = "  ".join(f"{task} {loss}" for task, loss in losses.items())
            numbers = (step, trainer.max_steps, parts, values["train/lr"], speed.text())
            log.info("step %d/%d  loss: %s  lr %.1e  %s", *numbers)

    def _totals(self) -> dict[str, dict[str, float]]:
        """Return the sums, averaged over ranks."""
        names = [(task, name) for task in sorted(self.sums) for name in sorted(self.sums[task])]
        if not names:
            return {}
        sums = mean_over_ranks(torch.stack([self.sums[task][name] for task, name in names]))
        totals: dict[str, dict[str, float]] = defaultdict(dict)
        for (task, name), total in zip(names, sums.tolist(), strict=True):
            totals[task][name] = total
        return dict(totals)

    def _values(self, trainer: L.Trainer, batch: ContrastiveBatch) -> dict[str, Any]:
        """Return the values to log."""
        # Undo Lightning's division of the loss by the number of accumulated batches.
        scale = {"loss": trainer.accumulate_grad_batches}
        values: dict[str, Any] = {
            f"train/{task}/{name}": scale.get(name, 1) * total / self.num_batches[task]
            for task, totals in self._totals().items()
            for name, total in totals.items()
        }
        values |= {f"train/{task}/batches": self.num_batches[task] for task in sorted(self.num_batches)}
        options: Any = trainer.lightning_module.optim
        scheduler: Any = trainer.lr_scheduler_configs[0].scheduler
        values["train/lr"] = options.lr * scheduler.lr_lambdas[0](scheduler.last_epoch)
        values |= {f"train/lr/{part}": values["train/lr"] * factor for part, factor in options.lr_scale.items()}
        values["train/batch"] = batch.fingerprint
        return values


class TrainingBar(RichProgressBar):
    """A progress bar with the last logged loss of each task, and the speed."""

    @property
    def total_train_batches(self) -> int:
        """Number of batches in the run. Lightning's is too low in resumed runs: it counts the remaining steps."""
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"  # instead of the epoch, because there is only one

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, str]:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        latest = (callback.latest for callback in callbacks if isinstance(callback, TrainingLog))
        return {name: text for values in latest for name, text in values.items()}


class RankReport(L.Callback):
    """Logs the size of each rank's first batch, and its memory after that batch.

    Raises UserError at the start of training if ranks have different precisions, as they may on different hardware.
    """

    def __init__(self) -> None:
        self.is_logged = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        precisions = gather_objects(str(trainer.precision))
        if len(set(precisions)) > 1:
            by_rank = ", ".join(f"rank {i} {precision}" for i, precision in enumerate(precisions))
            raise UserError(f"precision: must be the same on all ranks, got {by_rank}; set fp32 or bf16")

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: ContrastiveBatch, batch_idx: int
    ) -> None:
        if self.is_logged:
            return
        self.is_logged = True
        load = f"{len(batch.queries)} queries, {len(batch.documents)} documents, {describe_memory(module.device)}"
        for line in gather_objects(f"rank {rank()} ({module.device} on {platform.node()}): {load}"):
            log.info("%s", line)


def describe_memory(device: torch.device) -> str:
    """Describe the peak memory of this process so far, and the memory of the device."""
    memory = Memory(device)
    return f"{memory.peak() / GIB:.1f} of {memory.total() / GIB:.1f} GiB" + (" of the GPU" if memory.on_gpu else "")
