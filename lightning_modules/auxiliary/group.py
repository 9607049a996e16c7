"""The group loss of ULTRA-DP (Chen et al., 2023, arXiv 2310.14845): a paper and the papers that walks reach from it.

Each query of a link-prediction task is the head of a group: papers that random walks on the citation graph visit within
k steps are its positives, and papers that they rarely visit at step k are its negatives. With unit vectors h of the
head and x of the others, and the distance d = 1 - cosine from the anchor a = mean(h, positives):

    center      mean of d(x)^2 over head and positives
    separation  relu(log sum exp(d(x)) over head and positives + log sum exp(margin - d(y)) over negatives y)^2
    loss        share * center + (1 - share) * separation

The authors' code (train.py of Keytoyze/ULTRA-DP) has the same loss, and draws positives in the same way: first a step
from 1 to k for the group, then papers by their probability at this step of a walk. The differences here are:

* each query of a batch is a head; their code has one head per batch, with half of the batch as positives
* papers are drawn without replacement, as long as enough exist
* a negative is neither linked to the head nor one of its positives
* probabilities at step k are estimated from sampled walks; theirs are exact for papers with up to 256 links

Shapes: B queries on this rank, p positives and n negatives of a head, D dimensions of a vector.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from datamodules.batches import CompanionSource, ContrastiveDataModule
from datamodules.citation_graph import CitationGraph, graph_of
from datamodules.options import check_number
from datamodules.packed import ContrastiveBatch
from datamodules.records import UserError
from lightning_modules.auxiliary.auxiliary_loss import AuxiliaryLoss

WALKS = 256  # number of walks from each head


def group_loss(heads: Tensor, positives: Tensor, negatives: Tensor, margin: float = 1.0, share: float = 0.5) -> Tensor:
    """Return the loss of each group, (B,).

    heads: vectors (B, D). positives: (B, p, D). negatives: (B, n, D).
    margin: distance from the anchor beyond which a negative hardly counts.
    share: share of the center term, from 0 to 1.
    """
    members = normalize(torch.cat([heads[:, None], positives], 1), dim=-1)  # (B, 1 + p, D)
    anchors = members.mean(1, keepdim=True)  # (B, 1, D)
    near = 1 - cosine_similarity(anchors, members, dim=-1)  # (B, 1 + p)
    far = 1 - cosine_similarity(anchors, negatives, dim=-1)  # (B, n)
    # Sums, as in the authors' code: with two or more negatives, relu is rarely 0.
    separation = torch.relu(near.logsumexp(1) + (margin - far).logsumexp(1)).square()
    return share * near.square().mean(1) + (1 - share) * separation


@dataclass(frozen=True)
class GroupSampler:
    """Draw the positives and negatives of queries by random walks of up to `steps` steps."""

    graph: CitationGraph
    steps: int
    positives: int
    negatives: int

    def __call__(self, queries: np.ndarray, documents: np.ndarray, rng: random.Random) -> np.ndarray:
        """Return the rows of all groups, (B * (p + n),): p positives and n negatives of each query.

        The groups only depend on the generator and the query, so ranks that share a batch draw the same groups.
        """
        seed = rng.getrandbits(64)
        return np.concatenate([self.group(row, np.random.default_rng([seed, row])) for row in queries.tolist()])

    def group(self, row: int, rng: np.random.Generator) -> np.ndarray:
        """Return p positives and n negatives of a query, (p + n,).

        A query without positives or without negatives gets its own row p + n times.
        """
        no_group = np.full(self.positives + self.negatives, row)
        if row not in self.graph:
            return no_group
        head = self.graph.node_of[row]
        walks = self.graph.walks(row, self.steps, WALKS, rng)  # (steps, WALKS)
        at_step = walks[rng.choice(np.flatnonzero((walks != head).any(1)))]  # the first step always leaves the head
        # Walks are independent, so the first distinct ones are a draw without replacement.
        positives = np.array(list(dict.fromkeys(at_step[at_step != head].tolist()))[: self.positives])
        reached, visits = np.unique(walks[-1], return_counts=True)
        rare = ~np.isin(reached, [head, *positives, *self.graph.neighbours_of(row)])
        if not rare.any():
            return no_group
        count, weights = min(self.negatives, int(rare.sum())), 1 / visits[rare]
        negatives = rng.choice(reached[rare], count, replace=False, p=weights / weights.sum())
        return np.concatenate([np.resize(positives, self.positives), np.resize(negatives, self.negatives)])


class GroupLoss(AuxiliaryLoss):
    """Move each paper closer to papers that random walks from it often reach, and away from rarely reached papers.

    weight: factor of the loss.
    steps: maximum number of steps of a walk, k; at least 2.
    positives, negatives: number of papers of each kind to encode per query.
    margin: distance from the anchor beyond which a negative hardly counts.
    share: share of the center term, from 0 to 1.
    graph: file with the links, as pairs of ids; by default, the training links of each link-prediction task.
    """

    def __init__(
        self,
        weight: float = 1.0,
        steps: int = 6,
        positives: int = 2,
        negatives: int = 2,
        margin: float = 1.0,
        share: float = 0.5,
        graph: str = "",
    ):
        super().__init__(weight)
        for name, value, minimum in (("steps", steps, 2), ("positives", positives, 1), ("negatives", negatives, 1)):
            check_number(name, value, minimum=minimum, maximum=10_000)
        check_number("margin", margin, minimum=-1e6, maximum=1e6)
        check_number("share", share, minimum=0, maximum=1)
        self.steps, self.positives, self.negatives = steps, positives, negatives
        self.margin, self.share, self.graph = margin, share, graph
        self._samplers: dict[str, GroupSampler] = {}

    def prepare(self, data: ContrastiveDataModule) -> None:
        tasks = [task for task in data.tasks if task.queries_are_documents]
        if not tasks:
            names = ", ".join(task.task.name for task in data.tasks)
            raise UserError(f"the group loss needs a task of kind link_prediction; the tasks are {names}")
        self._samplers = {
            task.task.name: GroupSampler(graph_of(task, self.graph or None), self.steps, self.positives, self.negatives)
            for task in tasks
        }

    def companions(self, data: ContrastiveDataModule, task: str) -> Sequence[CompanionSource]:
        if task not in self._samplers:
            return ()
        return (CompanionSource(data.by_name[task], task, self._samplers[task]),)

    def forward(self, batch: ContrastiveBatch, vectors: Tensor, companions: Sequence[Tensor]) -> Tensor:
        if not companions:
            return 0 * vectors.sum()
        assert batch.rows is not None
        heads = vectors[batch.queries]
        groups = companions[0].view(len(heads), self.positives + self.negatives, -1)
        losses = group_loss(heads, groups[:, : self.positives], groups[:, self.positives :], self.margin, self.share)
        rows = batch.companions[0].rows.view(len(heads), -1)[:, 0]
        return (losses * (rows != batch.rows[batch.queries])).mean()  # queries without a group count as 0
