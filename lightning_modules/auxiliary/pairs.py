"""Pairs of a query and a document in a batch: their scores, and what is known about them.

Shapes: B queries on this rank, m documents on this rank, M on all ranks, D dimensions of a vector.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.packed import ContrastiveBatch
from datamodules.records import UserError
from lightning_modules.distributed.collectives import gather_documents, gather_rows
from lightning_modules.losses import membership_mask, other_copies, similarities
from lightning_modules.objective import text_keys_of_queries


def queries_of_batch(queries: np.ndarray, documents: np.ndarray, rng: random.Random) -> np.ndarray:
    """Return the rows of a batch's queries (B,), for a CompanionSource."""
    return queries


def documents_of_batch(queries: np.ndarray, documents: np.ndarray, rng: random.Random) -> np.ndarray:
    """Return the rows of a batch's documents (m,), for a CompanionSource."""
    return documents


class Pairs(NamedTuple):
    """Queries of this rank with the documents of all ranks."""

    scores: Tensor  # (B, M) similarities
    positive: Tensor  # (B, M) bool: whether the document is a positive of the query, sampled or not
    # (B, M) bool: False for the query itself, documents that a judge dropped, copies of a document, and texts equal to
    # a positive's
    known: Tensor
    query_rows: Tensor  # (B,) rows of the task's document table
    document_rows: Tensor  # (M,)


def check_other_task(key: str, task: str, other: str, tasks: Sequence[str]) -> None:
    """Raise UserError unless both are different tasks in training. key: option that names them, for errors."""
    for name in (task, other):
        if name not in tasks:
            raise UserError(f"{key}: unknown task {name!r}; the tasks in training are {', '.join(tasks)}")
    if task == other:
        raise UserError(f"{key}: got the task itself; expected one of {', '.join(t for t in tasks if t != task)}")


def in_batch_pairs(batch: ContrastiveBatch, vectors: Tensor, similarity: str) -> Pairs:
    """Return the pairs of a batch.

    vectors: vectors of the batch, (U, D). Their gradients reach the documents of other ranks.
    """
    assert batch.rows is not None
    queries, documents = vectors[batch.queries], vectors[batch.documents]
    documents, ids, offset = gather_documents(documents, batch.document_ids)  # (M, D), (M,)
    query_rows = batch.rows[batch.queries]
    unlabelled = unlabelled_documents(batch, ids)
    positive = membership_mask(batch.known_positives, ids) & ~unlabelled
    unknown = unlabelled | other_copies(ids, offset)
    if batch.text_keys is not None:
        keys, document_keys = text_keys_of_queries(batch), gather_rows(batch.text_keys[batch.documents])
        unknown = unknown | (membership_mask(keys, document_keys) & ~positive)
    return Pairs(similarities(queries, documents, similarity), positive, ~unknown, query_rows, ids)


def unlabelled_documents(batch: ContrastiveBatch, ids: Tensor) -> Tensor:
    """Return which documents are the query itself, or were dropped by a judge, (B, M) bool. ids: (M,).

    A query whose text differs from its document's has a row of its own.
    """
    assert batch.rows is not None
    return membership_mask(torch.cat([batch.unlabelled, batch.rows[batch.queries][:, None]], dim=1), ids)


def fixed_scores(queries: Tensor, documents: Tensor, similarity: str) -> Tensor:
    """Return the scores (B, M) of a batch's queries (B, D) and documents (m, D), given vectors without gradients."""
    return similarities(queries.detach(), gather_rows(documents.detach()), similarity)


def sum_over_pairs(values: Tensor, chosen: Tensor) -> Tensor:
    """Sum the values of each query's chosen pairs, and return the mean over queries, a scalar.

    values: (B, M). chosen: (B, M) bool.
    """
    return torch.where(chosen, values, 0.0).sum(1).mean()
