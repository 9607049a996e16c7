"""InfoNCE with false-negative masks: pure functions on tensors.

Shapes: B queries, M documents, D dimensions, K known positives of a query (padded with -1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIMILARITIES = ("dot", "cosine")


def similarity_scores(queries: Tensor, documents: Tensor, similarity: str = "dot") -> Tensor:
    """Scores (B, M) of every query with every document, in float32 at least: raw dot products are large."""
    if queries.dtype in (torch.float16, torch.bfloat16):
        queries = queries.float()
    documents = documents.to(queries.dtype)
    if similarity == "cosine":
        queries, documents = F.normalize(queries, dim=-1), F.normalize(documents, dim=-1)
    elif similarity != "dot":
        raise ValueError(f"similarity: got {similarity!r}, allowed are {', '.join(SIMILARITIES)}")
    return queries @ documents.T


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


def mask_scores(scores: Tensor, positives: Tensor, mask: Tensor) -> Tensor:
    """Scores (B, M) with -inf where a document must not serve as a negative.

    positives: (B,) column of each query's own positive, which is always kept. mask: (B, M) bool.
    """
    own = F.one_hot(positives, scores.shape[1]).bool()
    return scores.masked_fill(mask & ~own, float("-inf"))


def info_nce(scores: Tensor, positives: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over queries of -log softmax at the positive (paper, equation 2).

    scores: (B, M), -inf where masked. positives: (B,) column of each query's positive.
    """
    return F.cross_entropy(scores / temperature, positives)
