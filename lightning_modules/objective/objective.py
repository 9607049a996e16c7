"""The loss of every path: a pure function of vectors, batch and the temperature's parameters.

Shapes: U distinct texts, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from datamodules.records import ContrastiveBatch, UserError
from lightning_modules.distributed.collectives import gather_rows
from lightning_modules.objective import FrozenEncoder
from lightning_modules.objective.comparison import compare
from lightning_modules.objective.options import ObjectiveOptions
from lightning_modules.objective.sides import Judge, Side, document_side, query_side
from lightning_modules.objective.temperature import Temperature


class Objective(nn.Module):
    """InfoNCE over in-batch and hard negatives of all ranks (paper, section 3.4), and what the options add to it.

    tasks: of the batches. dimension: D. judges: "guide" and "teacher", where there are. Raises UserError for
    a matryoshka dimension that is not below D.
    """

    def __init__(
        self, options: ObjectiveOptions, tasks: Sequence[str], dimension: int, judges: Mapping[str, FrozenEncoder]
    ):
        super().__init__()
        self.options, self.judges = options, judges
        self.temperature = Temperature(options.temperature, options.learn_temperature, tasks, options.temperature_range)
        too_long = [prefix for prefix in options.matryoshka if prefix >= dimension]
        if too_long:
            raise UserError(
                f"objective.matryoshka: got {too_long[0]}, allowed are numbers below {dimension}, the whole"
            )

    def forward(self, vectors: Tensor, batch: ContrastiveBatch) -> dict[str, Tensor]:
        """Loss, and what is logged beside it, of the vectors (U, D) of a batch's distinct texts.

        No randomness, and no state but parameters: vectors may be leaves whose gradient is carried on elsewhere.
        """
        options, temperature = self.options, self.temperature(batch.task)
        guide, teacher = (self._judged(name, batch) for name in ("guide", "teacher"))
        with torch.autocast(vectors.device.type, enabled=False):
            sides = [query_side(vectors, batch, options, guide)]
            if options.symmetric:
                sides.append(document_side(vectors, batch, options, guide))
            loss, found = self._loss(sides, temperature, None, teacher)
            weights = options.matryoshka_weights or [1.0] * len(options.matryoshka)
            for prefix, weight in zip(options.matryoshka, weights, strict=True):
                loss = loss + weight * self._loss(sides, temperature, prefix, teacher)[0]
        if isinstance(temperature, Tensor):
            found["temperature"] = temperature.detach()
        return found | {"loss": options.task_weights.get(batch.task, 1.0) * loss * batch.weight}

    def _loss(self, sides: Sequence[Side], temperature: float | Tensor, prefix: int | None, teacher: Judge | None):
        """The loss of some leading dimensions, and what is logged of it."""
        compared = [
            compare(side, self.options, temperature, prefix, 1 / len(sides), judge)
            for side, judge in zip(sides, (teacher, None), strict=False)
        ]
        losses, hits, contrastive, distilled = zip(*compared, strict=True)
        found = {"accuracy": hits[0]}
        if teacher is not None:
            found |= {"contrastive": sum(contrastive), "distillation": distilled[0]}
        return sum(losses), found

    def _judged(self, name: str, batch: ContrastiveBatch) -> Judge | None:
        if name not in self.judges:
            return None
        queries, documents = self.judges[name].vectors(batch)
        return Judge(queries, documents, gather_rows(documents))
