"""The control for an MoE: as many experts of the same size, but without knowledge of the task.

A hash of a text's token ids selects its expert, so that experts cannot specialize. A comparison with MoEEncoder shows
how much experts gain from knowing the task, apart from the additional parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.packed import Tokens
from lightning_modules.encoders.attention import AttentionContext
from lightning_modules.encoders.base import Condition, Encoder
from lightning_modules.encoders.families import Groups
from lightning_modules.encoders.moe import add_experts


class ControlEncoder(Encoder):
    """An encoder with as many experts as an MoEEncoder for the same tasks, but chosen by a hash of the text.

    A text always has the same expert, for every task and batch, in training and inference.

    attention, ffn, layers: sub-layers that have experts, as in MoEEncoder.
    """

    groups_texts = reads_keys = True

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Mapping[str, str],
        attention: bool = True,
        ffn: bool = False,
        layers: str | list[int] = "mod2",
        pooling: str = "cls",
        normalize: bool = False,
        max_length: int = 256,
    ):
        super().__init__(backbone, tokenizer, tasks, pooling, normalize, max_length)
        self.attention, self.ffn, self.layers = attention, ffn, layers if isinstance(layers, str) else list(layers)
        self.experts = tuple(f"expert{i}" for i in range(len(set(self.tasks.values()))))
        self.expert_layers = add_experts(self, layers, self.experts, attention, ffn)

    def experts_of(self, tokens: Tokens) -> np.ndarray:
        """Return the number of the expert of each text, (B,)."""
        return np.array(tokens.keys, dtype=np.int64) % len(self.experts)

    def _layers(self, indices: range, states: Tensor, context: AttentionContext, condition: Condition) -> Tensor:
        return super()._layers(indices, states, context, Condition(experts=self._groups(context.tokens)))

    def _groups(self, tokens: Tokens) -> Groups:
        """Return the rows of each expert. The host computes their number, without waiting for the device.

        Experts without rows are included, so that all ranks have gradients for the same parameters.
        """
        choice = self.experts_of(tokens)
        texts = torch.from_numpy(choice).to(tokens.input_ids.device, non_blocking=True)

        def groups(choices: Tensor, sizes: np.ndarray) -> list[tuple[str, Tensor]]:
            counts = np.bincount(choice, sizes, len(self.experts)).astype(int).tolist()
            return list(zip(self.experts, choices.argsort(stable=True).split(counts), strict=True))

        return Groups(groups(tokens.spread(texts), np.array(tokens.lengths)), groups(texts, np.ones(len(choice))))
