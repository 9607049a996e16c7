"""Transfer predictions from one task to the labels of another (arXiv 2105.03790, 2401.01219).

A paper of the source task has no labels of the target task, but the tasks are related: with R[a, b] = p(b | a),

    q(b | x) = sum_a p(a | x) R[a, b]        L = -sum_b q(b | x) log p(b | x)

for a paper x, its probabilities p(a | x) in the source task, and the target expert's softmax p(b | x) over the target's
labels. In link prediction and search, the documents of the batch replace the labels a, and R[d, b] = sum_c p(c | d)
R'[c, b] for the target's labels c of a document d and a relation R' among them. In the papers, this loss is a sum over
binary labels. Here, it is the cross-entropy of two distributions.

Shapes
    B   queries of a batch on this rank
    m   documents on this rank, M on all ranks
    a   labels of the source, or labels c of documents
    b   labels of the target
    n   labels of the target that are encoded with the batch
    k   known labels of a paper, padded with -1
    D   dimensions of a vector
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.batches import CompanionSource, ContrastiveDataModule
from datamodules.options import check_number
from datamodules.packed import ContrastiveBatch
from datamodules.ragged import Ragged
from datamodules.records import UserError, check_choice
from datamodules.relations import PartialAnnotation, distributions, find_collection, most_related, relation_of
from datamodules.tasks import ClassificationDataModule
from lightning_modules.auxiliary.auxiliary_loss import AuxiliaryLoss
from lightning_modules.auxiliary.pairs import documents_of_batch, queries_of_batch, unlabelled_documents
from lightning_modules.distributed.collectives import gather_documents
from lightning_modules.losses import duplicate_mask, mean_of_columns, similarities
from lightning_modules.objective_options import ObjectiveOptions

log = logging.getLogger(__name__)

TEACHERS = ("relation", "prediction")
FLOOR = 1e-6  # probability of an unrelated label inside a logarithm
RELATED = 8  # number of target labels to encode for each known source label


def matching_loss(log_p: Tensor, q: Tensor, teacher: str = "relation", stop_gradient: bool = True) -> Tensor:
    """Return the cross-entropy between the transferred and the predicted distribution of each paper, (B,).

    The weight of a paper is the sum of its q, which is less than 1 if source labels are unrelated to all encoded
    labels.

    log_p: logarithms of the predicted probabilities, (B, n).
    q: transferred probabilities, (B, n).
    teacher: the distribution that weighs the logarithms of the other distribution. "relation" is q, which trains the
        target task; "prediction" is p, as in the papers, which trains the source task.
    stop_gradient: whether the teacher is a constant. Without it, as in the papers, both tasks are trained.
    """
    coverage = q.sum(1).detach()
    q = q / q.sum(1, keepdim=True).clamp(min=FLOOR)
    weights, logarithms = (q, log_p) if teacher == "relation" else (log_p.exp(), q.clamp(min=FLOOR).log())
    if stop_gradient:
        weights = weights.detach()
    return -coverage * (weights * logarithms).sum(1)


@dataclass(frozen=True)
class LabelSample:
    """The labels to encode with a batch: all, or a sample (the same on all ranks) and the labels related to the batch.

    rows: row of each label in its document table.
    size: number of labels in the sample.
    known: labels of each row of the batch's document table.
    related: positions of the labels related to each known label.
    """

    rows: np.ndarray
    size: int
    known: Ragged
    related: Ragged

    @property
    def is_complete(self) -> bool:
        return len(self.rows) <= self.size

    def __call__(self, queries: np.ndarray, documents: np.ndarray, rng: random.Random) -> np.ndarray:
        if self.is_complete:
            return self.rows
        known = self.known.take(np.concatenate([queries, documents])).values
        sample = rng.sample(range(len(self.rows)), self.size)
        return self.rows[np.union1d(sample, self.related.take(known).values)]


class Labels(NamedTuple):
    """Labels that are encoded with a batch, from all ranks if they differ by rank."""

    vectors: Tensor  # (n, D)
    positions: Tensor  # (n,) position of each label in its space
    copies: Tensor  # (n,) whether a label repeats an earlier one


class DistributionMatching(AuxiliaryLoss):
    """Transfer predictions or annotations of a source task to the labels of a target task.

    source: task whose batches get the loss, or TASK/COLLECTION if a classification has several collections.
    target: classification whose labels are predicted, as TASK or TASK/COLLECTION.
    relation: probability of each target label given a source label. "estimated": from the papers in the train splits
        that have both. "same": labels with the same name are related. Otherwise, a file with source label, target label
        and weight per line, separated by tabs. For link prediction and search, it relates the target labels of a
        document to the target labels of the query.
    known: whether p(a | x) is uniform over the source's annotations (co-annotation), instead of the model's softmax.
        Documents with target labels always count as annotated.
    certain: with `known`, relations of at least this weight give a paper hard labels, which replace all others.
    teacher: target of the cross-entropy, "relation" or "prediction" (see matching_loss).
    stop_gradient: whether the teacher is a constant.
    smoothing: number of average papers to add to each label's papers in estimating a relation.
    match: how to compare papers of the two tasks: "title", "text" or "id" (datamodules/co_annotation.py).
    max_labels: maximum number of labels per task to encode with a batch. If a task has more, a sample and the labels
        related to the batch are encoded.
    objective: options of the objective. The softmaxes use its similarity and each task's temperature (the initial
        value, if it is learned).
    """

    relation: Tensor  # (a, b)
    is_certain: Tensor  # (a, b) bool
    lists: Tensor  # (rows, k) labels of each row of the source's document table
    unlabelled: Tensor  # (rows,) bool

    def __init__(
        self,
        source: str,
        target: str,
        relation: str = "estimated",
        known: bool = False,
        certain: float = 0.95,
        teacher: str = "relation",
        stop_gradient: bool = True,
        smoothing: float = 1.0,
        match: str = "title",
        max_labels: int = 256,
        weight: float = 1.0,
        objective: ObjectiveOptions | None = None,
    ):
        super().__init__(weight)
        check_choice("teacher", teacher, TEACHERS)
        for key, value, minimum in (("smoothing", smoothing, 0), ("max_labels", max_labels, 1)):
            check_number(key, value, minimum=minimum, maximum=1e9)
        check_number("certain", certain, above=0, maximum=1)
        self.source, self.target, self.relation_name = source, target, relation
        self.known, self.certain = known, certain
        self.teacher, self.stop_gradient, self.smoothing, self.match = teacher, stop_gradient, smoothing, match
        self.max_labels, self.objective = max_labels, objective or ObjectiveOptions()

    def prepare(self, data: ContrastiveDataModule) -> None:
        source, target = (find_collection(data, key, getattr(self, key)) for key in ("source", "target"))
        self.source_task, self.target_task = source[0].task.name, target[0].task.name
        self.has_labels = isinstance(source[0], ClassificationDataModule)
        papers = PartialAnnotation.of(source, target, self.match)
        if not papers.unlabelled.any():
            raise UserError(
                f"source: every training query of {self.source} has labels of {self.target}, so there is nothing to "
                "transfer; choose another source or target"
            )
        log.info("%d training queries of %s have no labels of %s", papers.unlabelled.sum(), self.source, self.target)
        weights = relation_of(papers, self.relation_name, self.smoothing)
        related = most_related(weights, RELATED)
        count = len(papers.source)
        identity = Ragged.of(np.arange(count)[:, None])
        self.source_labels = LabelSample(papers.source.rows, self.max_labels, papers.known, identity)
        self.target_labels = LabelSample(papers.target.rows, self.max_labels, papers.known, related)
        tables = {
            "relation": distributions(weights),
            "is_certain": weights >= self.certain,
            "lists": papers.known.padded(),
            "unlabelled": papers.unlabelled,
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(table), persistent=False)

    def companions(self, data: ContrastiveDataModule, task: str) -> Sequence[CompanionSource]:
        if task != self.source_task:
            return ()
        source, target = (data.by_name[name] for name in (self.source_task, self.target_task))
        companions = [
            CompanionSource(source, self.target_task, queries_of_batch),
            CompanionSource(target, self.target_task, self.target_labels),
        ]
        if self.known:
            return companions
        if self.has_labels:
            return [*companions, CompanionSource(source, self.source_task, self.source_labels)]
        return [*companions, CompanionSource(source, self.target_task, documents_of_batch)]

    def forward(self, batch: ContrastiveBatch, vectors: Tensor, companions: Sequence[Tensor]) -> Tensor:
        if batch.task != self.source_task:
            return 0.0 * vectors.sum()
        assert batch.rows is not None
        labels = encoded_labels(companions[1], batch.companions[1].rows, self.target_labels)
        rows, queries = batch.rows[batch.queries], vectors[batch.queries]
        if self.has_labels and self.known:
            q = self._annotated(self.lists[rows], labels, hard=True)
        elif self.has_labels:
            source = encoded_labels(companions[2], batch.companions[2].rows, self.source_labels)
            q = self._softmax(queries, source.vectors, self.source_task, source.copies) @ self._related(source, labels)
        elif self.known:
            q = mean_of_columns(self._annotated(self.lists[batch.document_ids], labels), batch.positives)
        else:
            q = self._from_documents(batch, queries, vectors[batch.documents], companions[2], labels)
        log_p = self._logits(companions[0], labels.vectors, self.target_task, labels.copies).log_softmax(1)
        losses = matching_loss(log_p, q, self.teacher, self.stop_gradient)  # (B,)
        return (losses * self.unlabelled[rows]).mean()

    def _from_documents(
        self,
        batch: ContrastiveBatch,
        queries: Tensor,
        documents: Tensor,
        documents_as_target: Tensor,
        labels: Labels,
    ) -> Tensor:
        """Return q of queries (B, D), from the documents (m, D) of all ranks and the documents' labels, (B, n)."""
        documents, ids, _ = gather_documents(documents, batch.document_ids)  # (M, D), (M,)
        documents_as_target = gather_documents(documents_as_target, batch.document_ids).vectors
        known = self.lists[ids]  # (M, k)
        predicted = self._softmax(documents_as_target, labels.vectors, self.target_task, labels.copies)
        predicted = predicted @ self._related(labels, labels)
        q_of_documents = torch.where(known[:, :1] >= 0, self._annotated(known, labels), predicted)  # (M, n)
        # A query that is a document must not find itself.
        masked = duplicate_mask(ids) | unlabelled_documents(batch, ids)
        return self._softmax(queries, documents, self.source_task, masked) @ q_of_documents

    def _annotated(self, known: Tensor, labels: Labels, hard: bool = False) -> Tensor:
        """Return q of papers with known labels, (p, n). known: labels of each paper, (p, k).

        hard: whether certain labels replace all others.
        """
        present = (known >= 0)[:, :, None]  # (p, k, 1)
        pairs = known.clamp(min=0)[:, :, None], labels.positions
        q = (self.relation[pairs] * present).sum(1) / present.sum(1).clamp(min=1)
        q = q.masked_fill(labels.copies, 0.0)
        if not hard:
            return q
        certain = ((self.is_certain[pairs] & present).any(1) & ~labels.copies).to(q.dtype)
        count = certain.sum(1, keepdim=True)
        return torch.where(count > 0, certain / count.clamp(min=1), q)

    def _related(self, source: Labels, labels: Labels) -> Tensor:
        """Return the relation from source labels to encoded target labels, (labels of the source, n)."""
        relation = self.relation[source.positions[:, None], labels.positions].masked_fill(labels.copies, 0.0)
        return relation.to(labels.vectors.dtype)

    def _softmax(self, first: Tensor, second: Tensor, task: str, masked: Tensor) -> Tensor:
        return self._logits(first, second, task, masked).softmax(1)

    def _logits(self, first: Tensor, second: Tensor, task: str, masked: Tensor) -> Tensor:
        """Return the similarities of vectors (p, D) and (n, D), divided by the temperature of a task, (p, n).

        masked: whether a vector of `second` has probability 0. The mask is not -inf, because 0 times its logarithm
            would be NaN.
        """
        scores = similarities(first, second, self.objective.similarity) / self.objective.temperature_of(task)
        return scores.masked_fill(masked, torch.finfo(scores.dtype).min)


def encoded_labels(vectors: Tensor, rows: Tensor, sample: LabelSample) -> Labels:
    """Return the labels of a companion. vectors: (n, D). rows: rows of the labels, (n,)."""
    if not sample.is_complete:
        vectors, rows, _ = gather_documents(vectors, rows)
    return Labels(vectors, rows - int(sample.rows[0]), duplicate_mask(rows))
