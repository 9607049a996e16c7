"""Count the negatives of each task's first batch, and warn if there is nothing to learn from."""

from __future__ import annotations

import logging
from functools import reduce
from typing import Any

import lightning as L
import torch
from torch import Tensor

from datamodules.packed import ContrastiveBatch
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.distributed.collectives import gather_rows, world_size
from lightning_modules.losses import fill_padding
from lightning_modules.objective import Direction, document_to_query, query_to_document
from lightning_modules.objective_options import ObjectiveOptions

log = logging.getLogger(__name__)


class NegativesReport(L.Callback):
    """Logs how many negatives the queries in each task's first batch have, not counting masked documents.

    Logs a warning if no query has any, because the loss is then always 0, and the task learns nothing.
    """

    def __init__(self) -> None:
        self.tasks: set[str] = set()

    def on_train_batch_start(self, trainer: L.Trainer, module: ContrastiveModule, batch: Any, batch_idx: int) -> None:
        if batch.task in self.tasks:
            return
        self.tasks.add(batch.task)
        counts = count_negatives(batch, module.objective.options)
        least, most, ranks = int(counts.min()), int(counts.max()), world_size()
        count = f"{least} to {most}" if least < most else f"{most}"
        source = f"{ranks} rank{'s' if ranks > 1 else ''}"
        log.info("in the first batch of %s, a query has %s negatives, from %s", batch.task, count, source)
        if most == 0:
            log.warning(
                "%s: the loss is 0 and nothing is learned, because no query in the batch has a negative; use larger "
                "batches, hard negatives, or more ranks",
                batch.task,
            )


@torch.no_grad()
def count_negatives(batch: ContrastiveBatch, options: ObjectiveOptions) -> Tensor:
    """Return the number of negatives of each query of a batch, on all ranks, (B,). All ranks call this.

    With a symmetric loss, these counts are followed by the counts of the positive documents. Documents that only a
    guide masks count as negatives.
    """
    queries, documents = (torch.zeros(len(rows), 1, device=rows.device) for rows in (batch.queries, batch.documents))
    directions = [query_to_document(queries, documents, batch, options)]
    if options.symmetric:
        directions.append(document_to_query(queries, documents, batch, options))
    masks = map(masked_and_positive, directions)
    return gather_rows(torch.cat([(~masked & ~is_positive).sum(1) for masked, is_positive in masks]))


def masked_and_positive(direction: Direction) -> tuple[Tensor, Tensor]:
    """Return two masks of each query's candidates, (R, C) bool each: masked documents, and positives."""
    rows = slice(0, len(direction.queries))
    none = direction.positives.new_zeros(len(direction.queries), len(direction.candidates), dtype=torch.bool)
    masked = reduce(torch.logical_or, (mask(rows) for mask in direction.masks), none)
    return masked, none.scatter(1, fill_padding(direction.positives), True)
