"""What scores are divided by: a number, one a task, or learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class Temperature(nn.Module):
    """initial: a number, or task -> number. learn: "no", "one" for all tasks, or "per_task".

    Learned ones are parameters of their logarithm, so that steps are relative (CLIP, arXiv 2103.00020),
    and are put back into bounds, (lowest, highest), after every step of the optimizer.
    """

    def __init__(
        self,
        initial: float | Mapping[str, float],
        learn: str = "no",
        tasks: Sequence[str] = (),
        bounds: Sequence[float] = (0.01, 100.0),
    ):
        super().__init__()
        self.initial, self.bounds = initial, tuple(bounds)
        names = {"no": (), "one": ("all",), "per_task": tasks}[learn]
        self.log = nn.ParameterDict({name: nn.Parameter(torch.tensor(math.log(self._first(name)))) for name in names})

    def _first(self, task: str) -> float:
        return self.initial[task] if isinstance(self.initial, Mapping) else self.initial

    def forward(self, task: str) -> float | Tensor:
        """The temperature of a task: a number, or a scalar with gradient if it is learned."""
        if not self.log:
            return self._first(task)
        return self.log[task if task in self.log else "all"].exp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Put back into bounds: after a step, because in forward what is out of bounds would have no gradient."""
        lowest, highest = map(math.log, self.bounds)
        for parameter in self.log.values():
            parameter.clamp_(lowest, highest)
