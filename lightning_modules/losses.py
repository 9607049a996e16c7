"""The losses of one query over its row of scores: pure functions on tensors.

Shapes: B queries, M documents, D dimensions, P positives of a query (columns, padded with -1; the first is always
there). A score of -inf is a document that is no negative of the query. Every loss is (B,).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.losses import padded_by_first

SIMILARITIES = ("dot", "cosine")
FORMS = ("mean_log", "log_mean")


def comparable(vectors: Tensor, similarity: str = "dot") -> Tensor:
    """Vectors (n, D) whose dot product is the similarity, in float32 at least: raw dot products are large."""
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity: got {similarity!r}, allowed are {', '.join(SIMILARITIES)}")
    if vectors.dtype in (torch.float16, torch.bfloat16):
        vectors = vectors.float()
    return F.normalize(vectors, dim=-1) if similarity == "cosine" else vectors


def info_nce(
    scores: Tensor, positives: Tensor, form: str = "mean_log", positives_in_denominator: bool = False
) -> Tensor:
    """InfoNCE (paper, equation 2) with one or several positives.

    scores: (B, M), divided by the temperature. Of positive p with score s_p, and the negatives n,

        q_p = exp(s_p) / (exp(s_p) + sum_n exp(s_n))        mean_log: -mean_p log q_p        log_mean: -log mean_p q_p

    so the other positives are no negatives of p; with positives_in_denominator they stand beside the negatives, and the
    forms are the two of SupCon (arXiv 2004.11362: mean_log is "out", equation 2, log_mean "in", equation 3). With one
    positive all are the same.
    """
    present, columns = positives >= 0, padded_by_first(positives)
    if positives_in_denominator or positives.shape[1] == 1:
        log_q = scores.log_softmax(1).gather(1, columns)
    else:
        # The lowest number instead of -inf: a row without negatives has a gradient of 0, not NaN.
        negatives = scores.scatter(1, columns, torch.finfo(scores.dtype).min).logsumexp(1, keepdim=True)
        log_q = F.logsigmoid(scores.gather(1, columns) - negatives)
    count = present.sum(1, dtype=scores.dtype)
    if form == "mean_log":
        return -(log_q * present).sum(1) / count
    return count.log() - log_q.masked_fill(~present, -math.inf).logsumexp(1)


def kl_divergence(student: Tensor, teacher: Tensor, candidates: Tensor) -> Tensor:
    """KL divergence of the student's distribution over candidates from the teacher's.

    student, teacher: (B, M) scores, each divided by its temperature. candidates: (B, M) bool, at least one in a row.
    (Hinton et al., arXiv 1503.02531, without the factor of the squared temperature: the weight has it.)
    """
    student = student.masked_fill(~candidates, -math.inf).log_softmax(1)
    teacher = teacher.masked_fill(~candidates, -math.inf).log_softmax(1)
    return (teacher.exp() * (teacher - student).masked_fill(~candidates, 0.0)).sum(1)


def margin_mse(student: Tensor, teacher: Tensor, positives: Tensor, candidates: Tensor) -> Tensor:
    """Mean squared error of the student's margins between positive and negative from the teacher's.

    student, teacher: (B, M) scores. candidates: (B, M) bool; those that are no positives are the negatives. A query
    without any has a loss of 0. (Hofstätter et al., arXiv 2010.02666.)
    """
    present, columns = positives >= 0, padded_by_first(positives)
    error = (student - teacher).masked_fill(~candidates, 0.0)
    negatives = candidates.scatter(1, columns, False)
    pairs = present[:, :, None] & negatives[:, None, :]  # (B, P, M)
    squares = (error.gather(1, columns)[:, :, None] - error[:, None, :]).square() * pairs
    return squares.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)
