"""Losses and masks of a contrastive batch: pure functions on tensors.

Shapes
    B   queries
    M   documents that each query is compared with
    P   positives of a query: columns of the scores, padded with -1; every query has at least one
    K   keys of a query, such as the ids of its known positives, padded with -1
    D   dimensions of a vector

Losses are per query, (B,). A score of -inf marks a document that is masked as a negative of the query.

All shapes follow from the shapes of the arguments, so a GPU computes these functions without waiting for the host.
torch.unique, nonzero and indexing with a boolean mask would make the host wait for the GPU.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.records import check_choice

SIMILARITIES = ("dot", "cosine")


def comparable(vectors: Tensor, similarity: str = "dot") -> Tensor:
    """Return vectors (n, D) whose dot products are the similarities, in at least float32.

    Raw dot products are large, so half precision is too coarse for them.
    """
    check_choice("similarity", similarity, SIMILARITIES)
    if vectors.dtype in (torch.float16, torch.bfloat16):
        vectors = vectors.float()
    return F.normalize(vectors, dim=-1) if similarity == "cosine" else vectors


def similarities(first: Tensor, second: Tensor, similarity: str) -> Tensor:
    """Return the similarity of each pair of vectors, (n, m). first: (n, D). second: (m, D)."""
    return comparable(first, similarity) @ comparable(second, similarity).T


# Losses


def info_nce(
    scores: Tensor, positives: Tensor, form: str = "mean_log", positives_in_denominator: bool = False
) -> Tensor:
    """Return the InfoNCE loss (paper, equation 2) of queries with one or more positives, (B,).

    For a positive p with score s_p, and negatives n with scores s_n,

        q_p = exp(s_p) / (exp(s_p) + sum_n exp(s_n))        mean_log: -mean_p log q_p        log_mean: -log mean_p q_p

    With positives_in_denominator, the denominator also contains the other positives. The two forms are then the losses
    of SupCon (arXiv 2004.11362): mean_log is "out" (equation 2), and log_mean is "in" (equation 3). With a single
    positive, all variants are equal.

    scores: similarities divided by the temperature, (B, M).
    positives: columns of the positives, (B, P).
    """
    present, columns = positives >= 0, fill_padding(positives)
    if positives_in_denominator or positives.shape[1] == 1:
        log_q = scores.log_softmax(1).gather(1, columns)  # (B, P)
    else:
        # Not -inf, which would give a query without negatives a gradient of NaN instead of 0.
        negatives = scores.scatter(1, columns, torch.finfo(scores.dtype).min).logsumexp(1, keepdim=True)
        log_q = F.logsigmoid(scores.gather(1, columns) - negatives)  # (B, P)
    count = present.sum(1, dtype=scores.dtype)
    if form == "mean_log":
        return -(log_q * present).sum(1) / count
    return count.log() - log_q.masked_fill(~present, -math.inf).logsumexp(1)


def kl_divergence(student: Tensor, teacher: Tensor, candidates: Tensor) -> Tensor:
    """Return KL(teacher || student) of the softmaxes over the candidates, (B,).

    This is the loss of Hinton et al. (arXiv 1503.02531), not multiplied by the squared temperature.

    student, teacher: scores, each divided by its own temperature, (B, M).
    candidates: whether a document is in the softmax, (B, M) bool; at least one per query.
    """
    student = student.masked_fill(~candidates, -math.inf).log_softmax(1)
    teacher = teacher.masked_fill(~candidates, -math.inf).log_softmax(1)
    return (teacher.exp() * (teacher - student).masked_fill(~candidates, 0.0)).sum(1)


def margin_mse(student: Tensor, teacher: Tensor, positives: Tensor, candidates: Tensor) -> Tensor:
    """Return the mean squared difference between the student's and the teacher's margins, (B,).

    A margin is the score of a positive minus the score of a negative (Hofstätter et al., arXiv 2010.02666). The loss of
    a query without negatives is 0.

    student, teacher: scores, (B, M).
    positives: columns of the positives, (B, P).
    candidates: whether a document is a positive or a negative, (B, M) bool.
    """
    present, columns = positives >= 0, fill_padding(positives)
    error = (student - teacher).masked_fill(~candidates, 0.0)
    negatives = candidates.scatter(1, columns, False)
    pairs = present[:, :, None] & negatives[:, None, :]  # (B, P, M)
    squares = (error.gather(1, columns)[:, :, None] - error[:, None, :]).square() * pairs
    return squares.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


def vector_distance(vectors: Tensor, targets: Tensor, kind: str = "l2") -> Tensor:
    """Return the distance of each vector from its target, (n,): its squared L2 norm, or 1 - cosine.

    vectors, targets: (n, D).
    """
    if kind == "cosine":
        return 1 - F.cosine_similarity(vectors, targets, dim=-1)
    return (vectors - targets).square().sum(-1)


def mean_over_texts(query_values: Tensor, document_values: Tensor, columns: Tensor) -> Tensor:
    """Average each query's value with the values of its documents, and return the mean over queries, a scalar.

    Every query counts once, and a document shared by several queries counts for each. So the mean over several ranks
    equals the mean in one process.

    query_values: (B,). document_values: (M,).
    columns: the documents of each query, (B, K), padded with -1.
    """
    present = columns >= 0
    totals = query_values + (document_values[columns.clamp(min=0)] * present).sum(1)  # (B,)
    return (totals / (1 + present.sum(1))).mean()


def mean_of_columns(values: Tensor, columns: Tensor) -> Tensor:
    """Return the mean of each query's documents, (B, n). values: (M, n). columns: (B, P), padded with -1."""
    present = (columns >= 0).to(values.dtype)[..., None]  # (B, P, 1)
    return (values[columns.clamp(min=0)] * present).sum(1) / present.sum(1)


# Masks: documents that must not serve as negatives


def membership_mask(keys: Tensor, document_keys: Tensor) -> Tensor:
    """Return whether the key of each document is among the keys of each query, (B, M) bool.

    keys: keys of each query, (B, K).
    document_keys: key of each document, (M,); may contain duplicates.
    """
    ordered, num_documents = document_keys.sort().values, len(document_keys)
    position = torch.searchsorted(ordered, keys).clamp(max=num_documents - 1)  # (B, K) first of equal keys
    position = torch.where(ordered[position] == keys, position, num_documents)  # an additional column for "no document"
    mask = torch.zeros(len(keys), num_documents + 1, dtype=torch.bool, device=keys.device)
    mask.scatter_(1, position, True)
    return mask.gather(1, torch.searchsorted(ordered, document_keys).expand(len(keys), -1))


def duplicate_mask(ids: Tensor) -> Tensor:
    """Return whether an id repeats an earlier one, (M,) bool. ids: (M,)."""
    ordered, order = ids.sort(stable=True)
    repeats = torch.zeros_like(ordered, dtype=torch.bool)
    repeats[1:] = ordered[1:] == ordered[:-1]
    return torch.empty_like(repeats).scatter_(0, order, repeats)


def other_copies(ids: Tensor, offset: int) -> Tensor:
    """Return whether a document of any rank repeats another one, (M,) bool. Among copies, this rank's copy is kept.

    ids: (M,). offset: index of this rank's first document.
    """
    return duplicate_mask(ids.roll(-offset)).roll(offset)


def guide_mask(scores: Tensor, positives: Tensor, margin: float = 0.0, kind: str = "absolute") -> Tensor:
    """Return whether the guide scores a document above the query's positives minus the margin, (B, M) bool.

    The idea is from GISTEmbed (arXiv 2402.16829), the margins from NV-Retriever (arXiv 2407.15831).

    scores: scores of the guide, (B, M).
    positives: columns of the positives, (B, P); their mean score counts.
    margin: difference of scores, or a share of the positives' score if kind is "relative".
    """
    present = positives >= 0
    positive_scores = scores.gather(1, positives.clamp(min=0))
    threshold = (positive_scores * present).sum(1, keepdim=True) / present.sum(1, keepdim=True)  # (B, 1)
    return scores > threshold - margin * (threshold.abs() if kind == "relative" else 1.0)


def unmask_positives(mask: Tensor, positives: Tensor) -> Tensor:
    """Return the mask (B, M), set to False for each query's positives (B, P)."""
    return mask.scatter(1, fill_padding(positives), False)


def fill_padding(positives: Tensor) -> Tensor:
    """Return the positives (B, P), with the padding replaced by the query's first positive."""
    return torch.where(positives < 0, positives[:, :1], positives)
