"""The options of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from datamodules.options import option


@dataclass
class OptimOptions:
    """AdamW and its learning rate: a linear warm-up, then a schedule."""

    lr: float = option(3e-4, "peak learning rate", above=0, maximum=10)
    weight_decay: float = option(0.01, "weight decay, except on biases and LayerNorms", minimum=0, maximum=1000)
    beta1: float = option(0.9, "decay rate of the mean of the gradients", minimum=0, below=1)
    beta2: float = option(0.999, "decay rate of the mean of the squared gradients", minimum=0, below=1)
    eps: float = option(1e-8, "term added to the denominator of an update", minimum=1e-30, maximum=1)
    schedule: Literal["linear", "cosine", "constant"] = option(
        "linear", "learning rate after the warm-up: a linear or cosine decay to 0, or constant"
    )
    warmup: float = option(0.05, "share of all steps during which the learning rate rises", minimum=0, below=1)
    lr_scale: dict[str, float] = option(
        {},
        "factor of the learning rate of a part: embeddings, shared, experts, stitches, features, or one expert; "
        "0 freezes it",
        minimum=0,
        maximum=1e6,
    )
    expert_decay: float = option(
        0.0,
        "pull of the experts towards their mean: each step removes the share lr * expert_decay of their distance from "
        "it",
        minimum=0,
        maximum=1e6,
    )
    layer_decay: float = option(
        1.0,
        "learning rate of a layer, relative to the layer above, such as 0.9; 1: the same for all layers",
        above=0,
        maximum=10,
    )
