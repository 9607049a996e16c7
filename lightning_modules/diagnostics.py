"""What a training's batches and experts look like: pure functions, without gradient.

Shapes: B queries, M documents, U texts, D dimensions, K known positives of a query (padded with -1).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from lightning_modules.encoders.base import Encoder


def masked_share(own: Tensor, known: Tensor) -> float:
    """Share of the documents other than a query's own positives that are masked. own, known: (B, M) bool."""
    return ((known & ~own).sum() / (~own).sum().clamp(min=1)).item()


def effective_negatives(logits: Tensor, out: Tensor) -> float:
    """Mean perplexity of the softmax over a query's negatives: M' where all of M' weigh the same, 1 where one does all.

    logits: (B, M), divided by the temperature. out: (B, M) bool, no negatives. A query without negatives has 0.
    """
    logs = logits.double().masked_fill(out, -torch.inf).log_softmax(1)
    entropy = -(logs.exp() * logs.masked_fill(out, 0.0)).sum(1)
    return torch.where(out.all(1), 0.0, entropy.exp()).mean().item()


def anisotropy(vectors: Tensor) -> tuple[float, float]:
    """Mean cosine of pairs of texts, and the share of the first singular value's square in the sum of all squares.

    vectors: (U, D). Both are of the vectors at length 1, and near 1 where all point one way. (Ethayarajh,
    arXiv 1909.00512, section 4.1, for the first.)
    """
    vectors = nn.functional.normalize(vectors.double(), dim=1)
    count = len(vectors)
    mean = (vectors.sum(0).square().sum() - count) / max(1, count * (count - 1))
    small = vectors.T @ vectors if vectors.shape[1] < count else vectors @ vectors.T
    squares = torch.linalg.eigvalsh(small)  # ascending
    return mean.item(), (squares[-1] / squares.sum()).item()


def expert_names(encoder: Encoder) -> tuple[str, ...]:
    return tuple(getattr(encoder, "experts", None) or dict.fromkeys(encoder.tasks.values()))


def expert_distances(encoder: Encoder) -> dict[str, float]:
    """Of each pair of experts: the distance of their parameters over the length of their mean, and their cosine.

    Empty for an encoder without experts. 0 and 1 at first, when all are copies.
    """
    names = expert_names(encoder)
    holders = [m for m in encoder.modules() if isinstance(m, nn.ModuleDict) and set(names) <= set(m.keys())]
    found = {}
    for one, other in itertools.combinations(names, 2) if holders else ():
        a, b = (
            torch.cat([p.detach().double().flatten() for holder in holders for p in holder[name].parameters()])
            for name in (one, other)
        )
        found[f"{one}-{other}/distance"] = ((a - b).norm() / ((a + b) / 2).norm()).item()
        found[f"{one}-{other}/cosine"] = nn.functional.cosine_similarity(a, b, dim=0).item()
    return found
