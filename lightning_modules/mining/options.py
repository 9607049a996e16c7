"""How hard negatives are mined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class MiningOptions:
    """k: candidates of each query. num_negatives: that are kept of them, from which a step draws its own.

    Filters, in this order. Known positives and the query itself are no candidates, and with same_text nor is what reads
    as one of them. first_rank: the miner's nearest that are left out. relative_margin: only candidates that score below
    (1 - margin) of the query's positive; absolute_margin: below it by the margin; null for neither. positive: "mean",
    "lowest" or "highest" of the scores of the query's positives. guide: a model (folder, checkpoint, hub name) that
    must find a candidate worse than the positive by guide_margin, in cosine.

    sampling: of those that are left, the "top", "random" ones, or by "softmax" of their scores / sampling_temperature.
    memory_mb: for scores, beside the vectors. backend: of the exact search (top_k.py), which all find the same.
    """

    k: int = 100
    num_negatives: int = 8
    same_text: bool = True
    first_rank: int = 0
    relative_margin: float | None = 0.05
    absolute_margin: float | None = None
    positive: Literal["mean", "lowest", "highest"] = "mean"
    guide: str | None = None
    guide_margin: float = 0.0
    sampling: Literal["top", "random", "softmax"] = "top"
    sampling_temperature: float = 0.05
    memory_mb: int = 512
    backend: Literal["auto", "faiss", "torch"] = "auto"

    @property
    def compares(self) -> bool:
        """Whether candidates are compared with positives by the model."""
        return self.relative_margin is not None or self.absolute_margin is not None
