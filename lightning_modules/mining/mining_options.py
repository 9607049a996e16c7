"""The options of mining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from datamodules.options import option


@dataclass
class MiningOptions:
    """Filters and sampling of hard negatives. The filters apply in the order of the fields."""

    k: int = option(100, "number of candidates per query", above=0, maximum=1_000_000)
    num_negatives: int = option(
        8, "number of hard negatives per query; each step draws from them", above=0, maximum=10_000
    )
    same_text: bool = option(True, "drop candidates with the text of the query or of one of its positives")
    first_rank: int = option(
        0, "number of nearest candidates to drop, because they are the most likely to be unjudged positives", minimum=0
    )
    relative_margin: float | None = option(
        0.05,
        "keep candidates that score below (1 - margin) times the positive's score; null for all",
        minimum=0,
        below=1,
    )
    absolute_margin: float | None = option(
        None, "keep candidates that score below the positive by this margin; null for all", minimum=0, maximum=1e6
    )
    positive: Literal["mean", "lowest", "highest"] = option(
        "mean", "which score the margins use if a query has several positives"
    )
    guide: str | None = option(None, "folder, checkpoint or hub name of a guide model; null for none")
    guide_margin: float = option(
        0.0,
        "keep candidates that the guide model scores below the positive by this margin, in cosine",
        minimum=0,
        maximum=2,
    )
    sampling: Literal["top", "random", "softmax"] = option(
        "top",
        "which of the remaining candidates to keep: the best, random ones, or a sample from the softmax of the scores",
    )
    sampling_temperature: float = option(0.05, "temperature for sampling=softmax", minimum=1e-6, maximum=1e6)
    memory_mb: int = option(512, "memory for scores, in MB, not counting the vectors", above=0)
    backend: Literal["auto", "faiss", "torch"] = option("auto", "library for exact search; the result is the same")

    @property
    def has_margin(self) -> bool:
        """Whether a margin is set, which needs scores from an encoder."""
        return self.relative_margin is not None or self.absolute_margin is not None
