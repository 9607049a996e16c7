"""Cross-stitch units between experts (Misra et al., arXiv 1604.03539).

In each layer with experts, an E x E matrix A mixes the outputs of all experts for the task that expert t serves:

    out_t = sum_j A[t, j] expert_j(x)

In the paper, all tasks read the same image, and each expert has its own inputs. Here, a text is encoded for one task,
and all experts have the same inputs x. expert_j is a sub-layer with its residual connection and LayerNorm. A starts as
the identity, so a new encoder equals an MoEEncoder. Training learns how much each task uses each expert, and trains all
experts on all tasks.

Sub-layers with experts are computed E times, in training and inference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn

from datamodules.packed import Tokens
from lightning_modules.encoders.base import Condition, Encoder
from lightning_modules.encoders.moe import MoEEncoder


class CrossStitchEncoder(MoEEncoder):
    """An MoEEncoder whose tasks also use the experts of other tasks.

    attention, ffn, layers: as in MoEEncoder. A layer with experts in both sub-layers has one matrix for both.

    Each row of a matrix is a separate parameter, stitches.LAYER.EXPERT (E,), with the experts in alphabetical order. So
    a step on one task does not change the rows of other tasks.
    """

    def _add_parameters(self) -> None:
        rows = self.neutral_weights()
        self.stitches = nn.ModuleDict()
        for index in self.expert_layers:
            matrix = {name: nn.Parameter(rows[f"stitches.{index}.{name}"]) for name in self.experts}
            self.stitches[str(index)] = nn.ParameterDict(matrix)
        self._rows_read: dict[tuple[int, str], tuple[tuple[int, int], list[str]]] = {}  # cache of _experts_in_row

    def neutral_weights(self) -> dict[str, Tensor]:
        identity = torch.eye(len(self.experts))
        rows = dict(zip(sorted(self.experts), identity, strict=True))
        return {f"stitches.{i}.{name}": row.clone() for i in self.expert_layers for name, row in rows.items()}

    def _matrix(self, index: int) -> nn.ParameterDict:
        return cast(nn.ParameterDict, self.stitches[str(index)])

    def stitch_weights(self, index: int, expert: str) -> dict[str, Tensor]:
        """Return a row of the matrix of a layer: expert -> weight of its output, a scalar."""
        return dict(zip(sorted(self.experts), self._matrix(index)[expert], strict=True))

    def condition(self, task: str) -> Condition:
        expert = self.expert_of(task)
        mixtures = {index: self.stitch_weights(index, expert) for index in self.expert_layers}
        if self.training:
            # Experts whose weight stays 0 are skipped. Their gradient is None, not 0, so AdamW does not change them.
            for index, weights in mixtures.items():
                if not self._matrix(index)[expert].requires_grad:
                    mixtures[index] = {name: weights[name] for name in self._experts_in_row(index, expert)}
        return Condition(experts=expert, mixtures=mixtures)

    def _experts_in_row(self, index: int, expert: str) -> list[str]:
        """Return the experts whose weight in a row is not 0.

        The host waits for the row only if its values may have changed since the last call.
        """
        row = self._matrix(index)[expert]
        state = id(row), row._version  # the id, because a copy of the encoder has different rows
        known, names = self._rows_read.get((index, expert), (None, []))
        if known != state:
            names = [name for name, weight in zip(sorted(self.experts), row.tolist(), strict=True) if weight]
            self._rows_read[index, expert] = state, names
        return names

    def layer(self, index, hidden, states, context, condition):
        if index not in condition.mixtures:
            return super().layer(index, hidden, states, context, condition)
        layer, family, weights = self.family.layers[index], self.family, condition.mixtures[index]

        def mixed(compute: Callable[[str], Tensor], has_experts: bool) -> Tensor:
            if not has_experts:
                return compute(condition.experts)
            outputs = ((compute(name), weight) for name, weight in weights.items())
            return reduce(torch.add, (output * weight.to(output.dtype) for output, weight in outputs))

        attended = mixed(lambda name: family.attention(layer, hidden, states, context, name), self.attention)
        return mixed(lambda name: family.feed_forward(layer, attended, context, name), self.ffn)

    def _forward_mixed(self, tokens: Tokens, tasks: Sequence[str]) -> Tensor:
        return Encoder._forward_mixed(self, tokens, tasks)  # MoEEncoder's computes only one expert per text

    def add_expert(self, name: str, like: str) -> None:
        """Add a copy of an expert. Its row uses the copy instead of the original; other rows do not use it."""
        super().add_expert(name, like)
        self._rows_read.clear()  # because a new row may have the id of a deleted one
        order = sorted(self.experts)
        for rows in map(self._matrix, self.expert_layers):
            for expert, row in list(rows.items()):
                weights = dict(zip((other for other in order if other != name), row.detach(), strict=True))
                rows[expert] = nn.Parameter(stacked(weights, order), row.requires_grad)
                if expert == like:
                    weights |= {name: weights[like], like: torch.zeros_like(weights[like])}
                    rows[name] = nn.Parameter(stacked(weights, order))


def stacked(weights: Mapping[str, Tensor], order: Sequence[str]) -> Tensor:
    """Return weights as a tensor, with 0 for missing names. order: all names."""
    zero = torch.zeros_like(next(iter(weights.values())))
    return torch.stack([weights.get(name, zero) for name in order])
