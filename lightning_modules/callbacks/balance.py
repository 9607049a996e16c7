"""Combines the gradients of an optimizer step's tasks, which the trainer accumulates otherwise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from datamodules.records import ContrastiveBatch
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.distributed.collectives import world_size
from lightning_modules.task_balance import TaskGradients, gradnorm_weights, pcgrad_coefficients


class GradientBalance(L.Callback):
    """For optimizer steps that have a batch of every task. A subclass says with which coefficients (balance.py).

    Holds one gradient for each task; their sum is clipped and stepped with as ever. On several ranks it averages the
    gradients itself, by task, in place of DDP. tasks: of the run.
    """

    def __init__(self, tasks: Sequence[str]):
        self.tasks = tuple(tasks)

    def on_train_start(self, trainer: L.Trainer, module: ContrastiveModule) -> None:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.gradients = TaskGradients(trained, self.tasks)
        self.losses: dict[str, Tensor | float] = defaultdict(float)
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.require_backward_grad_sync = False

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: ContrastiveBatch, batch_idx: int) -> None:
        self.task = batch.task

    def on_before_backward(self, trainer: L.Trainer, module: Any, loss: Tensor) -> None:
        self.losses[self.task] += loss.detach()

    def on_after_backward(self, *_: Any) -> None:
        self.gradients.take(self.task)

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        losses = torch.stack([torch.as_tensor(self.losses[task]) for task in self.tasks])
        if world_size() > 1:
            dist.all_reduce(losses)
        self.gradients.average_over_ranks()
        self.gradients.put(*self.coefficients(trainer, losses.double().cpu() / world_size()))
        self.gradients.clear()
        self.losses.clear()

    def coefficients(self, trainer: L.Trainer, losses: Tensor) -> tuple[Tensor, Tensor]:
        """(T,) coefficients of the tasks' gradients, of shared parameters and of the others. losses: (T,)."""
        raise NotImplementedError


class PCGrad(GradientBalance):
    """Projects conflicting gradients of shared parameters."""

    def coefficients(self, trainer: L.Trainer, losses: Tensor) -> tuple[Tensor, Tensor]:
        return pcgrad_coefficients(self.gradients.products(), trainer.global_step), torch.ones_like(losses)


class GradNorm(GradientBalance):
    """Weights the tasks. alpha: how strongly tasks that are behind are favoured. lr: of the weights.

    every_n_steps: the weights are logged.
    """

    def __init__(self, tasks: Sequence[str], alpha: float = 1.5, lr: float = 0.025, every_n_steps: int = 20):
        super().__init__(tasks)
        self.alpha, self.lr, self.every_n_steps = alpha, lr, every_n_steps
        self.weights: Tensor | None = None  # (T,)
        self.first_losses: Tensor | None = None  # (T,)

    def coefficients(self, trainer: L.Trainer, losses: Tensor) -> tuple[Tensor, Tensor]:
        if self.weights is None:
            self.weights, self.first_losses = torch.ones_like(losses), losses
        used, step = self.weights, trainer.global_step + 1
        norms = self.gradients.products().diagonal().double().cpu().sqrt()
        self.weights = gradnorm_weights(used, norms, losses, self.first_losses, self.alpha, self.lr)
        if step % self.every_n_steps == 0:
            values = {f"train/{task}/weight": w for task, w in zip(self.tasks, used.tolist(), strict=True)}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)
        return used, used

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.weights is None else {"weights": self.weights, "first_losses": self.first_losses}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.weights, self.first_losses = state["weights"], state["first_losses"]
