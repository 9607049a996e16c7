"""Consistency between tasks, for papers that are annotated for only some of them (MTPSL, arXiv 2111.14893).

A paper of a batch is labelled by the batch's task t. For another task s, the encoder predicts its labels, and a network
maps both into a space in which they must agree:

    y_t    label: mean of the query's positives in the batch, encoded as t
    y^_s   prediction: mean of candidates of task s, weighted by the softmax of their cosines with the query, all
           encoded as s
    f      the query's own vector, encoded as t
    m_st   the network, applied to a vector of s to compare it with a vector of t

    loss = 1 - cos(m_st(y^_s), m_ts(y_t)) + trunk_weight (1 - cos(m_st(y^_s), f) + 1 - cos(m_ts(y_t), f))

Labels, candidates (as values) and f are constants, like the annotations and the detached features in the paper. So the
loss trains the network and, through the softmax, the query's vector for task s. The last two terms prevent the network
from mapping everything to one point.

Learning from bad predictions makes them worse, because any permutation of the labels is consistent with itself. So only
the network learns in the first part of the training, `warmup`.

Shapes: B queries on this rank, n candidates, D dimensions of a vector, H hidden units of the network.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.batches import CompanionSource, ContrastiveDataModule
from datamodules.options import check_number
from datamodules.packed import ContrastiveBatch
from datamodules.records import UserError
from datamodules.tasks import TaskDataModule
from lightning_modules.auxiliary.auxiliary_loss import AuxiliaryLoss
from lightning_modules.auxiliary.pairs import queries_of_batch
from lightning_modules.losses import mean_of_columns

Pair = tuple[str, str]


class CrossTaskConsistency(AuxiliaryLoss):
    """Agreement of a paper's labels in one task with its predictions in other tasks.

    weight: factor of the loss.
    lr: peak learning rate of the network, by default the encoder's.
    pairs: pairs of tasks that must agree, each in both directions; None for all pairs.
    candidates: maximum number of the other task's documents in a prediction. They are drawn for each batch, with the
        same result on all ranks. A smaller corpus, such as a list of labels, is used completely.
    temperature: divisor of the cosines in the softmax.
    trunk_weight: weight of the terms that prevent a collapse.
    hidden: hidden units of the network, H.
    warmup: share of the training in which only the network learns, at least 0 and below 1.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        dimension: int,
        weight: float = 2.0,
        lr: float | None = 1e-3,
        pairs: Sequence[Sequence[str]] | None = None,
        candidates: int = 128,
        temperature: float = 0.1,
        trunk_weight: float = 0.5,
        hidden: int = 256,
        warmup: float = 0.5,
    ):
        super().__init__(weight, lr)
        check_number("candidates", candidates, minimum=2, maximum=1_000_000)
        check_number("hidden", hidden, minimum=1, maximum=100_000)
        check_number("temperature", temperature, minimum=1e-6, maximum=1e6)
        check_number("trunk_weight", trunk_weight, minimum=0, maximum=1e6)
        check_number("warmup", warmup, minimum=0, below=1)
        self.candidates, self.temperature = candidates, temperature
        self.trunk_weight, self.warmup = trunk_weight, warmup
        self.network = JointSpace(ordered_pairs(tasks, pairs), dimension, hidden)

    def others(self, task: str) -> list[str]:
        """Return the tasks whose predictions for a paper must agree with its labels of this task."""
        return [other for other, labelled in self.network.index if labelled == task]

    def prepare(self, data: ContrastiveDataModule) -> None:
        tables = data.by_name
        for task in dict.fromkeys(itertools.chain.from_iterable(self.network.index)):
            if task not in tables:
                raise UserError(f"pairs: task {task!r} has no data; expected one of {', '.join(tables)}")
            if (count := len(candidate_rows(tables[task]))) < 2:
                raise UserError(
                    f"pairs: a prediction needs two documents, but task {task} has only {count} to train on"
                )
        if self.warmup and not data.options.num_batches and data.trainer is None:
            raise UserError("warmup: the length of the training is unknown; set num_batches of the data")
        self.warmup_batches = round(self.warmup * data.num_batches())

    def companions(self, data: ContrastiveDataModule, task: str) -> Sequence[CompanionSource]:
        """Return, for each other task, the queries and the candidates, both encoded as this other task."""
        tables, sources = data.by_name, []
        for other in self.others(task):
            sources.append(CompanionSource(tables[task], other, queries_of_batch))
            draw = partial(draw_rows, candidate_rows(tables[other]), self.candidates)
            sources.append(CompanionSource(tables[other], other, draw))
        return sources

    def forward(self, batch: ContrastiveBatch, vectors: Tensor, companions: Sequence[Tensor]) -> Tensor:
        others = self.others(batch.task)
        if not others:
            return 0 * vectors.sum()
        trunk, documents = vectors[batch.queries].detach(), vectors[batch.documents].detach()
        labels = mean_of_columns(documents, batch.positives)
        losses = []
        for other, queries, candidates in zip(others, companions[::2], companions[1::2], strict=True):
            predictions = predicted(queries, candidates, self.temperature)
            if batch.step < self.warmup_batches:
                predictions = predictions.detach()
            mapped = self.network(predictions, (other, batch.task)), self.network(labels, (batch.task, other))
            losses.append(consistency(*mapped, trunk, self.trunk_weight).mean())
        return torch.stack(losses).sum()


class JointSpace(nn.Module):
    """A two-layer network for all pairs of tasks. Each pair scales and shifts its hidden units (FiLM).

    pairs: (own, other): task of a vector, and task of the vector to compare it with.
    """

    def __init__(self, pairs: Sequence[Pair], dimension: int, hidden: int):
        super().__init__()
        self.index = {pair: row for row, pair in enumerate(pairs)}
        with torch.random.fork_rng(devices=[]):  # so that the encoder's dropout and data do not change
            torch.manual_seed(0)
            self.enter = nn.Linear(dimension, hidden, bias=False)
            self.leave = nn.Linear(hidden, dimension)
        self.scale = nn.Parameter(torch.ones(len(pairs), hidden))  # gamma
        self.shift = nn.Parameter(torch.zeros(len(pairs), hidden))  # beta

    def forward(self, vectors: Tensor, pair: Pair) -> Tensor:
        """Map vectors (B, D) to the joint space, (B, D)."""
        row = self.index[pair]
        hidden = F.layer_norm(self.enter(vectors), self.scale.shape[1:])  # (B, H); batch norm would differ by rank
        return self.leave(F.relu(self.scale[row] * hidden + self.shift[row]))


def ordered_pairs(tasks: Sequence[str], pairs: Sequence[Sequence[str]] | None = None) -> list[Pair]:
    """Return both directions of each pair. pairs: None for all pairs. Raises UserError for invalid pairs."""
    if pairs is None:
        if len(tasks) < 2:
            raise UserError(f"pairs: expected at least two tasks in training, got {', '.join(tasks) or 'none'}")
        return list(itertools.permutations(tasks, 2))
    chosen: dict[Pair, None] = {}
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2 or pair[0] == pair[1]:
            raise UserError(f"pairs: expected pairs of two tasks, got {pair!r}")
        for task in pair:
            if task not in tasks:
                raise UserError(f"pairs: expected tasks among {', '.join(tasks)}, got {task!r}")
        chosen |= {(pair[0], pair[1]): None, (pair[1], pair[0]): None}
    if not chosen:
        raise UserError("pairs: expected at least one pair of tasks, got none")
    return list(chosen)


def candidate_rows(table: TaskDataModule) -> np.ndarray:
    """Return the rows of a task's corpora, without documents left out of training."""
    return np.setdiff1d(np.flatnonzero(table.corpus_rows()), table.stripped)


def draw_rows(
    rows: np.ndarray, count: int, queries: np.ndarray, documents: np.ndarray, rng: random.Random
) -> np.ndarray:
    """Draw at most `count` of the rows, with a batch's random generator."""
    return rows if len(rows) <= count else rows[sorted(rng.sample(range(len(rows)), count))]


def predicted(queries: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    """Return the prediction for each query (B, D) from candidates (n, D): their weighted mean, (B, D)."""
    scores = F.normalize(queries, dim=-1) @ F.normalize(candidates, dim=-1).T  # (B, n)
    return (scores / temperature).softmax(-1) @ candidates.detach()


def consistency(predictions: Tensor, labels: Tensor, trunk: Tensor, trunk_weight: float) -> Tensor:
    """Return the loss of each query, (B,). predictions, labels: mapped vectors, (B, D). trunk: constants, (B, D)."""
    agreement = 1 - F.cosine_similarity(predictions, labels)
    from_trunk = 2 - F.cosine_similarity(predictions, trunk) - F.cosine_similarity(labels, trunk)
    return agreement + trunk_weight * from_trunk
