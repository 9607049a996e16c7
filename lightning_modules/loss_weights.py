"""Weight the losses of tasks that train one encoder.

    uncertainty   a learned weight for the loss of each task (Kendall et al., arXiv 1705.07115, section 3.2)
    dwa           dynamic weight average: larger weights where losses fall slowly (Liu et al., arXiv 1803.10704)

Shapes: T tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from datamodules.packed import ContrastiveBatch
from lightning_modules.distributed.collectives import mean_over_ranks
from lightning_modules.parts import check_task_names

log = logging.getLogger(__name__)


def loss_scaler(trainer: L.Trainer | None) -> torch.amp.GradScaler | None:
    """Return the loss scaler of fp16 training; None in any other precision, or without a trainer."""
    return None if trainer is None else getattr(trainer.precision_plugin, "scaler", None)


class UncertaintyWeights(nn.Module):
    """Turns the loss L of a task into exp(-s) L + s / 2, where s is a learned log-variance, 0 at the start."""

    def __init__(self, tasks: Sequence[str]):
        super().__init__()
        check_task_names("balance=uncertainty", tasks)
        self.log_variance = nn.ParameterDict({task: nn.Parameter(torch.zeros(())) for task in tasks})

    def forward(self, loss: Tensor, task: str) -> tuple[Tensor, Tensor]:
        """Return the loss to minimise, and the weight exp(-s) to log."""
        log_variance = self.log_variance[task]
        weight = torch.exp(-log_variance)
        return weight * loss + log_variance / 2, weight.detach()


class LossRecorder(L.Callback):
    """Sums the losses of each task over the batches of an optimizer step. tasks: names of the tasks in training."""

    def __init__(self, tasks: Sequence[str]):
        self.tasks = tuple(tasks)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.losses = torch.zeros(len(self.tasks), dtype=torch.float64, device=module.device)

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: ContrastiveBatch, batch_idx: int) -> None:
        self.task = batch.task

    def on_before_backward(self, trainer: L.Trainer, module: Any, loss: Tensor) -> None:
        if scaler := loss_scaler(trainer):
            loss = loss / scaler.scale(torch.ones_like(loss))  # Lightning has scaled it already
        self.losses[self.tasks.index(self.task)] += loss.detach()

    def take_losses(self) -> Tensor:
        """Return the sums of this step, averaged over ranks, (T,), and reset them to 0."""
        losses = self.losses.clone()
        self.losses.zero_()
        return mean_over_ranks(losses)

    def log_weights(self, trainer: L.Trainer, weights: Tensor, every_n_steps: int) -> None:
        """Log the weights of an optimizer step, (T,), if its number is a multiple of every_n_steps."""
        step = trainer.global_step + 1
        if step % every_n_steps == 0:
            values = {f"train/{task}/weight": w for task, w in zip(self.tasks, weights.tolist(), strict=True)}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)


def loss_ratios(losses: Tensor, before: Tensor) -> Tensor:
    """Return losses / before, (T,); 1 for a loss that was 0, as without negatives: its change says nothing."""
    return torch.where(before > 0, losses / before, 1.0)


def dwa_weights(losses: Tensor, previous: Tensor, temperature: float) -> Tensor:
    """Return T softmax(r / temperature), where r is losses / previous: the weights of the tasks, (T,).

    losses, previous: mean losses of the tasks in the last two windows, (T,).
    """
    rates = loss_ratios(losses, previous)
    return len(rates) * torch.softmax(rates / temperature, dim=0)


class DynamicWeights(LossRecorder):
    """Weights the loss of each task by how slowly it falls from one window of batches to the next.

    The paper compares mean losses of epochs. Here tasks take turns, some more often than others, and a run may be
    shorter than an epoch, so a window ends when each task has had `window` batches. All weights are 1 in the
    first two windows.

    temperature: higher values bring the weights closer together.
    window: minimum number of batches of each task in a window.
    every_n_steps: number of optimizer steps between logs of the weights.
    """

    def __init__(self, tasks: Sequence[str], temperature: float = 2.0, window: int = 50, every_n_steps: int = 20):
        super().__init__(tasks)
        self.temperature, self.window, self.every_n_steps = temperature, window, every_n_steps
        self.weights = torch.ones(len(self.tasks), dtype=torch.float64)  # (T,)
        self.sums = torch.zeros_like(self.weights)  # losses in this window
        self.previous: Tensor | None = None  # mean losses of the window before, (T,)
        self.num_batches = [0] * len(self.tasks)  # in this window

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        batches = trainer.max_steps * trainer.accumulate_grad_batches / len(self.tasks)
        if 0 < batches <= 2 * self.window:
            log.warning(
                "dwa_window: weights stay 1 until each task has had two windows of %d batches, but this training has "
                "%d batches per task; lower dwa_window",
                self.window,
                batches,
            )
        self.weights, self.sums = self.weights.to(module.device), self.sums.to(module.device)
        self.previous = None if self.previous is None else self.previous.to(module.device)

    def on_before_backward(self, trainer: L.Trainer, module: Any, loss: Tensor) -> None:
        super().on_before_backward(trainer, module, loss)
        row = self.tasks.index(self.task)
        self.num_batches[row] += 1
        weight = self.weights[row].to(loss.dtype)
        loss.register_hook(lambda gradient: weight * gradient)  # the loss itself is logged without the weight

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        self.log_weights(trainer, self.weights, self.every_n_steps)
        self.sums += self.take_losses()
        if min(self.num_batches) < self.window:
            return
        losses = self.sums / self.sums.new_tensor(self.num_batches)
        if self.previous is not None:
            self.weights = dwa_weights(losses, self.previous, self.temperature)
        self.previous, self.sums, self.num_batches = losses, torch.zeros_like(losses), [0] * len(self.tasks)

    def state_dict(self) -> dict[str, Any]:
        tensors = {"weights": self.weights, "sums": self.sums, "previous": self.previous}
        return {"num_batches": self.num_batches} | {
            name: tensor.cpu() for name, tensor in tensors.items() if tensor is not None
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights, self.sums, self.previous = state["weights"], state["sums"], state.get("previous")
        self.num_batches = state["num_batches"]
