"""Which documents must not serve as negatives of which query: pure functions on tensors.

Shapes: B queries, M documents, K known positives of a query, P positives (both padded with -1), D dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

MARGINS = ("absolute", "relative")


def known_positive_mask(known_positives: Tensor, document_ids: Tensor) -> Tensor:
    """(B, M) bool: document m is a known positive of query b.

    known_positives: (B, K) ids. document_ids: (M,), an id may stand several times (once on each rank that drew it).
    """
    distinct, column = torch.unique(document_ids, return_inverse=True)  # sorted (M',), (M,)
    place = torch.searchsorted(distinct, known_positives).clamp(max=len(distinct) - 1)  # (B, K)
    found = distinct[place] == known_positives
    mask = torch.zeros(len(known_positives), len(distinct), dtype=torch.int8, device=document_ids.device)
    mask.scatter_reduce_(1, place, found.to(torch.int8), reduce="amax")
    return mask.bool()[:, column]


def repeated(ids: Tensor) -> Tensor:
    """(M,) bool: the same id stands further left too."""
    distinct, column = torch.unique(ids, return_inverse=True)
    places = torch.arange(len(ids), device=ids.device)
    first = places.new_full((len(distinct),), len(ids)).scatter_reduce_(0, column, places, reduce="amin")
    return places != first[column]


def guide_mask(scores: Tensor, positives: Tensor, margin: float = 0.0, kind: str = "absolute") -> Tensor:
    """(B, M) bool: a guide finds document m better than the query's positives, less a margin.

    scores: (B, M) of the guide. positives: (B, P) columns; of several, their mean score counts. margin: of scores, or
    with kind "relative" a share of the positive's score. (GISTEmbed, arXiv 2402.16829; the margins are those of
    NV-Retriever, arXiv 2407.15831.)
    """
    present = positives >= 0
    own = scores.gather(1, positives.clamp(min=0))
    own = (own * present).sum(1, keepdim=True) / present.sum(1, keepdim=True)
    return scores > own - margin * (own.abs() if kind == "relative" else 1.0)


def keep_own(mask: Tensor, positives: Tensor) -> Tensor:
    """mask (B, M) without the columns of each query's own positives (B, P)."""
    return mask.scatter(1, padded_by_first(positives), False)


def padded_by_first(positives: Tensor) -> Tensor:
    """Positives (B, P) with each query's first one, which is always there, in place of -1."""
    return torch.where(positives < 0, positives[:, :1], positives)
