"""Quadruplet ranking: rank a task's documents by the labels of two tasks.

CrossDistil (Yang et al., arXiv 2202.09852). A pair of a query and a document has one label for the trained task A, such
as "cites", and one for another task B, such as "shares a class". A's documents should be in this order:

    ++  before  +-  before  -+  before  --              first sign: label of A, second sign: label of B

The loss of a query is a mean over the pairs of documents in each comparison. With r, the scores divided by a
temperature:

    -beta1 [ln sigmoid(r++ - r+-) + ln sigmoid(r+- - r-+)] - beta2 ln sigmoid(r-+ - r--)

A pair with an unknown label is in no comparison.

Shapes: B queries on this rank, M documents on all ranks, n rows of the document table of task A, K documents that are
related to a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from datamodules.batches import ContrastiveDataModule
from datamodules.co_annotation import MATCHES, known_annotations, paper_keys
from datamodules.options import check_number
from datamodules.packed import ContrastiveBatch
from datamodules.records import UserError, check_choice
from datamodules.tasks import LinkPredictionDataModule, TaskDataModule
from lightning_modules.auxiliary.auxiliary_loss import AuxiliaryLoss
from lightning_modules.auxiliary.pairs import check_other_task, in_batch_pairs
from lightning_modules.losses import membership_mask
from lightning_modules.objective_options import ObjectiveOptions

MAX_COMPARISONS = 2**22  # number of score differences in memory at once


def quadruplet_loss(
    scores: Tensor, label_a: Tensor, label_b: Tensor, known: Tensor, beta1: float, beta2: float
) -> Tensor:
    """Return the loss of each query, (B,). A comparison counts as 0 if one of its sides has no documents.

    scores: similarities divided by the temperature, (B, M).
    label_a, label_b: labels of the tasks A and B, (B, M) bool.
    known: whether both labels are known, (B, M) bool.
    """
    size = max(1, MAX_COMPARISONS // scores.shape[1] ** 2)
    block_loss = partial(_block_loss, beta1=beta1, beta2=beta2)
    if len(scores) <= size:
        return block_loss(scores, label_a, label_b, known)
    block_loss = partial(checkpoint, block_loss, use_reentrant=False, preserve_rng_state=False)
    blocks = zip(*(x.split(size) for x in (scores, label_a, label_b, known)), strict=True)
    return torch.cat([block_loss(*block) for block in blocks])


def _block_loss(scores: Tensor, label_a: Tensor, label_b: Tensor, known: Tensor, beta1: float, beta2: float) -> Tensor:
    costs = softplus(scores[:, None, :] - scores[:, :, None])  # (B, M, M): of ranking the first before the second
    groups = [known & (label_a == a) & (label_b == b) for a, b in ((1, 1), (1, 0), (0, 1), (0, 0))]
    members = torch.stack(groups, dim=2).to(scores.dtype)  # (B, M, 4)
    above, below = members[:, :, :3], members[:, :, 1:]
    sums = (above * torch.bmm(costs, below)).sum(1)  # (B, 3): one for each comparison
    means = sums / (above.sum(1) * below.sum(1)).clamp(min=1)
    return beta1 * (means[:, 0] + means[:, 1]) + beta2 * means[:, 2]


def label_table(a: TaskDataModule, b: TaskDataModule, match: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels that task B's training data give the n rows of task A's document table, (n, K) and (n, L)
    int64.

    A query and a document have label B if the query's row of the first table and the document's row of the second share
    a number. Their label is unknown if either has no number. Lists are padded with -1, and -2 in the second.
    """
    related = known_annotations(a, b, match).padded()
    if not isinstance(b, LinkPredictionDataModule):  # papers that share a class, or answer a common query
        return related, np.where(related < 0, -2, related)
    papers, others = paper_keys(a, match), paper_keys(b, match)
    distinct = np.unique(others)  # the number of a paper is its position here
    is_known = (papers != 0) & np.isin(papers, distinct)
    related = np.where(related < 0, -1, np.searchsorted(distinct, others)[related])
    return related, np.where(is_known, np.searchsorted(distinct, papers), -2)[:, None]


class QuadrupletRanking(AuxiliaryLoss):
    """Rank the documents of a batch by the labels of two tasks.

    labels: task A, whose batches are ranked -> task B, whose training data give the second label. A pair of papers has
        the second label if they share a class (B is a classification), if they answer a common query (search), or if
        the first cites the second (link prediction).
    beta1: factor of the comparisons ++ before +- and +- before -+.
    beta2: factor of the comparison -+ before --.
    temperature: divisor of the scores, by default the objective's temperature (the initial value, if it is learned).
    match: how to find a paper of A in B: by title, text or id (see datamodules/co_annotation.py).
    objective: options of the objective, which determine the similarity.
    """

    def __init__(
        self,
        labels: dict[str, str],
        tasks: list[str],
        beta1: float = 1.0,
        beta2: float = 1.0,
        temperature: float | None = None,
        match: str = "title",
        weight: float = 1.0,
        objective: ObjectiveOptions | None = None,
    ):
        super().__init__(weight)
        if not labels:
            raise UserError("labels: got none; expected task: task with the second label, such as {search: topics}")
        for task, other in labels.items():
            check_other_task(f"labels.{task}", task, other, tasks)
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            check_number(name, value, minimum=0, maximum=1e6)
        if temperature is not None:
            check_number("temperature", temperature, minimum=1e-6, maximum=1e6)
        check_choice("match", match, MATCHES)
        self.labels, self.beta1, self.beta2 = labels, beta1, beta2
        self.temperature, self.match, self.objective = temperature, match, objective or ObjectiveOptions()

    def prepare(self, data: ContrastiveDataModule) -> None:
        """Make the tables of B's labels. Raises UserError if B labels no query or no document of A."""
        tables = data.by_name
        for number, (task, other) in enumerate(self.labels.items()):
            related, keys = label_table(tables[task], tables[other], self.match)
            queries, documents = list(tables[task].examples.query_rows()), tables[task].examples.judged_rows()
            for what, known in (("query", related[queries]), ("document", keys[documents])):
                if (known < 0).all():
                    raise UserError(
                        f"labels.{task}: {other} has no training label for any {what} of {task}; the two tasks must "
                        f"share papers, matched by {self.match}"
                    )
            self.register_buffer(f"related{number}", torch.from_numpy(related), persistent=False)
            self.register_buffer(f"keys{number}", torch.from_numpy(keys), persistent=False)

    def forward(self, batch: ContrastiveBatch, vectors: Tensor, companions: Sequence[Tensor]) -> Tensor:
        if batch.task not in self.labels:
            return 0.0 * vectors.sum()
        number = list(self.labels).index(batch.task)
        pairs = in_batch_pairs(batch, vectors, self.objective.similarity)
        related = self.get_buffer(f"related{number}")[pairs.query_rows]  # (B, K)
        keys = self.get_buffer(f"keys{number}")[pairs.document_rows]  # (M, L)
        label = reduce(torch.logical_or, (membership_mask(related, key.contiguous()) for key in keys.unbind(1)))
        known = pairs.known & (related >= 0).any(1)[:, None] & (keys >= 0).any(1)
        temperature = self.temperature or self.objective.temperature_of(batch.task)
        return quadruplet_loss(pairs.scores / temperature, pairs.positive, label, known, self.beta1, self.beta2).mean()
