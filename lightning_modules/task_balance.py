"""Tasks that pull a shared encoder in different ways: weights of their losses, and combinations of their gradients.

    uncertainty   a learned weight for each task's loss (Kendall et al., arXiv 1705.07115, section 3.2)
    gradnorm      weights that bring the tasks' gradients to one norm (Chen et al., arXiv 1711.02257, algorithm 1)
    pcgrad        of two gradients that conflict, each loses its part along the other (Yu et al., arXiv 2001.06782,
                  algorithm 1)

The last two need the gradients of all tasks in one optimizer step, which they then combine. The combination is linear,
so its coefficients follow from the products of the gradients alone.

Shapes: T tasks, P parameters in all (numbers, not tensors).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from datamodules.records import UserError
from lightning_modules.distributed.collectives import world_size


class UncertaintyWeights(nn.Module):
    """exp(-s) L + s / 2 for a task's loss L, with a learned s = log of its variance, at first 0."""

    def __init__(self, tasks: Sequence[str]):
        super().__init__()
        self.log_variance = nn.ParameterDict({task: nn.Parameter(torch.zeros(())) for task in tasks})

    def forward(self, loss: Tensor, task: str) -> tuple[Tensor, Tensor]:
        """The loss to be minimised, and the weight of the given one."""
        log_variance = self.log_variance[task]
        weight = torch.exp(-log_variance)
        return weight * loss + log_variance / 2, weight.detach()


def pcgrad_coefficients(products: Tensor, seed: int) -> Tensor:
    """(T,) coefficients of the tasks' gradients in the sum of what remains of them after projection.

    products: (T, T) of the gradients with each other. seed: of the order in which a gradient meets the others.
    """
    products, num_tasks = products.double().cpu(), len(products)
    generator = torch.Generator().manual_seed(seed)
    coefficients = torch.eye(num_tasks, dtype=torch.float64)  # row i: what gradient i is made of
    for i, own in enumerate(coefficients):
        for j in torch.randperm(num_tasks, generator=generator).tolist():
            along = own @ products[j]
            if j != i and along < 0:
                own[j] -= along / products[j, j]
    return coefficients.sum(0)


def gradnorm_weights(
    weights: Tensor, norms: Tensor, losses: Tensor, first_losses: Tensor, alpha: float, lr: float
) -> Tensor:
    """(T,) weights after one step of gradient descent, which sum to T.

    Wanted is that weight times norm is the tasks' mean of it, times the task's rate to the power alpha; the rate is its
    loss over its first loss, over the mean of those. norms: (T,) of the gradients before weighting. losses,
    first_losses: (T,).
    """
    weighted, left = weights * norms, losses / first_losses
    wanted = weighted.mean() * (left / left.mean()) ** alpha
    # The norms are divided by their mean, so that lr means the same for every model.
    moved = weights - lr * torch.sign(weighted - wanted) * norms / norms.mean()
    moved = moved.clamp(min=1e-3)
    return moved * (len(moved) / moved.sum())


class TaskGradients:
    """The gradients of one optimizer step, by task. parameters: those that are trained."""

    def __init__(self, parameters: Sequence[nn.Parameter], tasks: Sequence[str]):
        self.parameters, self.tasks = list(parameters), tuple(tasks)
        self.sizes, first = [parameter.numel() for parameter in self.parameters], self.parameters[0]
        self.values = torch.zeros(len(self.tasks), sum(self.sizes), dtype=first.dtype, device=first.device)  # (T, P)
        self.used = torch.zeros(len(self.tasks), len(self.sizes), dtype=torch.bool)

    def clear(self) -> None:
        self.values.zero_()
        self.used.zero_()

    def add(self, task: str, gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients of one of the task's losses; None for parameters that it did not meet."""
        row = self.tasks.index(task)
        for i, part in enumerate(self.values[row].split(self.sizes)):
            if gradients[i] is not None:
                part += gradients[i].flatten()
                self.used[row, i] = True

    def take(self, task: str) -> None:
        """Move what a backward pass has left in the parameters to a task."""
        self.add(task, [parameter.grad for parameter in self.parameters])
        for parameter in self.parameters:
            parameter.grad = None

    def average_over_ranks(self) -> None:
        if world_size() > 1:
            dist.all_reduce(self.values)
            self.values /= world_size()

    def shared(self) -> Tensor:
        """Bool for each parameter: every task has a gradient of it. Raises UserError where there is none."""
        shared = self.used.all(0)
        if not shared.any():
            raise UserError(
                "objective.balance: no trained parameter is shared by all tasks, so there is nothing to balance"
            )
        return shared

    def products(self) -> Tensor:
        """(T, T) products of the tasks' gradients of shared parameters."""
        sizes = torch.tensor(self.sizes)
        columns = self.shared().repeat_interleave(sizes).to(self.values.device)
        return (self.values * columns) @ self.values.T

    def put(self, of_shared: Tensor, of_others: Tensor) -> None:
        """Give each parameter the sum of its gradients, times (T,) coefficients of the tasks."""
        shared = self.shared()
        parts = self.values.split(self.sizes, dim=1)
        for i, (parameter, part) in enumerate(zip(self.parameters, parts, strict=True)):
            if self.used[:, i].any():
                coefficients = of_shared if shared[i] else of_others
                parameter.grad = (coefficients.to(part) @ part).view_as(parameter)
