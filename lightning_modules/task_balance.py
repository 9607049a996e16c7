"""Combine the gradients of tasks that pull a shared encoder in different directions.

    gradnorm   weights that give the tasks' gradients similar norms (Chen et al., arXiv 1711.02257, algorithm 1)
    pcgrad     conflicting gradients are projected onto each other's normal plane (Yu et al., arXiv 2001.06782,
               algorithm 1)
    mgda       the shortest convex combination of the gradients (Sener and Koltun, arXiv 1810.04650, algorithm 2)
    upgrad     each gradient is projected onto the directions that no task opposes (Quinton and Rey, arXiv 2406.16232)

Each method combines all tasks' gradients linearly at each optimizer step. The coefficients only depend on the dot
products of the gradients. The last two methods come from the package torchjd.

Shapes: T tasks, P trained parameters (scalars).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from datamodules.records import UserError
from lightning_modules.distributed.collectives import mean_over_ranks
from lightning_modules.loss_weights import LossRecorder, loss_ratios
from lightning_modules.objective_options import check_balance_packages


def pcgrad_coefficients(products: Tensor, seed: int) -> Tensor:
    """Return the coefficients of the tasks' gradients in the sum of the projected gradients, (T,).

    products: dot products of the gradients, (T, T).
    seed: seed for the order of the projections.
    """
    products, num_tasks = products.double(), len(products)
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(num_tasks, generator=generator) for _ in range(num_tasks)])
    orders = orders.to(products.device, non_blocking=True)  # (T, T) row i: order of the projections of gradient i
    rows = torch.arange(num_tasks, device=products.device)
    coefficients = torch.eye(num_tasks, dtype=torch.float64, device=products.device)  # row i: projected gradient i
    for others in orders.unbind(1):  # all gradients at once
        product = (coefficients * products[others]).sum(1)
        step = torch.where((others != rows) & (product < 0), product / products[others, others], 0.0)
        coefficients[rows, others] -= step
    return coefficients.sum(0)


def gradnorm_weights(
    weights: Tensor, norms: Tensor, losses: Tensor, first_losses: Tensor, alpha: float, lr: float
) -> Tensor:
    """Return the weights of the tasks after one step of gradient descent, (T,). They add up to T.

    The target of weight * norm is its mean over tasks, times the relative training rate to the power of alpha. The
    training rate is the loss divided by the first loss; it is relative to its mean over tasks.

    norms: norms of the gradients before weighting, (T,).
    losses, first_losses: losses of this step and of the first step, (T,).
    """
    tiny = torch.finfo(norms.dtype).tiny
    weighted_norms, rates = weights * norms, loss_ratios(losses, first_losses)
    targets = weighted_norms.mean() * (rates / rates.mean().clamp(min=tiny)) ** alpha
    # Dividing by the mean norm makes lr independent of the scale of the model's gradients.
    updated = weights - lr * torch.sign(weighted_norms - targets) * norms / norms.mean().clamp(min=tiny)
    updated = updated.clamp(min=1e-3)
    return updated * (len(updated) / updated.sum())


Weighting = Callable[[Tensor], Tensor]  # from dot products of gradients (T, T) to coefficients (T,)
RIDGE = 1e-8  # lower bound for the eigenvalues of the solvers' input, relative to its trace


def torchjd_weighting(method: str) -> Weighting:
    """Return the weighting of "mgda" or "upgrad". Raises UserError if its packages are not installed."""
    check_balance_packages(method)
    from torchjd.aggregation import MGDAWeighting, UPGradWeighting
    from torchjd.linalg import QuadprogProjector

    if method == "mgda":
        return MGDAWeighting(epsilon=1e-6, max_iters=250)
    return UPGradWeighting(projector=QuadprogProjector(reg_eps=0.0))  # RIDGE is smaller than its default


def balanced_coefficients(products: Tensor, weighting: Weighting) -> Tensor:
    """Return the coefficients of the tasks' gradients in a direction that helps all tasks, (T,), in float64 on the CPU.

    They add up to T if the weighting's add up to 1. All are 1 if the gradients have overflowed or are all 0.

    products: dot products of the gradients, (T, T).
    """
    products = products.double().cpu()  # the solvers run on the CPU
    size = products.diagonal().sum()
    if not 0 < float(size) < float("inf"):
        return torch.ones_like(products[0])
    values, vectors = torch.linalg.eigh(products / size)  # rounding may make the lowest eigenvalue negative
    return len(products) * weighting(vectors * values.clamp(min=RIDGE) @ vectors.T)


@dataclass(frozen=True)
class Coefficients:
    """Coefficients of the tasks' gradients, (T,), for parameters that all tasks share and for all others."""

    shared: Tensor
    other: Tensor


class TaskGradients:
    """The gradients of one optimizer step for each task. parameters: trained parameters."""

    def __init__(self, parameters: Sequence[Tensor], tasks: Sequence[str]):
        self.parameters, self.tasks = list(parameters), tuple(tasks)
        self.sizes, first = [parameter.numel() for parameter in self.parameters], self.parameters[0]
        self.values = torch.zeros(len(self.tasks), sum(self.sizes), dtype=first.dtype, device=first.device)  # (T, P)
        self.used = np.zeros((len(self.tasks), len(self.sizes)), dtype=bool)  # whether a task has a gradient

    def clear(self) -> None:
        self.values.zero_()
        self.used[:] = False

    def add(self, task: str, gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients of a task's loss. They are None for parameters on which the loss does not depend."""
        row = self.tasks.index(task)
        for i, (total, gradient) in enumerate(zip(self.values[row].split(self.sizes), gradients, strict=True)):
            if gradient is not None:
                total += gradient.flatten()
                self.used[row, i] = True

    def take(self, task: str) -> None:
        """Move the gradients that a backward pass left in the parameters to a task."""
        self.add(task, [parameter.grad for parameter in self.parameters])
        for parameter in self.parameters:
            parameter.grad = None

    def average_over_ranks(self) -> None:
        mean_over_ranks(self.values)

    def shared(self) -> np.ndarray:
        """Return whether all tasks have a gradient for a parameter. Raises UserError if they share no parameter."""
        shared = np.asarray(self.used.all(0))
        if not shared.any():
            raise UserError(
                "balance: the tasks share no trained parameter, so there is nothing to balance; set it to none"
            )
        return shared

    def products(self) -> Tensor:
        """Return the dot products of the tasks' gradients with respect to shared parameters, (T, T)."""
        shared = itertools.compress(self.values.split(self.sizes, dim=1), self.shared())
        return reduce(torch.add, (gradients @ gradients.T for gradients in shared))

    def apply(self, coefficients: Coefficients) -> None:
        """Set the gradient of each parameter to a linear combination of the tasks' gradients."""
        shared, gradients = self.shared(), self.values.split(self.sizes, dim=1)
        weights_of_shared, weights_of_others = coefficients.shared.to(self.values), coefficients.other.to(self.values)
        for i, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            if self.used[:, i].any():
                weights = weights_of_shared if shared[i] else weights_of_others
                parameter.grad = (weights @ gradient).view_as(parameter)


class GradientBalance(LossRecorder, ABC):
    """Combines the tasks' gradients in an optimizer step, weighted by coefficients.

    Every optimizer step needs a batch of every task. The callback stores one gradient per task. On several ranks, it
    averages them instead of DDP. The combined gradient is then clipped and applied as usual. Subclasses implement
    `coefficients`.
    """

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.gradients = TaskGradients(trained, self.tasks)
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.require_backward_grad_sync = False

    def on_after_backward(self, *_: Any) -> None:
        self.gradients.take(self.task)

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        losses = self.take_losses()
        self.gradients.average_over_ranks()
        self.gradients.apply(self.coefficients(trainer, losses))
        self.gradients.clear()

    @abstractmethod
    def coefficients(self, trainer: L.Trainer, losses: Tensor) -> Coefficients:
        """Return the coefficients of this step. losses: losses of the tasks, (T,)."""


class PCGrad(GradientBalance):
    """Removes conflicts between tasks by projecting the gradients of shared parameters."""

    def coefficients(self, trainer: L.Trainer, losses: Tensor) -> Coefficients:
        return Coefficients(
            shared=pcgrad_coefficients(self.gradients.products(), trainer.global_step), other=torch.ones_like(losses)
        )


class GradNorm(GradientBalance):
    """Weights the tasks so that their gradients have similar norms.

    alpha: how strongly to favour tasks that learn slowly.
    lr: learning rate of the weights.
    every_n_steps: number of optimizer steps between logs of the weights.
    """

    def __init__(self, tasks: Sequence[str], alpha: float = 1.5, lr: float = 0.025, every_n_steps: int = 20):
        super().__init__(tasks)
        self.alpha, self.lr, self.every_n_steps = alpha, lr, every_n_steps
        self.weights: Tensor | None = None  # (T,)
        self.first_losses: Tensor | None = None  # (T,)

    def coefficients(self, trainer: L.Trainer, losses: Tensor) -> Coefficients:
        if self.weights is None or self.first_losses is None:
            self.weights, self.first_losses = torch.ones_like(losses), losses
        self.first_losses = self.first_losses.to(losses.device)  # a checkpoint has them on the CPU
        weights = self.weights.to(losses.device)
        norms = self.gradients.products().diagonal().double().sqrt()
        updated = gradnorm_weights(weights, norms, losses, self.first_losses, self.alpha, self.lr)
        # In fp16, gradients overflow now and then, and the optimizer skips the step.
        self.weights = torch.where(norms.isfinite().all(), updated, weights)
        self.log_weights(trainer, weights, self.every_n_steps)
        return Coefficients(shared=weights, other=weights)

    def state_dict(self) -> dict[str, Tensor]:
        if self.weights is None or self.first_losses is None:
            return {}
        return {"weights": self.weights.cpu(), "first_losses": self.first_losses.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.weights, self.first_losses = state["weights"], state["first_losses"]


class GramianBalance(GradientBalance):
    """Combines the gradients of shared parameters with a method of torchjd.

    Each step waits for the dot products of the gradients, because the solvers run on the CPU.

    method: "mgda" or "upgrad".
    every_n_steps: number of optimizer steps between logs of the coefficients.
    """

    def __init__(self, tasks: Sequence[str], method: str, every_n_steps: int = 20):
        super().__init__(tasks)
        self.weighting, self.every_n_steps = torchjd_weighting(method), every_n_steps

    def coefficients(self, trainer: L.Trainer, losses: Tensor) -> Coefficients:
        shared = balanced_coefficients(self.gradients.products(), self.weighting)
        self.log_weights(trainer, shared, self.every_n_steps)
        return Coefficients(shared=shared, other=torch.ones_like(losses))
